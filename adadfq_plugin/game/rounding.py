"""The weights of Q before its training: rounded so that each layer's outputs, not its weights, change least."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from adadfq_plugin.contracts import Phase, Prepared
from adadfq_plugin.fake_quantize import LearnedQuantizer
from adadfq_plugin.functional import compensated_weights
from adadfq_plugin.hooks import Arguments, short_name

__all__ = ["round_weights"]

KERNELS = {"linear": 0, "conv1d": 1, "conv2d": 2}
"""Functions that are rounded, with the dimensions of their kernels."""
PLACES = 8192
"""Outputs whose inputs tell a layer's second moments."""
WIDEST = 4608
"""Inputs of an output, 512 channels of 3x3: the inverse of more takes minutes."""
UPSTREAM = 0.1
"""How far a bias follows a shift of the layer's inputs, in deviations of the output: synthetic images lose what they
show sooner than photographs do, and the shift of a deep layer is theirs alone."""
IN_MEMORY = 2**24
"""Values of a layer's inputs that are laid out at a time."""


@dataclass(frozen=True)
class _Layer:
    """A call of a layer whose weight has just been quantized."""

    name: str
    """Of the weight's quantizer."""
    quantizer: LearnedQuantizer
    weight: nn.Parameter
    quantized: weakref.ref[Tensor]
    """What became of the weight; an id alone may be somebody else's later."""


class _Layers(TorchFunctionMode):
    """Lets somebody do the work of a network's quantized layers.

    Args:
        network: a prepared network.
        work: what is called instead of a layer, with the layer, its function and the arguments.
    """

    def __init__(self, network: nn.Module, work: Callable[[_Layer, _Call], Tensor]) -> None:
        super().__init__()
        self._work = work
        self._found: dict[int, _Layer] = {}
        self._quantizers = {
            module: name for name, module in network.named_modules() if isinstance(module, LearnedQuantizer)
        }

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While calls are taken over."""
        with ExitStack() as hooks:
            for quantizer in self._quantizers:
                hooks.callback(quantizer.register_forward_hook(self._note).remove)
            hooks.enter_context(self)
            yield

    def _note(self, quantizer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(inputs[0], nn.Parameter):
            assert isinstance(quantizer, LearnedQuantizer)
            name = self._quantizers[quantizer]
            self._found[id(output)] = _Layer(name, quantizer, inputs[0], weakref.ref(output))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = short_name(func)
        if name in KERNELS:
            call = _Call(func, name, args, kwargs or {})
            weight = call.argument(1, "weight")
            layer = self._found.get(id(weight))
            if layer is not None and layer.quantized() is weight:
                return self._work(layer, call)
        return func(*args, **(kwargs or {}))


@dataclass
class _Call(Arguments):
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

    def inputs(self, rng: torch.Generator) -> Iterator[Tensor]:
        """What outputs at random places are products of, piece by piece: (groups, places, K)."""
        x, weight = self.argument(0, "input"), self.argument(1, "weight")
        if not KERNELS[self.name]:
            rows = x.reshape(-1, x.shape[-1])
            yield rows[torch.randperm(len(rows), generator=rng)[:PLACES].to(x.device)].unsqueeze(0)
            return
        if KERNELS[self.name] == 1:
            x, weight = x.unsqueeze(-2), weight.unsqueeze(-2)
        kernel = tuple(weight.shape[2:])
        stride, dilation = (self._pair(*each) for each in ((3, "stride", 1), (5, "dilation", 1)))
        sides = self._padding(kernel, dilation)
        x = F.pad(x, sides) if any(sides) else x
        places = max(1, PLACES // len(x))
        for piece in x.split(max(1, IN_MEMORY // (x[0].numel() * kernel[0] * kernel[1]))):
            columns = F.unfold(piece, kernel, dilation, 0, stride)
            chosen = torch.randperm(columns.shape[2], generator=rng)[:places].to(x.device)
            columns = columns[:, :, chosen].unflatten(1, (self.groups, -1))
            yield columns.permute(1, 0, 3, 2).flatten(1, 2)

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


@torch.no_grad()
def round_weights(
    prepared: Prepared,
    reference: Prepared,
    images: Tensor,
    rng: torch.Generator,
    tell: Callable[[int, int], None],
    seconds: float | None = None,
) -> int:
    """Gives every quantized layer the weights whose rounding changes its outputs least, and its bias their mean.

    One layer after the other, in the order in which they run, so that each sees inputs that are quantized as they will
    be. Left alone are weights that the user has frozen, transposed and three-dimensional convolutions, layers of very
    many inputs, and those whose inputs aren't finite.

    Args:
        prepared: Q with its ranges set; its weights are changed in place.
        reference: Q as it was, unquantized.
        images: (N, C, H, W) on the device, N at least 1.
        rng: source of the places that are looked at.
        tell: called after each layer with the number so far and that of all layers.
        seconds: time after which no further layer is begun; None: no limit.

    Returns:
        How many layers were not reached in time.

    Source: the weights by :func:`~adadfq_plugin.functional.compensated_weights`; the biases after Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, arXiv 1906.04721, section 4.2,
    with the means measured and the inputs' part of them bounded.
    """
    expected: dict[str, Tensor] = {}
    seen: set[str] = set()
    rounded: set[nn.Parameter] = set()
    late = 0
    end = None if seconds is None else time.monotonic() + seconds

    def measure(layer: _Layer, call: _Call) -> Tensor:
        output = call.result()
        expected.setdefault(layer.name, call.spread(output)[1])
        return output

    def change(layer: _Layer, call: _Call) -> Tensor:
        nonlocal late
        first = layer.name not in seen and layer.weight not in rounded
        seen.add(layer.name)
        if first and layer.name in expected and _can_be_rounded(layer, call):
            if end is not None and time.monotonic() > end:
                late += 1
            else:
                unrounded = call.spread(call.result(layer.weight))
                if _round(layer, call, rng):
                    rounded.add(layer.weight)
                    _correct_bias(layer, call, expected[layer.name], unrounded)
        tell(min(len(seen), len(expected)), len(expected))
        # another call of the layer has been given the weights of before
        return call.result(layer.quantizer(layer.weight)) if layer.weight in rounded else call.result()

    with reference.phase(Phase.FLOAT), _Layers(reference.module, measure).at_work():
        reference.module(images)
    with prepared.phase(Phase.EVALUATE), _Layers(prepared.module, change).at_work():
        prepared.module(images)
    return late


def _correct_bias(layer: _Layer, call: _Call, expected: Tensor, unrounded: tuple[Tensor, Tensor]) -> None:
    """Takes back the shift of the means that rounding caused, and of the inputs' shift as much as is to be believed.

    Args:
        layer: with its new weights.
        call: of the layer, with quantized inputs.
        expected: means of the unquantized network (channels,).
        unrounded: deviations and means of what the old weights give for the quantized inputs, each (channels,).
    """
    bias = call.argument(2, "bias")
    if isinstance(bias, nn.Parameter) and bias.requires_grad:
        deviation, own = unrounded
        most = UPSTREAM * deviation
        _, now = call.spread(call.result(layer.quantizer(layer.weight)))
        shift = own - now + torch.clamp(expected - own, -most, most)
        bias.add_(torch.where(shift.isfinite(), shift, 0))


def _can_be_rounded(layer: _Layer, call: _Call) -> bool:
    weight, quantizer = layer.weight, layer.quantizer
    by_output = not quantizer.per_channel or quantizer.ch_axis == 0
    return weight.requires_grad and by_output and weight[0].numel() <= WIDEST


def _round(layer: _Layer, call: _Call, rng: torch.Generator) -> bool:
    """Whether the layer's inputs allowed it."""
    groups, weight = call.groups, layer.weight
    where = torch.device("cpu") if weight.device.type == "mps" else weight.device  # Metal has no float64
    moments, count = torch.zeros((), dtype=torch.float64, device=where), 0
    for rows in call.inputs(rng):
        moments = moments + (rows.mT @ rows).to(where).double()
        count += rows.shape[1]
    if not bool(moments.isfinite().all()):  # a mask, or an overflow: nothing is known of the inputs
        return False
    lower, upper = layer.quantizer.bounds()
    step, lower, upper = (
        each.expand(len(weight)).reshape(groups, -1).to(where)
        for each in (layer.quantizer.scale.detach(), lower, upper)
    )
    grouped = weight.detach().reshape(groups, len(weight) // groups, -1).to(where)
    found = compensated_weights(grouped, step, lower, upper, moments / count)
    weight.copy_(found.reshape(weight.shape))
    return True
