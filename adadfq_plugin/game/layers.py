"""Calls of quantized layers, taken over while a network runs: the same in modules, in torch.fx and in torch.export."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adadfq_plugin.captures import Arguments, short_name
from adadfq_plugin.fake_quantize import LearnedQuantizer

__all__ = ["Call", "Layer", "Layers"]

KERNELS = {"linear": 0, "conv1d": 1, "conv2d": 2}
"""Functions of layers, with the dimensions of their kernels."""
PLACES = 8192
"""Outputs whose inputs tell a layer's second moments."""
IN_MEMORY = 2**24
"""Values of a layer's inputs that are laid out at a time."""


@dataclass(frozen=True)
class Layer:
    """A layer whose weight has just been quantized."""

    quantizer: LearnedQuantizer
    weight: nn.Parameter
    quantized: weakref.ref[Tensor]
    """What became of the weight; an id alone may be somebody else's later."""

    @property
    def by_output(self) -> bool:
        """Whether each output has one step size."""
        return self.quantizer.channel_axis(self.weight.ndim) <= 0


class Layers(TorchFunctionMode):
    """Lets somebody do the work of a network's quantized layers.

    Args:
        network: a prepared network.
        work: what is called instead of a layer, with the layer, its function and the arguments.
    """

    def __init__(self, network: nn.Module, work: Callable[[Layer, Call], Tensor]) -> None:
        super().__init__()
        self._work = work
        self._found: dict[int, Layer] = {}
        self._quantizers = [module for module in network.modules() if isinstance(module, LearnedQuantizer)]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While calls are taken over."""
        with ExitStack() as hooks:
            for quantizer in self._quantizers:
                hooks.callback(quantizer.register_forward_hook(self._note).remove)
            hooks.enter_context(self)
            yield

    def _note(self, quantizer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not isinstance(inputs[0], nn.Parameter):
            return None
        assert isinstance(quantizer, LearnedQuantizer)
        if output is inputs[0]:  # unquantized, and layers in float may read the same parameter
            output = output.view_as(output)
        self._found[id(output)] = Layer(quantizer, inputs[0], weakref.ref(output))
        return output

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = short_name(func)
        if name in KERNELS:
            call = Call(func, name, args, kwargs or {})
            weight = call.argument(1, "weight")
            layer = self._found.get(id(weight))
            if layer is not None and layer.quantized() is weight:
                return self._work(layer, call)
        return func(*args, **(kwargs or {}))


@dataclass
class Call(Arguments):
    """A call of ``linear``, ``conv1d`` or ``conv2d``, of torch's functions or of ATen's operators."""

    function: Callable[..., Tensor]
    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def groups(self) -> int:
        """Parts that the channels fall into."""
        return int(self.argument(6, "groups", 1)) if KERNELS[self.name] else 1

    def result(self, weight: Tensor | None = None) -> Tensor:
        """What the call gives; with another weight where one is given."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if weight is None:
            pass
        elif len(args) > 1:
            args[1] = weight
        else:
            kwargs["weight"] = weight
        return self.function(*args, **kwargs)

    def spread(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """The deviation and the mean of each output channel."""
        channels = 1 if KERNELS[self.name] and output.ndim == KERNELS[self.name] + 2 else output.ndim - 1
        return torch.std_mean(output, [dim for dim in range(output.ndim) if dim != channels], correction=0)

    def input_means(self) -> Tensor:
        """The mean of what each weight of an output is multiplied by (groups, K)."""
        x: Tensor = self.argument(0, "input")
        if not KERNELS[self.name]:
            return x.reshape(-1, x.shape[-1]).mean(0, keepdim=True)
        mean = x.reshape(-1, *x.shape[-KERNELS[self.name] - 1 :]).mean(0, keepdim=True)
        columns, kernel, dilation, stride = self._laid_out(mean)
        return F.unfold(columns, kernel, dilation, 0, stride).mean(2).view(self.groups, -1)

    def inputs(self, rng: torch.Generator) -> Iterator[Tensor]:
        """What outputs at random places are products of, piece by piece: (groups, places, K)."""
        x = self.argument(0, "input")
        if not KERNELS[self.name]:
            rows = x.reshape(-1, x.shape[-1])
            yield rows[torch.randperm(len(rows), generator=rng)[:PLACES].to(x.device)].unsqueeze(0)
            return
        x, kernel, dilation, stride = self._laid_out(x)
        places = max(1, PLACES // len(x))
        for piece in x.split(max(1, IN_MEMORY // (x[0].numel() * kernel[0] * kernel[1]))):
            columns = F.unfold(piece, kernel, dilation, 0, stride)
            chosen = torch.randperm(columns.shape[2], generator=rng)[:places].to(x.device)
            columns = columns[:, :, chosen].unflatten(1, (self.groups, -1))
            yield columns.permute(1, 0, 3, 2).flatten(1, 2)

    def _laid_out(self, x: Tensor) -> tuple[Tensor, tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Padded images of two dimensions (N, C, H, W), and the convolution's kernel, dilation and stride."""
        weight: Tensor = self.argument(1, "weight")
        kernel = (1, weight.shape[2]) if KERNELS[self.name] == 1 else (weight.shape[2], weight.shape[3])
        stride, dilation = (self._pair(*each) for each in ((3, "stride", 1), (5, "dilation", 1)))
        sides = self._padding(kernel, dilation)
        x = x.unsqueeze(-2) if KERNELS[self.name] == 1 else x
        return F.pad(x, sides) if any(sides) else x, kernel, dilation, stride

    def _pair(self, place: int, name: str, default: int) -> tuple[int, int]:
        value = self.argument(place, name, default)
        value = (value,) if isinstance(value, int) else tuple(value)
        if KERNELS[self.name] == 1:
            return (default, value[0])
        return (value[0], value[-1])

    def _padding(self, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, int, int, int]:
        """Left, right, top and bottom."""
        value = self.argument(4, "padding", 0)
        if isinstance(value, str):
            total = [d * (k - 1) if value == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
            return (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2)
        high, wide = (
            (0, self._pair(4, "padding", 0)[1]) if KERNELS[self.name] == 1 else self._pair(4, "padding", 0)
        )
        return (wide, wide, high, high)
