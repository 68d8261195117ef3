r"""The game between the generator G, the quantized network Q and P, which watches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from adadfq_plugin.functional._checks import (
    check_weight,
    cross_entropy,
    entropy,
    logit_pair,
    shape_of,
    upcast,
)

__all__ = [
    "agreement_loss",
    "balance_loss",
    "disagreement_information",
    "disagreement_loss",
    "generator_loss",
    "margin_loss",
    "normalized_information",
]


# The computed entropy of C equal probabilities was at most 3 ulps off ln C, up to C = 21843.
_SATURATION_ULPS = 16


def disagreement_loss(z_p: Tensor, z_q: Tensor, y: Tensor) -> Tensor:
    r"""Cross-entropy of the disagreement of P and Q with the label: low where P says ``y`` and Q does not.

    .. math::

        L_{ds} = -\frac{1}{N} \sum_{n=1}^{N} \sum_{c=1}^{C} y_{nc} \ln \mathrm{softmax}(z_p - z_q)_{nc}

    Args:
        z_p: Logits of P, shape (N, C), N >= 1, C >= 2.
        z_q: Logits of Q, shape (N, C).
        y: Class indices, an integer tensor of shape (N,), or class probabilities, a floating-point tensor of
            shape (N, C) whose rows sum to one (the sums are not checked).

    Returns:
        The mean over the batch in nats, a tensor of shape ().

    Raises:
        ValueError: A shape or a dtype does not fit, or, for labels on the CPU, a class index is outside [0,
            C).

    Example:
        >>> import math, torch
        >>> z_p, z_q = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)  # softmax = (3/4, 1/4)
        >>> round(disagreement_loss(z_p, z_q, torch.tensor([0])).item(), 4)  # ln(4/3)
        0.2877

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869.
    """
    z_p, z_q = logit_pair(z_p, z_q)
    return cross_entropy(z_p - z_q, y)


def agreement_loss(z_p: Tensor, z_q: Tensor, y: Tensor) -> Tensor:
    r"""Cross-entropy of the joint vote of P and Q with the label: low where both say ``y``.

    .. math::

        L_{as} = -\frac{1}{N} \sum_{n=1}^{N} \sum_{c=1}^{C} y_{nc} \ln \mathrm{softmax}(z_p + z_q)_{nc}

    Args:
        z_p: Logits of P, shape (N, C), N >= 1, C >= 2.
        z_q: Logits of Q, shape (N, C).
        y: Class indices, an integer tensor of shape (N,), or class probabilities, a floating-point tensor of
            shape (N, C) whose rows sum to one (the sums are not checked).

    Returns:
        The mean over the batch in nats, a tensor of shape ().

    Raises:
        ValueError: A shape or a dtype does not fit, or, for labels on the CPU, a class index is outside [0,
            C).

    Example:
        >>> import math, torch
        >>> z = torch.tensor([[math.log(3.0), 0.0]])  # softmax(2 z) = (9/10, 1/10)
        >>> round(agreement_loss(z, z, torch.tensor([0])).item(), 4)  # ln(10/9)
        0.1054

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869.
    """
    z_p, z_q = logit_pair(z_p, z_q)
    return cross_entropy(z_p + z_q, y)


def balance_loss(
    z_p: Tensor, z_q: Tensor, y: Tensor, *, alpha_ds: float = 0.2, alpha_as: float = 0.1
) -> Tensor:
    r"""Weighted sum of the disagreement and the agreement loss, which pull a sample in opposite directions.

    .. math::

        L_{bal} = \alpha_{ds} L_{ds} + \alpha_{as} L_{as}

    Args:
        z_p: Logits of P, shape (N, C), N >= 1, C >= 2.
        z_q: Logits of Q, shape (N, C).
        y: Class indices, an integer tensor of shape (N,), or class probabilities, a floating-point tensor of
            shape (N, C) whose rows sum to one (the sums are not checked).
        alpha_ds: Weight of :func:`disagreement_loss`, without unit, finite and >= 0.
        alpha_as: Weight of :func:`agreement_loss`, without unit, finite and >= 0.

    Returns:
        The weighted sum in nats, a tensor of shape ().

    Raises:
        ValueError: A shape or a dtype does not fit, a weight is negative or not finite, or, for labels on the
            CPU, a class index is outside [0, C).

    Example:
        >>> import math, torch
        >>> z_p, z_q = torch.tensor([[math.log(3.0), 0.0]]), torch.zeros(1, 2)  # both losses are ln(4/3)
        >>> round(balance_loss(z_p, z_q, torch.tensor([0])).item(), 4)  # 0.3 ln(4/3)
        0.0863

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869.
    """
    check_weight("alpha_ds", alpha_ds)
    check_weight("alpha_as", alpha_as)
    return alpha_ds * disagreement_loss(z_p, z_q, y) + alpha_as * agreement_loss(z_p, z_q, y)


def disagreement_information(z_p: Tensor, z_q: Tensor) -> Tensor:
    r"""Entropy of the disagreement of P and Q per sample: low where they disagree, ln C where they agree.

    .. math::

        H_n = -\sum_{c=1}^{C} p_{nc} \ln p_{nc}, \qquad p_n = \mathrm{softmax}(z_{p,n} - z_{q,n})

    A constant added to all logits of a sample changes nothing, so P and Q agree fully when their logits
    differ by one constant per sample.

    Args:
        z_p: Logits of P, shape (N, C), N >= 1, C >= 2.
        z_q: Logits of Q, shape (N, C).

    Returns:
        The information of every sample in nats, in [0, ln C], shape (N,).

    Raises:
        ValueError: A shape or a dtype does not fit.

    Example:
        >>> import math, torch
        >>> z_p = torch.tensor([[math.log(3.0), 0.0], [5.0, 5.0]])  # softmax = (3/4, 1/4) and (1/2, 1/2)
        >>> information = disagreement_information(z_p, torch.zeros(2, 2))
        >>> [round(h, 4) for h in information.tolist()]  # the second is ln 2
        [0.5623, 0.6931]

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869.
    """
    z_p, z_q = logit_pair(z_p, z_q)
    return entropy(z_p - z_q)


def normalized_information(
    information: Tensor, num_classes: int, *, minimum: float | Tensor | None = None
) -> Tensor:
    r"""Information scaled so that the batch minimum becomes 0 and full agreement, ln C, becomes 1.

    .. math::

        H'_n = \frac{H_n - H_{\min}}{\ln C - H_{\min}}, \qquad H_{\min} = \min_m H_m

    As in the published method the gradient flows through the minimum of the batch, so a sample also moves the
    scale of the others. Pass ``minimum=information.detach().amin()`` to hold the scale fixed.

    Where Q equals P every sample agrees, numerator and denominator vanish and the quotient is 0/0. Every
    information is then at its maximum ln C, so H' is defined as 1, with zero gradient. This holds as soon as
    ln C - H_min is no more than the rounding error of an entropy: 16 ulps of ln C in the dtype of the
    computation.

    Args:
        information: Information in nats, in [0, ln C], shape (N,), N >= 1.
        num_classes: C >= 2.
        minimum: H_min in nats in place of the minimum of this batch: a number in [0, ln C], or a tensor of
            one element, whose value is not checked (that would stall a GPU).

    Returns:
        H', without unit, in [0, 1] unless ``minimum`` is above an element of ``information``, shape (N,).

    Raises:
        ValueError: A shape, a dtype, ``num_classes`` or ``minimum`` does not fit.

    Example:
        >>> import math, torch
        >>> h = math.log(4.0) * torch.tensor([0.5, 0.75, 1.0], dtype=torch.float64)
        >>> normalized_information(h, 4)
        tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64)
        >>> normalized_information(h, 4, minimum=0.0)
        tensor([0.5000, 0.7500, 1.0000], dtype=torch.float64)
        >>> normalized_information(disagreement_information(torch.eye(4), torch.eye(4)), 4)  # Q equals P
        tensor([1., 1., 1., 1.])

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869; the value at 0/0 is
    ours.
    """
    information = upcast("information", information)
    if information.ndim != 1 or not len(information):
        raise ValueError(f"information must have the shape (N,) with N >= 1; got {shape_of(information)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2; got {num_classes}")
    maximum = math.log(num_classes)
    tolerance = _SATURATION_ULPS * torch.finfo(information.dtype).eps * maximum
    if minimum is None:
        low = information.amin()
    elif isinstance(minimum, Tensor):
        if minimum.numel() != 1:
            raise ValueError(f"minimum must be a number or a tensor of one element; got {shape_of(minimum)}")
        low = minimum.reshape(()).to(information)
    else:
        if not 0 <= minimum <= maximum + tolerance:
            raise ValueError(f"minimum must be in [0, ln C] = [0, {maximum:.6g}]; got {minimum}")
        low = information.new_tensor(minimum)
    span = maximum - low
    saturated = span <= tolerance
    # The inner where keeps 0/0 out of the backward pass, where NaN times zero would still be NaN.
    quotient = (information - low) / torch.where(saturated, torch.ones_like(span), span)
    return torch.where(saturated, torch.ones_like(quotient), quotient)


def margin_loss(normalized: Tensor, lower: float, upper: float) -> Tensor:
    r"""Hinges that hold the normalized information between two bounds: exactly zero inside.

    .. math::

        L_{margin} = \frac{1}{N} \sum_{n=1}^{N} \max(\lambda_l - H'_n, 0)
                   + \frac{1}{N} \sum_{n=1}^{N} \max(H'_n - \lambda_u, 0)

    Args:
        normalized: H' of :func:`normalized_information`, without unit, shape (N,), N >= 1.
        lower: :math:`\lambda_l`, without unit.
        upper: :math:`\lambda_u`, without unit, 0 <= lower < upper <= 1.

    Returns:
        The sum of both means, without unit, a tensor of shape ().

    Raises:
        ValueError: A shape or a dtype does not fit, or the bounds are not in order.

    Example:
        >>> import torch
        >>> h = torch.tensor([0.0, 0.25, 0.5, 1.0])
        >>> margin_loss(h, 0.25, 0.75)  # (0.25 + 0.25) / 4
        tensor(0.1250)
        >>> margin_loss(h[1:3], 0.25, 0.75)
        tensor(0.)

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869.
    """
    normalized = upcast("normalized", normalized)
    if normalized.ndim != 1 or not len(normalized):
        raise ValueError(f"normalized must have the shape (N,) with N >= 1; got {shape_of(normalized)}")
    if not 0 <= lower < upper <= 1:
        raise ValueError(f"lower and upper must satisfy 0 <= lower < upper <= 1; got {lower} and {upper}")
    return F.relu(lower - normalized).mean() + F.relu(normalized - upper).mean()


def generator_loss(
    margin: Tensor, balance: Tensor, bns: Tensor, *, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    r"""What the generator minimises: margin, balance and BatchNorm statistics together.

    .. math::

        L_G = L_{margin} + \beta L_{bal} + \gamma L_{BNS}

    Args:
        margin: :func:`margin_loss`, shape ().
        balance: :func:`balance_loss` in nats, shape ().
        bns: :func:`bn_statistics_loss`, shape ().
        beta: Weight of ``balance``, without unit, finite and >= 0.
        gamma: Weight of ``bns``, without unit, finite and >= 0.

    Returns:
        The weighted sum, a tensor of shape ().

    Raises:
        ValueError: A term is not a scalar of floating point, or a weight is negative or not finite.

    Example:
        >>> import torch
        >>> terms = torch.tensor(1.0), torch.tensor(2.0), torch.tensor(4.0)
        >>> generator_loss(*terms), generator_loss(*terms, beta=0.5, gamma=0.25)
        (tensor(7.), tensor(3.))

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869.
    """
    check_weight("beta", beta)
    check_weight("gamma", gamma)
    terms = {"margin": margin, "balance": balance, "bns": bns}
    for name, term in terms.items():
        if term.ndim:
            raise ValueError(f"{name} must be a scalar of shape (); got {shape_of(term)}")
    margin, balance, bns = (upcast(name, term) for name, term in terms.items())
    return margin + beta * balance + gamma * bns
