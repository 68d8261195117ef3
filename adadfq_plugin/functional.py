r"""The formulas of AdaDFQ and the metrics beside them, as pure functions of tensors.

Nothing here knows a module, a hook or a quantization toolkit. Logits have the shape (N, C): N samples, C
classes. ``z_p`` are those of the full-precision network P and ``z_q`` those of its quantized copy Q.
Entropies and losses are in nats. float16 and bfloat16 arguments are computed in float32, float32 and float64
arguments in their own precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "agreement_loss",
    "balance_loss",
    "bn_statistics_loss",
    "channel_moments",
    "disagreement_information",
    "disagreement_loss",
    "feature_loss",
    "generator_loss",
    "kl_divergence_loss",
    "margin_loss",
    "normalized_information",
    "quantized_loss",
    "sqnr_db",
    "top1_accuracy",
    "top1_agreement",
    "total_variation",
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
    z_p, z_q = _logit_pair(z_p, z_q)
    return _cross_entropy(z_p - z_q, y)


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
    z_p, z_q = _logit_pair(z_p, z_q)
    return _cross_entropy(z_p + z_q, y)


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
    _check_weight("alpha_ds", alpha_ds)
    _check_weight("alpha_as", alpha_as)
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
    z_p, z_q = _logit_pair(z_p, z_q)
    return _entropy(z_p - z_q)


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
    information = _upcast("information", information)
    if information.ndim != 1 or not len(information):
        raise ValueError(f"information must have the shape (N,) with N >= 1; got {_shape(information)}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2; got {num_classes}")
    maximum = math.log(num_classes)
    tolerance = _SATURATION_ULPS * torch.finfo(information.dtype).eps * maximum
    if minimum is None:
        low = information.amin()
    elif isinstance(minimum, Tensor):
        if minimum.numel() != 1:
            raise ValueError(f"minimum must be a number or a tensor of one element; got {_shape(minimum)}")
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
    normalized = _upcast("normalized", normalized)
    if normalized.ndim != 1 or not len(normalized):
        raise ValueError(f"normalized must have the shape (N,) with N >= 1; got {_shape(normalized)}")
    if not 0 <= lower < upper <= 1:
        raise ValueError(f"lower and upper must satisfy 0 <= lower < upper <= 1; got {lower} and {upper}")
    return F.relu(lower - normalized).mean() + F.relu(normalized - upper).mean()


class _ChannelMoments(torch.autograd.Function):
    """Mean and variance by sums along the memory, and a backward of one pass: a sixth of ``var_mean``'s time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        count = x.numel() // x.shape[1]
        if x.is_contiguous():
            rows = x.view(x.shape[0], x.shape[1], -1)
            mean = rows.sum(2).sum(0) / count
            second = torch.linalg.vector_norm(rows, dim=2).square().sum(0) / count
        else:
            columns = x.movedim(1, -1).reshape(-1, x.shape[1])
            ones = columns.new_ones(len(columns))
            mean, second = ones @ columns / count, ones @ columns.square() / count
        ctx.save_for_backward(x, mean)
        return mean, (second - mean.square()).clamp_min(0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        for_mean, for_var = grads
        x, mean = ctx.saved_tensors
        shape = [1, -1, *[1] * (x.ndim - 2)]
        slope = for_var * (2 / (x.numel() // x.shape[1]))
        offset = for_mean / (x.numel() // x.shape[1]) - slope * mean
        return torch.addcmul(offset.view(shape), x, slope.view(shape))


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and biased variance of every channel over batch and positions.

    .. math:: \mu_c = \frac{1}{M} \sum_i x_{ic}, \qquad \sigma_c^2 = \frac{1}{M} \sum_i x_{ic}^2 - \mu_c^2

    Args:
        x: Activations of shape (N, C, ...).

    Returns:
        Mean and variance, each (C,).

    Raises:
        ValueError: ``x`` has fewer than two dimensions or no elements.

    Example:
        >>> import torch
        >>> channel_moments(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
        (tensor([2., 0.]), tensor([1., 0.]))

    Source: the batch statistics of Ioffe and Szegedy, "Batch Normalization", ICML 2015, algorithm 1.
    """
    if x.ndim < 2 or not x.numel():
        raise ValueError(f"x must have the shape (N, C, ...) and elements; got {_shape(x)}")
    moments: tuple[Tensor, Tensor] = _ChannelMoments.apply(_upcast("x", x))
    return moments


def bn_statistics_loss(
    batch_means: Sequence[Tensor],
    batch_vars: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
) -> Tensor:
    r"""Distance of a batch's statistics from those that the BatchNorm layers of P have stored.

    .. math::

        L_{BNS} = \frac{1}{L} \sum_{l=1}^{L} \frac{1}{C_l} \left(
            \lVert \mu_l - \hat\mu_l \rVert_2^2 + \lVert \sigma_l^2 - \hat\sigma_l^2 \rVert_2^2 \right)

    :math:`\mu_l, \sigma_l^2` are mean and biased variance of the inputs of layer l over batch and positions;
    :math:`\hat\mu_l, \hat\sigma_l^2` are the layer's running mean and running variance. Layers weigh the
    same, whatever their number of channels.

    Args:
        batch_means: One tensor of shape (C_l,) for each of L >= 1 layers, in the units of the activations.
        batch_vars: One tensor of shape (C_l,) per layer, biased, in those units squared.
        running_means: One tensor of shape (C_l,) per layer.
        running_vars: One tensor of shape (C_l,) per layer.

    Returns:
        The mean over layers, a tensor of shape ().

    Raises:
        ValueError: There is no layer, the sequences differ in length, or a shape or a dtype does not fit.

    Example:
        >>> import torch
        >>> zeros, ones = torch.zeros(2), torch.ones(2)
        >>> bn_statistics_loss([ones], [3 * ones], [zeros], [ones])  # 1 + 4
        tensor(5.)
        >>> bn_statistics_loss([ones, zeros], [3 * ones, ones], [zeros, zeros], [ones, ones])  # (5 + 0) / 2
        tensor(2.5000)

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869.
    """
    if not len(batch_means):
        raise ValueError("batch_means must hold at least one layer; got none")
    others = {"batch_vars": batch_vars, "running_means": running_means, "running_vars": running_vars}
    for name, values in others.items():
        if len(values) != len(batch_means):
            raise ValueError(
                f"{name} must hold as many layers as batch_means, {len(batch_means)}; got {len(values)}"
            )
    losses = []
    for layer, mean in enumerate(batch_means):
        where = f"batch_means[{layer}]"
        mean = _upcast(where, mean)
        if mean.ndim != 1 or not len(mean):
            raise ValueError(f"{where} must have the shape (C,) with C >= 1; got {_shape(mean)}")
        var, running_mean, running_var = (
            _like(f"{name}[{layer}]", values[layer], where, mean) for name, values in others.items()
        )
        losses.append((mean - running_mean).square().mean() + (var - running_var).square().mean())
    return torch.stack(losses).mean()


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
    _check_weight("beta", beta)
    _check_weight("gamma", gamma)
    terms = {"margin": margin, "balance": balance, "bns": bns}
    for name, term in terms.items():
        if term.ndim:
            raise ValueError(f"{name} must be a scalar of shape (); got {_shape(term)}")
    margin, balance, bns = (_upcast(name, term) for name, term in terms.items())
    return margin + beta * balance + gamma * bns


def quantized_loss(z_p: Tensor, z_q: Tensor, *, temperature: float) -> Tensor:
    r"""What Q minimises: the negative information of its disagreement with P at a temperature.

    .. math::

        L_Q = -\frac{T^2}{N} \sum_{n=1}^{N} H\big(\mathrm{softmax}((z_{p,n} - z_{q,n}) / T)\big)

    The minimum is -T^2 ln C, where every difference is constant over the classes. Above it, with d = z_p -
    z_q and its population variance and third central moment over the classes,

    .. math::

        L_Q = -T^2 \ln C + \frac{1}{N} \sum_{n=1}^{N} \left(
            \frac{\mathrm{Var}_c(d_n)}{2} + \frac{\kappa_3(d_n)}{3 T} + O(T^{-2}) \right)

    so a high temperature makes it half the variance of the difference, apart from the constant.

    Args:
        z_p: Logits of P, shape (N, C), N >= 1, C >= 2.
        z_q: Logits of Q, shape (N, C).
        temperature: T > 0, in the units of the logits.

    Returns:
        The mean over the batch, in nats times T squared, in [-T^2 ln C, 0], a tensor of shape ().

    Raises:
        ValueError: A shape or a dtype does not fit, or the temperature is not finite and positive.

    Example:
        >>> import math, torch
        >>> z_p, z_q = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.zeros(1, 2)  # at T = 2: (3/4, 1/4)
        >>> round(quantized_loss(z_p, z_q, temperature=2.0).item(), 4)  # -4 times 0.5623 nats
        -2.2493

    Source: Qian et al., "Adaptive Data-Free Quantization", CVPR 2023, arXiv 2303.06869.
    """
    _check_temperature(temperature)
    z_p, z_q = _logit_pair(z_p, z_q)
    return -(temperature**2) * _entropy((z_p - z_q) / temperature).mean()


def kl_divergence_loss(z_p: Tensor, z_q: Tensor, *, temperature: float) -> Tensor:
    r"""Distillation loss: the divergence of Q's softened prediction from P's.

    .. math::

        L_{KL} = \frac{T^2}{N} \sum_{n=1}^{N} \sum_{c=1}^{C} p_{nc} \ln \frac{p_{nc}}{q_{nc}}, \qquad
        p = \mathrm{softmax}(z_p / T), \quad q = \mathrm{softmax}(z_q / T)

    Args:
        z_p: Logits of P, the target, shape (N, C), N >= 1, C >= 2.
        z_q: Logits of Q, shape (N, C).
        temperature: T > 0, in the units of the logits.

    Returns:
        The mean over the batch, in nats times T squared, >= 0 up to rounding, a tensor of shape ().

    Raises:
        ValueError: A shape or a dtype does not fit, or the temperature is not finite and positive.

    Example:
        >>> import math, torch
        >>> z_p, z_q = torch.tensor([[2 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
        >>> round(kl_divergence_loss(z_p, z_q, temperature=2.0).item(), 4)  # 4 (3/4 ln(3/2) + 1/4 ln(1/2))
        0.5232

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
    """
    _check_temperature(temperature)
    z_p, z_q = _logit_pair(z_p, z_q)
    log_p, log_q = F.log_softmax(z_p / temperature, dim=1), F.log_softmax(z_q / temperature, dim=1)
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(dim=1).mean()


def feature_loss(features_p: Sequence[Tensor], features_q: Sequence[Tensor]) -> Tensor:
    r"""Distillation loss of intermediate activations: the noise of Q's in units of the signal of P's.

    .. math::

        L_{feat} = \frac{1}{L} \sum_{l=1}^{L} \frac{\operatorname{mean}\big((f_{p,l} - f_{q,l})^2\big)}
            {\operatorname{Var}(f_{p,l})}

    Mean and (biased) variance are over all elements of the layer, so layers weigh the same whatever their
    size and units. A layer whose activations of P are all the same has no signal and counts as zero.

    Args:
        features_p: One tensor of any shape for each of L >= 1 layers of P, the targets.
        features_q: The same layers of Q, in the same shapes.

    Returns:
        The mean over layers, without unit, >= 0, a tensor of shape ().

    Raises:
        ValueError: There is no layer, the sequences differ in length, or a shape or a dtype does not fit.

    Example:
        >>> import torch
        >>> feature_loss([torch.tensor([0.0, 2.0])], [torch.tensor([0.0, 1.0])])  # (1 / 2) / 1
        tensor(0.5000)

    Source: the hint loss of Romero et al., "FitNets", ICLR 2015, arXiv 1412.6550, equation 3, in units of
    each layer's variance.
    """
    if not len(features_p):
        raise ValueError("features_p must hold at least one layer; got none")
    if len(features_q) != len(features_p):
        raise ValueError(
            f"features_q must hold as many layers as features_p, {len(features_p)}; got {len(features_q)}"
        )
    losses = []
    for layer, (p, q) in enumerate(zip(features_p, features_q, strict=True)):
        where = f"features_p[{layer}]"
        p = _upcast(where, p)
        if not p.numel():
            raise ValueError(f"{where} must hold at least one element; got the shape {_shape(p)}")
        q = _like(f"features_q[{layer}]", q, where, p)
        signal = p.var(correction=0)
        flat = signal == 0
        losses.append((p - q).square().mean() / signal.masked_fill(flat, 1) * ~flat)
    return torch.stack(losses).mean()


def total_variation(images: Tensor) -> Tensor:
    r"""Mean absolute difference of vertical neighbours plus that of horizontal neighbours.

    .. math::

        TV = \frac{1}{N C (H - 1) W} \sum_{n,c,i,j} |x_{n,c,i+1,j} - x_{n,c,i,j}|
           + \frac{1}{N C H (W - 1)} \sum_{n,c,i,j} |x_{n,c,i,j+1} - x_{n,c,i,j}|

    Args:
        images: Images, shape (N, C, H, W), N, C >= 1 and H, W >= 2.

    Returns:
        The sum of both means in the units of the pixels, a tensor of shape ().

    Raises:
        ValueError: The shape or the dtype does not fit.

    Example:
        >>> import torch
        >>> total_variation(torch.tensor([[[[0.0, 1.0], [4.0, 5.0]]]]))  # 4 down, 1 to the right
        tensor(5.)

    Source: Rudin et al., "Nonlinear total variation based noise removal algorithms", Physica D, 1992; this is
    its anisotropic form, divided by the numbers of pairs.
    """
    images = _upcast("images", images)
    if images.ndim != 4 or not images.numel() or min(images.shape[2:]) < 2:
        raise ValueError(f"images must have the shape (N, C, H, W) with H, W >= 2; got {_shape(images)}")
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def top1_accuracy(logits: Tensor, labels: Tensor) -> float:
    r"""Share of samples whose largest logit is at the label.

    .. math::

        \frac{1}{N} \left| \{ n : \arg\max_c z_{nc} = y_n \} \right|

    A sample with a NaN among its logits counts as wrong.

    Args:
        logits: Logits, shape (N, C), N >= 1, C >= 2.
        labels: Class indices, an integer tensor of shape (N,).

    Returns:
        The accuracy, without unit, in [0, 1].

    Raises:
        ValueError: A shape or a dtype does not fit, or, for labels on the CPU, a class index is outside [0,
            C).

    Example:
        >>> import torch
        >>> top1_accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        0.75

    Source: the standard definition.
    """
    logits = _logits("logits", logits)
    _check_hard_labels("labels", labels, logits, soft=False)
    return float(_top1_equal(logits, labels).double().mean().item())


def top1_agreement(a: Tensor, b: Tensor) -> float:
    r"""Share of samples on which two networks predict the same class.

    .. math::

        \frac{1}{N} \left| \{ n : \arg\max_c a_{nc} = \arg\max_c b_{nc} \} \right|

    A sample with a NaN among the logits of either counts as disagreement.

    Args:
        a: Logits of one network, shape (N, C), N >= 1, C >= 2.
        b: Logits of the other, shape (N, C).

    Returns:
        The agreement, without unit, in [0, 1].

    Raises:
        ValueError: A shape or a dtype does not fit.

    Example:
        >>> import torch
        >>> top1_agreement(torch.eye(4), torch.eye(4)[[0, 1, 3, 2]])
        0.5

    Source: the standard definition.
    """
    a = _logits("a", a)
    b = _like("b", b, "a", a)
    equal = _top1_equal(a, b.argmax(dim=1)) & ~b.isnan().any(dim=1)
    return float(equal.double().mean().item())


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    r"""Signal-to-quantization-noise ratio over all elements.

    .. math::

        10 \log_{10} \frac{\sum_i r_i^2}{\sum_i (r_i - a_i)^2}

    Args:
        reference: What P computes, any shape with at least one element.
        approximation: What Q computes in its place, the same shape.

    Returns:
        The ratio in decibels: ``inf`` where both are equal, ``-inf`` where only the reference is zero.

    Raises:
        ValueError: A shape or a dtype does not fit.

    Example:
        >>> import torch
        >>> round(sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 4)  # 25 / 0.25
        20.0

    Source: the standard definition.
    """
    reference = _upcast("reference", reference)
    if not reference.numel():
        raise ValueError(f"reference must hold at least one element; got {_shape(reference)}")
    approximation = _like("approximation", approximation, "reference", reference)
    signal = float(torch.linalg.vector_norm(reference).item())
    noise = float(torch.linalg.vector_norm(reference - approximation).item())
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 20 * (math.log10(signal) - math.log10(noise))


def _entropy(logits: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    # The excess over ln C is rounding: a clamp would cut the gradient too, this takes it off the value only.
    excess = (entropy - math.log(logits.shape[1])).clamp(min=0).detach()
    return entropy - excess


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(logits, dim=1)
    if y.shape == logits.shape and y.is_floating_point():
        return -(_upcast("y", y) * log_p).sum(dim=1).mean()
    _check_hard_labels("y", y, logits, soft=True)
    return -log_p.gather(1, y.long().unsqueeze(1)).mean()


def _top1_equal(logits: Tensor, classes: Tensor) -> Tensor:
    # argmax takes a NaN for the maximum, so a network that computes nothing but NaN would score for class 0.
    return (logits.argmax(dim=1) == classes) & ~logits.isnan().any(dim=1)


def _check_hard_labels(name: str, labels: Tensor, logits: Tensor, *, soft: bool) -> None:
    samples, classes = logits.shape
    integral = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != (samples,) or not integral:
        other = f" or floating point of shape ({samples}, {classes})" if soft else ""
        raise ValueError(
            f"{name} must be integers of shape ({samples},){other}; "
            f"got {labels.dtype} of shape {_shape(labels)}"
        )
    # On a GPU this look would stall the stream; indexing checks the range there.
    if labels.device.type == "cpu" and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(f"{name} must be in [0, {classes}); got {int(labels.min())} to {int(labels.max())}")


def _check_weight(name: str, weight: float) -> None:
    if not (math.isfinite(weight) and weight >= 0):
        raise ValueError(f"{name} must be finite and not negative; got {weight}")


def _check_temperature(temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and positive; got {temperature}")


def _upcast(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {tensor.dtype}")
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


def _logits(name: str, logits: Tensor) -> Tensor:
    if logits.ndim != 2 or logits.shape[0] < 1 or logits.shape[1] < 2:
        raise ValueError(f"{name} must have the shape (N, C) with N >= 1 and C >= 2; got {_shape(logits)}")
    return _upcast(name, logits)


def _like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> Tensor:
    if tensor.shape != model.shape:
        raise ValueError(f"{name} must have the shape of {model_name}, {_shape(model)}; got {_shape(tensor)}")
    return _upcast(name, tensor)


def _logit_pair(z_p: Tensor, z_q: Tensor) -> tuple[Tensor, Tensor]:
    z_p = _logits("z_p", z_p)
    return z_p, _like("z_q", z_q, "z_p", z_p)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
