r"""Which level a weight takes: rounding that makes up for its own errors, and what rounding does to means."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adadfq_plugin.functional._checks import shape_of, upcast

__all__ = ["compensated_weights", "rounding_shift"]

_BLOCK = 128
"""Columns after which the errors are carried over to all that follow."""
_DEAD = 1e-12
"""Mean square, relative to the largest, up to which an input counts as one that is always zero."""


@torch.no_grad()
def compensated_weights(
    weight: Tensor, step: Tensor, lower: Tensor, upper: Tensor, moments: Tensor, *, damping: float = 0.01
) -> Tensor:
    r"""Weights whose rounding changes the outputs least: each error is made up for by the weights still to be rounded.

    With the inputs' second moments :math:`M = \frac{1}{n} \sum_i x_i x_i^T`, the squared error of an output is

    .. math:: \frac{1}{n} \sum_i \big((w - \hat w)^T x_i\big)^2 = (w - \hat w)^T M (w - \hat w)

    One weight j after the other, from the largest input to the smallest, takes its nearest level :math:`\hat w_j`,
    and the others take the values of least error given that, F being those that are free still:

    .. math:: w_F \leftarrow w_F - \frac{w_j - \hat w_j}{[M_{F}^{-1}]_{jj}} [M_{F}^{-1}]_{F, j}

    Args:
        weight: w, shape (groups, outputs, K).
        step: Step size of each output, shape (groups, outputs); zero is a level.
        lower: What the smallest level of each output stands for, shape (groups, outputs).
        upper: Likewise the largest.
        moments: M of each group's inputs, shape (groups, K, K).
        damping: Share of the mean square of the inputs that is added to all of them, as if there was noise.

    Returns:
        What each weight was when its turn came, within the levels: the nearest levels of these are the result, and
        training may start from them. Shape and dtype of ``weight``.

    Raises:
        ValueError: Shapes that don't fit, or a damping that is not positive.

    Example:
        >>> import torch
        >>> w, together = torch.tensor([[[0.4, 0.4]]]), torch.tensor([[[1.0, 0.99], [0.99, 1.0]]])
        >>> one = torch.ones(1, 1)
        >>> compensated_weights(w, one, -8 * one, 7 * one, together).round()  # 0.8 in sum: 1, and not 0
        tensor([[[0., 1.]]])

    Source: Frantar et al., "GPTQ", ICLR 2023, arXiv 2210.17323, after Hassibi and Stork, "Second order derivatives for
    network pruning: Optimal Brain Surgeon", NIPS 1992.
    """
    groups, outputs, count = _checked(weight, step, lower, upper, moments, damping)
    w, s, low, high = weight.double(), step.double(), lower.double(), upper.double()
    size = moments.double().diagonal(dim1=1, dim2=2)
    mean = size.mean(1, keepdim=True)
    dead = (size <= _DEAD * size.amax(1, keepdim=True)).double() + (mean == 0)
    damped = moments.double() + torch.diag_embed(damping * mean + dead)
    order = size.argsort(dim=1, descending=True, stable=True)
    damped = damped.gather(1, order.unsqueeze(2).expand(-1, -1, count))
    damped = damped.gather(2, order.unsqueeze(1).expand(-1, count, -1))
    by_output = order.unsqueeze(2).expand(-1, -1, outputs)
    w = w.mT.gather(1, by_output)  # (groups, K, outputs): what is rounded at a time lies together
    # row j of this factor is the column j above, for the weights that are free when j is rounded
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    found = torch.empty_like(w)
    for start in range(0, count, _BLOCK):
        end = min(count, start + _BLOCK)
        errors = torch.empty(groups, end - start, outputs, dtype=w.dtype, device=w.device)
        for j in range(start, end):
            found[:, j] = w[:, j].clamp(low, high)
            error = (w[:, j] - (found[:, j] / s).round() * s) / factor[:, j, j].unsqueeze(1)
            errors[:, j - start] = error
            w[:, j + 1 : end] -= factor[:, j, j + 1 : end].unsqueeze(2) * error.unsqueeze(1)
        w[:, end:] -= factor[:, start:end, end:].mT @ errors
    back = order.argsort(1).unsqueeze(2).expand(-1, -1, outputs)
    return found.gather(1, back).mT.to(weight.dtype)


def rounding_shift(weight: Tensor, rounded: Tensor, means: Tensor) -> Tensor:
    r"""What rounding a layer's weight adds to the mean of its outputs.

    .. math:: \Delta_o = \sum_k (\hat w_{ok} - w_{ok}) \, \mu_{g(o), k}

    Args:
        weight: w, shape (outputs, inputs of a group, ...), the rest being the kernel's places; K weights an output.
        rounded: :math:`\hat w`, in the same shape.
        means: :math:`\mu`, the mean of what each weight is multiplied by, shape (groups, K), in the weights' order; the
            outputs fall into as many groups :math:`g(o)`, one after the other. At the edges of padded images the places
            of a kernel see zeros, each another number of them.

    Returns:
        The shifts in the outputs' unit, shape (outputs,).

    Raises:
        ValueError: Shapes that don't fit.

    Example:
        >>> import torch
        >>> rounding_shift(torch.tensor([[0.25, 1.25]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[8.0, 16.0]]))
        tensor([-6.])

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019,
    arXiv 1906.04721, equation 13.
    """
    if weight.ndim < 2 or weight.shape != rounded.shape:
        raise ValueError(
            f"weight and rounded must have one shape (outputs, inputs, ...); got {shape_of(weight)} and "
            f"{shape_of(rounded)}"
        )
    outputs, count = weight.flatten(1).shape
    if means.ndim != 2 or means.shape[1] != count or outputs % len(means):
        raise ValueError(
            f"means must have the shape (groups, {count}), groups of {outputs}; got {shape_of(means)}"
        )
    weight, rounded, means = (
        upcast(name, each) for name, each in (("weight", weight), ("rounded", rounded), ("means", means))
    )
    errors = (rounded - weight).reshape(len(means), -1, count)
    return (errors * means.unsqueeze(1)).sum(2).flatten()


def _checked(
    weight: Tensor, step: Tensor, lower: Tensor, upper: Tensor, moments: Tensor, damping: float
) -> tuple[int, int, int]:
    if weight.ndim != 3:
        raise ValueError(f"weight must have the shape (groups, outputs, K); got {shape_of(weight)}")
    groups, outputs, count = shape_of(weight)
    for name, each in {"step": step, "lower": lower, "upper": upper}.items():
        if each.shape != (groups, outputs):
            raise ValueError(f"{name} must have the shape {(groups, outputs)}; got {shape_of(each)}")
    if moments.shape != (groups, count, count):
        raise ValueError(f"moments must have the shape {(groups, count, count)}; got {shape_of(moments)}")
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"damping must be finite and positive; got {damping}")
    return groups, outputs, count
