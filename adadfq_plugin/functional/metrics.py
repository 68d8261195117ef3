r"""How near two networks are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adadfq_plugin.functional._checks import check_hard_labels, checked_logits, like, shape_of, upcast

__all__ = ["sqnr_db", "top1_accuracy", "top1_agreement"]


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
    logits = checked_logits("logits", logits)
    check_hard_labels("labels", labels, logits, soft=False)
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
    a = checked_logits("a", a)
    b = like("b", b, "a", a)
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
    reference = upcast("reference", reference)
    if not reference.numel():
        raise ValueError(f"reference must hold at least one element; got {shape_of(reference)}")
    approximation = like("approximation", approximation, "reference", reference)
    signal = float(torch.linalg.vector_norm(reference).item())
    noise = float(torch.linalg.vector_norm(reference - approximation).item())
    if noise == 0:
        return math.inf
    if signal == 0:
        return -math.inf
    return 20 * (math.log10(signal) - math.log10(noise))


def _top1_equal(logits: Tensor, classes: Tensor) -> Tensor:
    # argmax takes a NaN for the maximum, so a network that computes nothing but NaN would score for class 0.
    return (logits.argmax(dim=1) == classes) & ~logits.isnan().any(dim=1)
