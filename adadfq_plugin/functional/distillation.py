r"""What Q minimises: its distance from P."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adadfq_plugin.functional._checks import check_temperature, entropy, like, logit_pair, shape_of, upcast

__all__ = ["feature_loss", "kl_divergence_loss", "quantized_loss"]

_FLAT_ULPS = 16
"""Deviations up to so many roundings of the mean are those of its computation."""


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
    check_temperature(temperature)
    z_p, z_q = logit_pair(z_p, z_q)
    return -(temperature**2) * entropy((z_p - z_q) / temperature).mean()


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
    check_temperature(temperature)
    z_p, z_q = logit_pair(z_p, z_q)
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
    errors, signals, means = [], [], []
    for layer, (p, q) in enumerate(zip(features_p, features_q, strict=True)):
        where = f"features_p[{layer}]"
        p = upcast(where, p)
        if not p.numel():
            raise ValueError(f"{where} must hold at least one element; got the shape {shape_of(p)}")
        q = like(f"features_q[{layer}]", q, where, p)
        if q.ndim == 4 and q.is_contiguous(memory_format=torch.channels_last):
            # mse_loss gives the gradient in the order of the shape; in another than q's all steps back are slower
            p, q = p.permute(0, 2, 3, 1), q.permute(0, 2, 3, 1)
        mean = p.mean()
        means.append(mean)
        signals.append(F.mse_loss(p, mean.expand_as(p)))  # a third of the time of torch.var
        errors.append(F.mse_loss(q, p))
    error, signal, mean = map(torch.stack, (errors, signals, means))
    flat = signal <= (_FLAT_ULPS * torch.finfo(signal.dtype).eps * mean).square()
    return (error / signal.masked_fill(flat, 1) * ~flat).mean()
