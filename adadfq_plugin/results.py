"""What a run leaves behind, and what an evaluation says."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from adadfq_plugin.config import Scheme, Settings
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.facts import Facts
from adadfq_plugin.history import History

__all__ = ["Evaluation", "Result"]


@dataclass
class Result:
    """What a run did, and how sure one may be of it.

    Args:
        method: name of the method.
        backend: name of the backend.
        settings: the method's settings.
        seed: what all randomness came from.
        facts: what was known of the images; ``facts.guesses`` was guessed.
        samples: the synthetic images.
        history: figures of every step.
        notes: what was decided and why.
        warnings: what the user should look at.
        seconds: time of each phase.
        information: normalised information H' of the samples (N,), 1 where P and Q agree.
        agreement: top-1 agreement of P and the fake-quantized Q on the samples, 0 to 1; of what Q converts to where
            ``fidelity`` is None.
        sqnr_db: signal to quantization noise of Q's logits on the samples, in decibels.
        fidelity: top-1 agreement of the fake-quantized Q and what it converts to, on the samples, 0 to 1; None where
            the prepared model quantizes nothing before it is converted (``prepare_fx``, ``prepare_pt2e``).
        macs: multiply-adds of one image.
        integer_macs: those that integer kernels do, after :func:`~adadfq_plugin.api.quantize`.
        prepared: the calibrated model, ready for conversion.
        scheme: bit widths, after :func:`~adadfq_plugin.api.quantize`.
        quantized: the converted model, after :func:`~adadfq_plugin.api.quantize`.
    """

    method: str
    backend: str
    settings: Settings
    seed: int
    facts: Facts
    samples: SyntheticDataset
    history: History
    notes: list[str]
    warnings: list[str]
    seconds: dict[str, float]
    information: Tensor
    agreement: float
    sqnr_db: float
    fidelity: float | None
    macs: int
    prepared: nn.Module
    scheme: Scheme | None = None
    integer_macs: int | None = None
    quantized: nn.Module | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Evaluation:
    """Top-1 accuracy over labelled images: ``top1`` from 0 to 1, ``count`` images."""

    top1: float
    count: int
