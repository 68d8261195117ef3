"""Ranges of values as scales and zero points: of plain tensors, by their ends or by least squared error."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SMALLEST_STEP", "affine", "levels_that_fit", "search_range"]

IN_CACHE = 2**18
"""Values searched at a time: the weights of a large layer take nine times as long in one piece."""
CANDIDATES, SMALLEST_RATIO = 48, 0.15
"""Ranges tried in each search, down to this share of the widest."""
SMALLEST_STEP = torch.finfo(torch.float32).eps


def affine(lower: Tensor, upper: Tensor, low: int, high: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    r"""Scale and zero point of ranges that have zero in them, zero as a level of its own.

    .. math:: s = (u - l) / (q_h - q_l), \qquad z = q_l - \mathrm{round}(l / s)

    Args:
        lower: lower ends l, zero or below.
        upper: upper ends u, zero or above, of the same shape.
        low: smallest level.
        high: largest level.
        symmetric: zero point in the middle of the levels, and the step that reaches both ends from there.

    Returns:
        scale and zero point, in the shape of ``lower``.

    Example:
        >>> scale, zero = affine(torch.tensor([-1.0]), torch.tensor([2.0]), 0, 15, symmetric=False)
        >>> round(scale.item(), 3), zero.item()
        (0.2, 5.0)
    """
    if symmetric:
        middle = (low + high + 1) // 2
        reach = torch.maximum(-lower / (middle - low), upper / (high - middle))
        scale = reach.clamp_min(SMALLEST_STEP)
        return scale, torch.full_like(scale, float(middle))
    scale = ((upper - lower) / (high - low)).clamp_min(SMALLEST_STEP)
    return scale, (low - (lower / scale).round()).clamp(low, high)


def search_range(x: Tensor, low: int, high: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:
    r"""Scale and zero point of least squared error, by a search over clipped ranges.

    .. math:: \min_{s, z} \sum_i \bigl(s\,(\mathrm{clip}(\mathrm{round}(x_i/s) + z, l, h) - z) - x_i\bigr)^2

    The range of the values is shrunk on both sides together, then on each side alone.

    Args:
        x: values, one row a channel (rows, K).
        low: smallest level l.
        high: largest level h.
        symmetric: zero point in the middle of the levels.

    Returns:
        scale and zero point, each (rows,).

    Example:
        >>> scale, zero = search_range(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), 0, 3, symmetric=False)
        >>> scale.item(), zero.item()
        (1.0, 0.0)
    """
    pieces = x.float().split(max(1, IN_CACHE // x.shape[1]))
    found = [_search(rows, low, high, symmetric) for rows in pieces]
    scale, zero_point = map(torch.cat, zip(*found, strict=True))
    return scale, zero_point


def _search(x: Tensor, low: int, high: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    lower, upper = x.amin(1, keepdim=True).clamp_max(0), x.amax(1, keepdim=True).clamp_min(0)
    best_error = torch.full_like(lower, torch.inf)
    best_lower, best_upper = lower, upper
    two_sided = bool((lower < 0).any() and (upper > 0).any()) and not symmetric
    for side in ("both", "upper", "lower") if two_sided else ("both",):
        start_lower, start_upper = best_lower, best_upper
        for ratio in torch.linspace(1.0, SMALLEST_RATIO, CANDIDATES, device=x.device):
            to_lower = start_lower if side == "upper" else start_lower * ratio
            to_upper = start_upper if side == "lower" else start_upper * ratio
            error = (_levels(x, *affine(to_lower, to_upper, low, high, symmetric), low, high) - x).square()
            error = error.mean(1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_lower = torch.where(better, to_lower, best_lower)
            best_upper = torch.where(better, to_upper, best_upper)
    scale, zero_point = affine(best_lower, best_upper, low, high, symmetric)
    return scale.squeeze(1), zero_point.squeeze(1)


def _levels(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> Tensor:
    """What ``x`` (C, K) becomes at one scale and zero point a row."""
    return ((x / scale).round() + zero_point).clamp_(low, high).sub_(zero_point).mul_(scale)


def levels_that_fit(low: int, high: int, largest_activation: int) -> tuple[int, int]:
    r"""Levels of a weight of which two products fit 16 bits: :math:`2\,a\,|w| \le 32767`.

    Kernels of CPUs without VNNI add pairs of products in 16 bits, and overflow silently.

    Args:
        low: Lowest level of the weight.
        high: Highest level of the weight.
        largest_activation: Highest level a of the unsigned activations.

    Returns:
        ``low`` and ``high`` where they fit, else nearer ones.

    Example:
        >>> levels_that_fit(-128, 127, 255), levels_that_fit(-128, 127, 15)
        ((-64, 63), (-128, 127))
    """
    limit = 32767 // (2 * largest_activation)
    if max(-low, high) <= limit:
        return low, high
    return max(low, -limit), min(high, limit - 1)
