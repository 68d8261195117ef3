"""The learned fake quantizer in torchao's own interface, and which of torchao's modules it stands in for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase, FixedQParamsFakeQuantize
from torchao.quantization.pt2e.observer import (
    AffineQuantizedObserverBase,
    FixedQParamsObserver,
    NoopObserver,
    ObserverBase,
    PlaceholderObserver,
    RecordingObserver,
)

from adadfq_plugin.fake_quantize import LearnedQuantizer

__all__ = ["LearnedFakeQuantize", "belongs_to", "is_quantizer", "replaceable"]

INTEGER = (torch.uint8, torch.int8, torch.quint8, torch.qint8)
UNSEEN = (FixedQParamsFakeQuantize, PlaceholderObserver, NoopObserver, RecordingObserver)
"""Modules whose range is no matter of what they see."""


class LearnedFakeQuantize(LearnedQuantizer, FakeQuantizeBase):  # type: ignore[misc]
    """A :class:`~adadfq_plugin.fake_quantize.LearnedQuantizer` that torchao takes for one of its own.

    torchao's toggles work on it, a ``QuantizationSpec`` takes its ``with_args``, and ``convert_pt2e`` reads its
    ``calculate_qparams``.
    """

    exact_scale: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.observer: nn.Module | None = None
        """The user's own observer (``prepare_pt2e``), which then decides the range."""
        self.register_buffer("exact_scale", None, persistent=False)

    @classmethod
    def around(cls, observer: nn.Module) -> LearnedFakeQuantize:
        """A fake quantizer whose range is what ``observer`` makes of the batches."""
        quantizer = cls.like(observer)
        if quantizer is not observer:
            quantizer.observer = observer
            if isinstance(observer, FixedQParamsObserver):
                quantizer.take()
        return quantizer

    def take(self) -> None:
        """Takes over the range of the user's observer."""
        assert self.observer is not None
        scale, zero_point = self.observer.calculate_qparams()  # type: ignore[operator]
        self._set(scale.reshape(-1), zero_point.reshape(-1))
        self.exact_scale = scale.reshape(-1).clone()

    def _fake_quantize(self, x: Tensor) -> Tensor:
        if self.exact_scale is None:
            return super()._fake_quantize(x)
        # a logarithm loses the last bit, and the largest weight of a min/max range lies on a tie
        scale, zero_point = (self.along(each, x.ndim) for each in (self.exact_scale, self.zero_point))
        quantized = (x * (1 / scale)).round_() + zero_point
        return quantized.clamp_(self.quant_min, self.quant_max).sub_(zero_point).mul_(scale)

    def _observe(self, x: Tensor) -> None:
        if self.observer is None:
            super()._observe(x)
        elif x.numel() > 0:
            self.observer(x)


def is_quantizer(module: nn.Module) -> bool:
    """Whether torchao takes the module for an observer or a fake quantizer."""
    return isinstance(module, ObserverBase | FakeQuantizeBase | AffineQuantizedObserverBase)


def replaceable(module: nn.Module) -> bool:
    """Whether the module quantizes to at most 8 bits with one range for all images, so that it can be learned."""
    if not is_quantizer(module) or isinstance(module, UNSEEN) or getattr(module, "is_dynamic", False):
        return False
    observer: Any = getattr(module, "activation_post_process", module)
    levels = [getattr(module, name, getattr(observer, name, None)) for name in ("quant_min", "quant_max")]
    scheme = isinstance(getattr(observer, "qscheme", None), torch.qscheme)
    return getattr(observer, "dtype", None) in INTEGER and None not in levels and scheme


def belongs_to(module: nn.Module, package: str) -> bool:
    """Whether the module's class, or a class it derives from, is one of a toolkit's quantizers.

    Args:
        module: any module.
        package: dotted name of the toolkit's package; it need not be installed.
    """
    return any(f"{base.__module__}.".startswith(f"{package}.") for base in type(module).__mro__)
