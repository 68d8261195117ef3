"""The quantization that papers on data-free quantization report: a model that only exists fake-quantized.

What comes out of each ReLU takes x bits, affine per tensor; the weights of all layers, first and last included, x bits,
affine per output channel; BatchNorm stays in float and is not folded; images, sums, averages and logits stay in float.
Where this still differs from the published codes: the ranges are set once, before the training, and with
``learn_step_sizes`` their scales learn (zero points never do), where those take the weights' smallest and largest value
anew at each step; the statistics of BatchNorm are P's throughout.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.ao.nn.qat as nnqat
from torch import nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.backend_config import BackendConfig
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.observer import NoopObserver
from torch.ao.quantization.quantize_fx import prepare_qat_fx

from adadfq_plugin import Scheme
from adadfq_plugin.backends.fx import LearnedFakeQuantize

NETWORKS = ("resnet20", "resnet44")
QAT: dict[type[nn.Module], Any] = {nn.Conv2d: nnqat.Conv2d, nn.Linear: nnqat.Linear}


def prepare(model: nn.Module, input_size: tuple[int, int, int], scheme: Scheme) -> nn.Module:
    """A copy whose layers are quantization-aware by hand, so that prepare_qat_fx fuses and inserts nothing."""
    model = copy.deepcopy(model)
    half = 2 ** (scheme.weight_bits - 1)
    learned: Any = LearnedFakeQuantize.with_args
    channels = {"dtype": torch.qint8, "qscheme": torch.per_channel_affine, "ch_axis": 0}
    weight = learned(quant_min=-half, quant_max=half - 1, **channels)
    activation = learned(quant_min=0, quant_max=2**scheme.activation_bits - 1, dtype=torch.quint8)
    qconfig = QConfig(activation=NoopObserver, weight=weight)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) in QAT:
                child.qconfig = qconfig  # type: ignore[assignment]
                setattr(parent, name, QAT[type(child)].from_float(child))
            elif type(child) is nn.ReLU:
                setattr(parent, name, nn.Sequential(child, activation()))
    custom = PrepareCustomConfig().set_non_traceable_module_classes([LearnedFakeQuantize])
    example = (torch.zeros(2, *input_size),)
    nothing = BackendConfig("nothing is fused")
    return prepare_qat_fx(
        model.train(), QConfigMapping(), example, prepare_custom_config=custom, backend_config=nothing
    )
