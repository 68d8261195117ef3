"""Biases that take up what rounding does to the means of their layers' outputs while the weights are trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adadfq_plugin.contracts import Prepared
from adadfq_plugin.fake_quantize import LearnedQuantizer
from adadfq_plugin.functional import rounding_shift
from adadfq_plugin.game.layers import Call, Layer, Layers

__all__ = ["SteadyMeans"]


@dataclass(frozen=True)
class _Means:
    """A layer with a bias, and what its inputs are in the mean."""

    quantizer: LearnedQuantizer
    weight: nn.Parameter
    bias: nn.Parameter
    inputs: Tensor
    """The mean of what each weight of an output is multiplied by (groups, K)."""

    def shift(self) -> Tensor:
        """What rounding adds to the mean of each output (outputs,)."""
        return rounding_shift(self.weight, self.quantizer(self.weight), self.inputs)


class SteadyMeans:
    r"""Lets the means of the outputs move as the weights do, and not as their levels do.

    A weight that crosses the middle between two levels moves by a whole level, though training has hardly moved it.
    Where the layer's inputs have a mean, that moves the mean of an output, in MobileNets by more than it deviates; the
    next step takes it back, and so on. With :math:`\Delta_o` of :func:`~adadfq_plugin.functional.rounding_shift`, each
    update is followed by

    .. math:: b_o \leftarrow b_o - (\Delta_o^{new} - \Delta_o^{old})

    The shift of the beginning stays: it is the business of those who rounded the weights. All this is for the phases
    in which Q is quantized and observes nothing.

    Args:
        prepared: Q.
        images: (N, C, H, W) on the device, as Q sees them, that tell the inputs' means.

    Source: the bias correction of Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", ICCV 2019, arXiv 1906.04721, section 4.2, kept up during training; on weights that go to and fro, Nagel
    et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022, arXiv 2203.11086.
    """

    @torch.no_grad()
    def __init__(self, prepared: Prepared, images: Tensor) -> None:
        found: dict[nn.Parameter, tuple[Layer, list[Tensor]]] = {}

        def look(layer: Layer, call: Call) -> Tensor:
            bias = call.argument(2, "bias")
            if isinstance(bias, nn.Parameter) and bias.requires_grad and layer.by_output:
                first, calls = found.setdefault(bias, (layer, []))
                if layer.weight is first.weight:
                    calls.append(call.input_means())
            return call.result()

        with Layers(prepared.module, look).at_work():
            prepared.module(images)
        # all calls of a layer share its bias
        means = {bias: torch.stack(calls).mean(0) for bias, (_, calls) in found.items()}
        self._layers = [
            _Means(layer.quantizer, layer.weight, bias, means[bias])
            for bias, (layer, _) in found.items()
            if bool(means[bias].isfinite().all())
        ]
        self._shifts = [layer.shift() for layer in self._layers]

    @torch.no_grad()
    def follow(self) -> None:
        """After an update of the weights or of their step sizes."""
        for place, layer in enumerate(self._layers):
            shift = layer.shift()
            layer.bias.sub_(shift - self._shifts[place])
            self._shifts[place] = shift
