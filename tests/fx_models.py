"""Networks, mappings and looks at levels that the tests of the FX backend share."""

from __future__ import annotations

import copy
from typing import Any, cast

import models
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver
from torch.ao.quantization.quantize_fx import convert_fx

from adadfq_plugin.backends.fx import FXBackend

EXAMPLE = (torch.zeros(2, *models.SIZE),)


def users_mapping(bits: int, observers: bool = False) -> QConfigMapping:
    """A user's own QConfig with torch.ao's classes."""
    act = {
        "quant_min": 0,
        "quant_max": 2**bits - 1,
        "dtype": torch.quint8,
        "qscheme": torch.per_tensor_affine,
    }
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    weight = {
        "quant_min": low, "quant_max": high, "dtype": torch.qint8, "qscheme": torch.per_channel_symmetric
    }  # fmt: skip
    if observers:
        pair = MinMaxObserver.with_args(**act), PerChannelMinMaxObserver.with_args(**weight)
    else:
        pair = (
            FakeQuantize.with_args(observer=MinMaxObserver, **act),
            FakeQuantize.with_args(observer=PerChannelMinMaxObserver, **weight),
        )
    return QConfigMapping().set_global(QConfig(*pair))


def levels_of_weights(converted: nn.Module) -> set[tuple[int, int]]:
    """The least and the largest level of each integer layer's weight."""
    layers: list[Any] = [each for each in converted.modules() if callable(getattr(each, "weight", None))]
    levels: list[Tensor] = [layer.weight().int_repr() for layer in layers]
    return {(int(each.min()), int(each.max())) for each in levels}


class Functional(nn.Module):
    """Layers without modules: one weight read twice, and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8, 3, 3) / 8), nn.Parameter(torch.randn(8) / 8)
        self.computed, self.head = nn.Parameter(torch.randn(8, 8, 1, 1)), nn.Parameter(torch.randn(10, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.relu(F.conv2d(x, self.weight, self.bias, padding=1))
        x = F.conv2d(x, self.weight, bias=self.bias, padding="same")
        x = F.conv2d(x, self.computed - self.computed.mean(), None, (1, 1), (0, 0), (1, 1), 1)
        return F.linear(x.mean((2, 3)), self.head)


def fake_and_converted(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits at W8A8 of the calibrated model and of what the user's own convert makes of it."""
    prepared = models.prepared(8, model)
    opened = FXBackend().open(prepared)
    batch = models.images(64)
    models.observed(opened, batch)
    opened.commit()
    with torch.no_grad():
        fake, converted = prepared.eval()(batch), convert_fx(copy.deepcopy(prepared))(batch)
    return fake, converted


class Inverted(nn.Module):
    """Convolutions with activations of their own bounds behind them."""

    def __init__(self, activation: nn.Module, shared: bool = False) -> None:
        super().__init__()
        self.expand, self.project = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.activation, self.shared, self.fc = activation, shared, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.expand(x)
        y = self.project(self.activation(inner))
        return cast(Tensor, self.fc((y + inner if self.shared else y).mean((2, 3))))


def headed(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, models.CLASSES)).eval()
