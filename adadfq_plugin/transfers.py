"""Tensors on their way to a device and figures on their way back, while the device goes on with its work.

A copy between ordinary memory and a GPU waits for all that the GPU was asked before, and a training loop that waits
leaves it idle between steps. From and into pinned memory nothing waits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["Figures", "fetched", "sent"]

Figures = Mapping[str, float | Tensor]
"""Numbers by name: Python's, or tensors of one element, wherever they are."""


def sent(tensor: Tensor, to: Tensor | torch.device) -> Tensor:
    """A tensor of the CPU on another device, or on that of another tensor and of its type.

    Args:
        tensor: any.
        to: device, or tensor that it is to go with.

    Returns:
        the tensor itself where it is there already.

    Example:
        >>> sent(torch.zeros(2), torch.ones(1, dtype=torch.float64))
        tensor([0., 0.], dtype=torch.float64)
    """
    device = to.device if isinstance(to, Tensor) else to
    if isinstance(to, Tensor):
        tensor = tensor.to(to.dtype)
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fetched(figures: Figures) -> Callable[[], dict[str, float]]:
    """Starts to fetch figures.

    Args:
        figures: the tensors among them on one device.

    Returns:
        what waits for them, and for nothing that the device was asked since, and gives Python's numbers.

    Example:
        >>> fetched({"loss": torch.tensor(0.5), "step": 1})()
        {'loss': 0.5, 'step': 1.0}
    """
    tensors = {name: value.detach() for name, value in figures.items() if isinstance(value, Tensor)}
    numbers = dict(figures)
    if not tensors:
        return lambda: {name: float(value) for name, value in numbers.items()}
    values = torch.stack([value.reshape(()) for value in tensors.values()])
    ready: torch.cuda.Event | None = None
    if values.is_cuda:
        there = torch.empty(len(values), dtype=values.dtype, pin_memory=True)
        ready, values = torch.cuda.Event(), there.copy_(values, non_blocking=True)
        ready.record(torch.cuda.current_stream(next(iter(tensors.values())).device))

    def wait() -> dict[str, float]:
        if ready is not None:
            ready.synchronize()
        numbers.update(zip(tensors, values.tolist(), strict=True))
        return {name: float(value) for name, value in numbers.items()}

    return wait
