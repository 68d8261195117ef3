"""Which integer kernels run here, and what they can hold.

x86 kernels without VNNI multiply unsigned activations by signed weights in pairs and add the two products
in 16 bits, with saturation: full 8-bit operands overflow them.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from adadfq_plugin.errors import SettingsError

__all__ = ["best_engine", "has_vnni", "largest_activation", "using_engine"]

PAIRWISE = ("x86", "fbgemm", "onednn")
"""Engines whose kernels add pairs of products in 16 bits on CPUs without VNNI."""


def has_vnni() -> bool:
    """Whether this CPU adds 8-bit products in 32 bits (AVX-512 VNNI, AVX-VNNI)."""
    return bool(torch.cpu._is_vnni_supported())


def best_engine(supported: list[str] | None = None, machine: str | None = None) -> str:
    """The engine to prepare for on this machine.

    Args:
        supported: names that torch was built with; None: ask torch.
        machine: processor architecture; None: ask the platform.

    Example:
        >>> best_engine(["qnnpack", "onednn", "x86", "fbgemm"], "x86_64")
        'x86'
        >>> best_engine(["qnnpack", "onednn"], "aarch64")
        'qnnpack'
    """
    names = supported if supported is not None else list(torch.backends.quantized.supported_engines)
    arm = (machine or platform.machine()).lower() in ("aarch64", "arm64")
    for name in ("qnnpack", "onednn") if arm else ("x86", "fbgemm", "onednn", "qnnpack"):
        if name in names:
            return name
    raise SettingsError(f"this build of torch has no quantized engine (it lists: {', '.join(names) or 'none'})")


def largest_activation(engine: str, vnni: bool, *, smallest_weight: int, largest_weight: int) -> int:
    r"""The largest 8-bit activation level that the kernels of ``engine`` add up without overflow.

    Without VNNI two products have to fit 16 bits: :math:`2\,a\,|w| \le 32767`.

    Args:
        engine: name of the quantized engine.
        vnni: whether the CPU adds 8-bit products in 32 bits.
        smallest_weight: smallest level of the weights.
        largest_weight: largest level of the weights.

    Example:
        >>> largest_activation("x86", True, smallest_weight=-128, largest_weight=127)
        255
        >>> largest_activation("x86", False, smallest_weight=-128, largest_weight=127)
        127
        >>> largest_activation("fbgemm", False, smallest_weight=-8, largest_weight=7)
        255
        >>> largest_activation("qnnpack", False, smallest_weight=-128, largest_weight=127)
        255
    """
    if vnni or engine not in PAIRWISE:
        return 255
    return min(255, 32767 // (2 * max(abs(smallest_weight), abs(largest_weight))))


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
