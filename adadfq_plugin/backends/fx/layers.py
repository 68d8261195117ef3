"""Layers with weights that torch.ao quantizes, and what its classes are for each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.nn.functional as F
from torch import nn

__all__ = ["FUNCTIONS", "LAYERS", "WITH_BATCH_NORM", "WITH_RELU", "Layer"]


class Layer(NamedTuple):
    """The classes of a layer: with a ReLU behind it or without, in float or to train."""

    plain: Any
    trained: Any
    relu: Any
    trained_relu: Any


FUNCTIONS = {
    F.conv1d: Layer(nn.Conv1d, nnqat.Conv1d, nni.ConvReLU1d, nniqat.ConvReLU1d),
    F.conv2d: Layer(nn.Conv2d, nnqat.Conv2d, nni.ConvReLU2d, nniqat.ConvReLU2d),
    F.conv3d: Layer(nn.Conv3d, nnqat.Conv3d, nni.ConvReLU3d, nniqat.ConvReLU3d),
    F.linear: Layer(nn.Linear, nnqat.Linear, nni.LinearReLU, nniqat.LinearReLU),
}
"""By the function that computes it."""
LAYERS = {layer.plain: layer for layer in FUNCTIONS.values()}
"""By its class in float."""
WITH_BATCH_NORM = {
    nniqat.ConvBn1d: LAYERS[nn.Conv1d],
    nniqat.ConvBn2d: LAYERS[nn.Conv2d],
    nniqat.ConvBn3d: LAYERS[nn.Conv3d],
    nniqat.ConvBnReLU1d: LAYERS[nn.Conv1d],
    nniqat.ConvBnReLU2d: LAYERS[nn.Conv2d],
    nniqat.ConvBnReLU3d: LAYERS[nn.Conv3d],
    nniqat.LinearBn1d: LAYERS[nn.Linear],
}
"""By the class to train that still holds a BatchNorm."""
WITH_RELU = (
    *(layer.trained_relu for layer in LAYERS.values()),
    *(nniqat.ConvBnReLU1d, nniqat.ConvBnReLU2d, nniqat.ConvBnReLU3d),
)
"""Classes to train that end in a ReLU."""
