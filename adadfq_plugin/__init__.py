"""Adaptive data-free quantization (Qian et al., CVPR 2023) as a calibration method for torch.ao and torchao.

prepared = prepare_qat_fx(model.train(), qconfig_mapping, example_inputs)
result = adadfq_plugin.calibrate(prepared)
quantized = convert_fx(prepared.eval())
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adadfq_plugin.api import (
        Evaluation,
        Result,
        calibrate,
        evaluate,
        prepare,
        quantize,
        synthesize,
    )
    from adadfq_plugin.backends.fx import qconfig_mapping, traceable
    from adadfq_plugin.config import AdaDFQSettings, GeneratorSettings, Scheme, Settings
    from adadfq_plugin.dataset import SyntheticDataset

__all__ = [
    "AdaDFQSettings",
    "Evaluation",
    "GeneratorSettings",
    "Result",
    "Scheme",
    "Settings",
    "SyntheticDataset",
    "calibrate",
    "evaluate",
    "prepare",
    "qconfig_mapping",
    "quantize",
    "synthesize",
    "traceable",
]

# where each public name lives; loaded when it is first asked for, so that the import costs nothing
_HOMES = {
    **dict.fromkeys(("AdaDFQSettings", "GeneratorSettings", "Scheme", "Settings"), "config"),
    **dict.fromkeys(("qconfig_mapping", "traceable"), "backends.fx"),
    "SyntheticDataset": "dataset",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
