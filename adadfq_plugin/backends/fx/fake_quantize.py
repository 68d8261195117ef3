"""The learned fake quantizer in torch.ao's own interface."""

from __future__ import annotations

from torch.ao.quantization.fake_quantize import FakeQuantizeBase

from adadfq_plugin.fake_quantize import LearnedQuantizer

__all__ = ["LearnedFakeQuantize"]


class LearnedFakeQuantize(LearnedQuantizer, FakeQuantizeBase):  # type: ignore[misc]
    """A :class:`~adadfq_plugin.fake_quantize.LearnedQuantizer` that torch.ao takes for one of its own.

    torch.ao's toggles work on it, ``prepare_*`` accepts it in a QConfig and ``convert_fx`` reads its
    ``calculate_qparams``.
    """
