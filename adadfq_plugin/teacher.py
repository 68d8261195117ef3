"""P, the full-precision teacher: a frozen copy, its cost, and what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from adadfq_plugin.captures import capture_inputs
from adadfq_plugin.errors import ModelError
from adadfq_plugin.facts import Facts, device_of

__all__ = ["Teacher", "keeping_statistics", "make_teacher", "multiply_adds", "refuse_nan"]


@dataclass(frozen=True)
class Teacher:
    """The frozen network and its facts; ``model`` is a private copy in eval mode without gradients.

    Args:
        model: maps images (N, channels, height, width) to logits (N, C).
        facts: what is known of its images.
        macs: multiply-adds of one image.
        channels_last: whether images and weights are laid out channels last, which is faster for large images.
    """

    model: nn.Module
    facts: Facts
    macs: int = 0
    channels_last: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images.clone())  # some normalise their input in place
        return logits

    def noise(self, count: int) -> Tensor:
        """Images of noise (count, channels, height, width) that the network takes, the same at every call."""
        noise = torch.randn(count, *self.facts.input_size, generator=torch.Generator().manual_seed(0))
        return self.facts.from_standard(noise).to(device_of(self.model))

    @cached_property
    def batch_norms(self) -> dict[str, nn.Module]:
        """The BatchNorm layers that keep running statistics and take part in what the network answers, by name."""
        layers = keeping_statistics(self.model)
        with capture_inputs(layers) as seen, torch.no_grad():
            self(self.noise(2))
        return {name: layer for name, layer in layers.items() if name in seen}


def make_teacher(model: nn.Module, facts: Facts, *, device: torch.device | str = "cpu") -> Teacher:
    """A frozen private copy of ``model``; the original is not touched.

    Raises:
        ModelError: a weight or statistic that is NaN or infinite.
    """
    refuse_nan(model, buffers=True)
    with torch.no_grad():  # else what is copied of a ScriptModule has a history
        frozen = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    if facts.large and not any(map(_rules_out_channels_last, frozen.modules())):
        frozen.to(memory_format=torch.channels_last)
        with suppress(RuntimeError):  # x.view(len(x), -1) wants them first
            return Teacher(frozen, facts, multiply_adds(frozen, facts.input_size), channels_last=True)
        frozen.to(memory_format=torch.contiguous_format)
    return Teacher(frozen, facts, multiply_adds(frozen, facts.input_size))


def refuse_nan(model: nn.Module, *, buffers: bool = False) -> None:
    """Refuses weights, and statistics where asked for, that are not finite.

    Other buffers may be infinite, as masks and bounds are, but not NaN.

    Raises:
        ModelError: the first that isn't, by name.
    """
    for name, tensor in (*model.named_parameters(), *(model.named_buffers() if buffers else ())):
        bound = not isinstance(tensor, nn.Parameter) and not name.endswith(("running_mean", "running_var"))
        bad = tensor.isnan() if bound else ~tensor.isfinite()
        if tensor.is_floating_point() and bool(bad.any()):
            raise ModelError(f"{name!r} holds NaN or infinite values; load trained weights first")
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise ModelError(f"{name!r} holds a negative variance; load trained weights first")


def keeping_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm layers that keep running statistics, whether they take part or not, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


def _rules_out_channels_last(module: nn.Module) -> bool:
    """Whether torch 2.14 has no such layout for this module's weights, or its gradient for them ends the process.

    The second is a 1x1 convolution with a stride and fewer than 16 input channels: on x86 it writes beyond its memory.
    """
    if any(tensor.dim() > 4 for tensor in module.parameters(recurse=False)):
        return True
    if not isinstance(module, nn.Conv2d) or module.in_channels >= 16:
        return False
    return module.kernel_size == (1, 1) and max(module.stride) > 1


def multiply_adds(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-adds of convolutions, linear layers and matrix products for one image.

    Args:
        model: in eval mode; none of its parameters asks for a gradient if one is an argument of a call in it.
        input_size: (channels, height, width).

    Example:
        >>> multiply_adds(nn.Conv2d(3, 8, 3, padding=1), (3, 4, 4))
        3456
    """
    unfused = sdpa_kernel(SDPBackend.MATH)  # the counter knows nothing of fused attention
    with unfused, _plain_attention(), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(2, *input_size, device=device_of(model)))
    return int(counter.get_total_flops()) // 4  # two images, two operations each


@contextmanager
def _plain_attention() -> Iterator[None]:
    """``nn.MultiheadAttention`` by its own products instead of one kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
