"""Updates of either player, decided on the device that they happen on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["finite_step", "laid_out"]


def laid_out(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient in the order of its parameter's memory: fused optimisers walk through both and ask for no strides."""
    return (
        gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)
    )


def finite_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]
) -> Tensor:
    """One step of a fused optimiser; gradients that are not finite change neither a parameter nor its moments.

    The kernels that an overflow under mixed precision must not pass are told of it where they run: nothing waits for
    the device to say whether all is well.

    Args:
        optimizer: of these parameters, fused.
        parameters: in any order.
        gradients: in the same.

    Returns:
        1 where the step was left out, else 0, as a tensor of no dimension on the device.
    """
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = None if gradient is None else laid_out(gradient, parameter)
    norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
    left_out = ~norm.isfinite()
    told: Any = optimizer
    told.grad_scale, told.found_inf = None, left_out.float()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return left_out.long()
