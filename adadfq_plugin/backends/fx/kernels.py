"""Which integer kernels run here, and what they can hold.

Some x86 kernels multiply unsigned activations by signed weights in pairs and add the two products in 16 bits,
with saturation, so that full 8-bit operands overflow. Measured on torch 2.14: without VNNI all of them do; with
VNNI fbgemm's kernels for grouped convolutions still do, and the x86 engine takes those beyond 100 groups.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adadfq_plugin.errors import SettingsError

__all__ = ["adds_in_16_bits", "best_engine", "has_vnni", "using_engine"]

GROUPS = {"x86": 100, "fbgemm": 1, "onednn": 1 << 30}
"""Groups up to which an engine's convolutions add in 32 bits where the CPU has VNNI."""


def has_vnni() -> bool:
    """Whether this CPU adds 8-bit products in 32 bits, as far as torch can tell: by AVX-512 VNNI."""
    return bool(torch.cpu._is_vnni_supported())


def best_engine(supported: list[str] | None = None, machine: str | None = None) -> str:
    """The fastest engine of this machine.

    On x86 that is oneDNN: on `tf_efficientnet_lite0` it took a fifth of the time of the engine x86 with VNNI, and a
    tenth with AVX2 alone; that one's depthwise kernels are fbgemm's.

    Args:
        supported: names that torch was built with; None: ask torch.
        machine: processor architecture; None: ask the platform.

    Raises:
        SettingsError: this build of torch has no quantized engine.

    Example:
        >>> best_engine(["qnnpack", "onednn", "x86", "fbgemm"], "x86_64")
        'onednn'
        >>> best_engine(["qnnpack", "onednn"], "aarch64")
        'qnnpack'
    """
    names = supported if supported is not None else list(torch.backends.quantized.supported_engines)
    if (machine or platform.machine()).lower() in ("aarch64", "arm64"):
        order: tuple[str, ...] = ("qnnpack", "onednn")
    else:
        order = ("onednn", "x86", "fbgemm", "qnnpack")
    for name in order:
        if name in names:
            return name
    raise SettingsError(
        f"this build of torch has no quantized engine (it lists: {', '.join(names) or 'none'})"
    )


def adds_in_16_bits(engine: str, vnni: bool, groups: int) -> bool:
    """Whether a layer's kernel adds pairs of products in 16 bits.

    Args:
        engine: name of the quantized engine.
        vnni: whether the CPU adds 8-bit products in 32 bits.
        groups: groups of the convolution, 1 for a linear layer.

    Example:
        >>> adds_in_16_bits("x86", True, 1), adds_in_16_bits("x86", True, 144), adds_in_16_bits("x86", False, 1)
        (False, True, True)
        >>> adds_in_16_bits("onednn", True, 144), adds_in_16_bits("qnnpack", False, 144)
        (False, False)
    """
    if engine not in GROUPS:
        return False
    return not vnni or groups > GROUPS[engine]


@contextmanager
def using_engine(name: str) -> Iterator[None]:
    """Makes ``name`` torch's quantized engine for the length of the ``with``."""
    before = torch.backends.quantized.engine
    supported = list(torch.backends.quantized.supported_engines)
    if name not in supported:
        raise SettingsError(f"engine {name!r} is not in this build of torch (it has: {', '.join(supported)})")
    torch.backends.quantized.engine = name
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
