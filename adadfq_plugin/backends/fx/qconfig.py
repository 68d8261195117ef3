"""QConfigs of the deployable protocol: affine activations per tensor, symmetric weights per channel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization import MinMaxObserver, QConfig, QConfigMapping, get_default_qat_qconfig_mapping

from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.fx.graphs import MEANS
from adadfq_plugin.backends.fx.kernels import best_engine
from adadfq_plugin.config import Scheme, scheme_of

__all__ = ["qconfig_mapping"]

TRANSPOSED = (
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
)


def qconfig_mapping(
    scheme: Scheme | Mapping[str, Any] | None = None, *, float_modules: Iterable[str] = ()
) -> QConfigMapping:
    """The mapping for ``prepare_qat_fx`` at the widths of a scheme.

    Operations with ranges of their own (sigmoid, softmax) keep torch.ao's fixed ones. Adaptive averages are taken
    in float, of quantized values, and quantized again. The input and the logits take ``boundary_bits`` when the
    model is calibrated.

    Args:
        scheme: widths and engine, as a scheme or by name; None: 8 bits.
        float_modules: names of modules that stay in float.

    Returns:
        a mapping that a user may extend before preparing.
    """
    scheme = scheme_of(scheme)
    engine = best_engine() if scheme.engine == "auto" else scheme.engine
    bits = scheme.weight_bits
    # qnnpack's per-channel kernels take no weight of -128
    lowest = -(2 ** (bits - 1)) + (1 if engine == "qnnpack" and bits == 8 else 0)
    factory: Any = LearnedFakeQuantize.with_args
    activation = factory(
        quant_min=0,
        quant_max=2**scheme.activation_bits - 1,
        dtype=torch.quint8,
        qscheme=torch.per_tensor_affine,
        boundary_max=2**scheme.boundary_bits - 1,
    )
    channels = {"dtype": torch.qint8, "qscheme": torch.per_channel_symmetric}
    weight = factory(quant_min=lowest, quant_max=2 ** (bits - 1) - 1, ch_axis=0, **channels)
    # torch.ao's transposed convolutions take no scale per channel
    transposed = factory(
        quant_min=lowest, quant_max=2 ** (bits - 1) - 1, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric
    )
    mapping = QConfigMapping().set_global(QConfig(activation=activation, weight=weight))
    for kind in TRANSPOSED:
        mapping.set_object_type(kind, QConfig(activation=activation, weight=transposed))
    mapping.set_object_type(
        nn.PReLU, QConfig(activation=activation, weight=MinMaxObserver.with_args(dtype=torch.quint8))
    )
    default = get_default_qat_qconfig_mapping(engine)
    for operation, qconfig in default.object_type_qconfigs.items():
        if qconfig is not None and _has_fixed_range(qconfig):
            mapping.set_object_type(operation, QConfig(activation=qconfig.activation, weight=weight))
    for average in MEANS:  # in vain where a layer reads one directly: see averages_in_float
        mapping.set_object_type(average, None)
    for name in float_modules:
        mapping.set_module_name(name, None)
    return mapping


def _has_fixed_range(qconfig: QConfig) -> bool:
    fixed = torch.ao.quantization.FixedQParamsFakeQuantize
    return isinstance(qconfig.activation(), fixed)
