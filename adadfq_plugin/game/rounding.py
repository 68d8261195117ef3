"""The weights of Q before its training: rounded so that each layer's outputs, not its weights, change least."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adadfq_plugin.contracts import Phase, Prepared
from adadfq_plugin.functional import compensated_weights
from adadfq_plugin.game.layers import Call, Layer, Layers

__all__ = ["round_weights"]

WIDEST = 4608
"""Inputs of an output, 512 channels of 3x3: the inverse of more takes minutes."""
DAMPING = 0.01
"""Least share of the inputs' mean square that is added to it, as if there was noise."""
UPSTREAM = 0.1
"""How far a bias follows a shift of the layer's inputs, in deviations of the output: synthetic images lose what they
show sooner than photographs do, and the shift of a deep layer is theirs alone."""


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
        tell: called after each layer's call with the number so far and that of all calls.
        seconds: time after which no further layer is begun; None: no limit.

    Returns:
        How many layers were not reached in time.

    Source: the weights by :func:`~adadfq_plugin.functional.compensated_weights`; the biases after Nagel et al.,
    "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, arXiv 1906.04721, section 4.2,
    with the means measured and the inputs' part of them bounded.
    """
    asked: list[tuple[Tensor, Tensor]] = []
    """Of each call of the unquantized network: the means of the outputs, and the weight."""
    seen: set[nn.Parameter] = set()
    rounded: set[nn.Parameter] = set()
    late = calls = 0
    end = None if seconds is None else time.monotonic() + seconds

    def measure(layer: Layer, call: Call) -> Tensor:
        output = call.result()
        asked.append((call.spread(output)[1], layer.weight))
        return output

    def change(layer: Layer, call: Call) -> Tensor:
        nonlocal late, calls
        expected, old = asked[calls]
        calls += 1
        if layer.weight not in seen and _can_be_rounded(layer):
            seen.add(layer.weight)
            if end is not None and time.monotonic() > end:
                late += 1
            elif _round(layer, call, rng):
                rounded.add(layer.weight)
        bias = call.argument(2, "bias")
        if layer.weight in rounded and isinstance(bias, nn.Parameter) and bias not in seen:
            seen.add(bias)
            if bias.requires_grad:
                _correct(bias, layer, call, expected, old)
        tell(calls, len(asked))
        # another call of the layer has been given the weights of before
        return call.result(layer.quantizer(layer.weight)) if layer.weight in rounded else call.result()

    with reference.phase(Phase.FLOAT), Layers(reference.module, measure).at_work():
        reference.module(images)
    with prepared.phase(Phase.EVALUATE), Layers(prepared.module, change).at_work():
        prepared.module(images)
    return late


def _correct(bias: nn.Parameter, layer: Layer, call: Call, expected: Tensor, old: Tensor) -> None:
    """Takes back the shift of the means that rounding caused, and of the inputs' shift as much as is to be believed.

    Args:
        bias: of the layer (channels,).
        layer: with its new weights.
        call: of the layer, with quantized inputs.
        expected: means of the unquantized network (channels,).
        old: the weights before.
    """
    deviation, own = call.spread(call.result(old))
    most = UPSTREAM * deviation
    _, now = call.spread(call.result(layer.quantizer(layer.weight)))
    shift = own - now + torch.clamp(expected - own, -most, most)
    bias.add_(torch.where(shift.isfinite(), shift, 0))


def _damping(inputs: int, rows: int) -> float:
    """GPTQ's own where there are many times as many rows as inputs; few rows would be learned by heart."""
    return min(1.0, max(DAMPING, (inputs / rows) ** 2))


def _can_be_rounded(layer: Layer) -> bool:
    return layer.weight.requires_grad and layer.by_output and layer.weight[0].numel() <= WIDEST


def _round(layer: Layer, call: Call, rng: torch.Generator) -> bool:
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
    damping = _damping(grouped.shape[2], count)
    found = compensated_weights(grouped, step, lower, upper, moments / count, damping=damping)
    weight.copy_(found.reshape(weight.shape))
    return True
