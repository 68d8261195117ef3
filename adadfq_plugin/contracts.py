"""One page of types: what methods, backends and the API promise each other.

The three parties of the game: the teacher ``P`` (full precision), the prepared network ``Q`` (fake
quantized) and the generator ``G``. A :class:`Backend` opens the user's prepared model as a private
:class:`Prepared` copy; a :class:`Method` works on a :class:`Task` and returns an :class:`Outcome`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from adadfq_plugin.config import Scheme, Settings
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.history import History
from adadfq_plugin.teacher import Teacher

__all__ = ["Backend", "Method", "Outcome", "Phase", "Prepared", "Progress", "Task"]

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Called as ``progress(phase, step, total, figures)`` after every step, on CUDA once the next one has begun;
``step`` counts from 1."""


class Phase(enum.Enum):
    """What a forward pass through the prepared network does."""

    FLOAT = "float"
    """Nothing is quantized and nothing observed."""
    OBSERVE = "observe"
    """Observers see the activations; nothing is quantized."""
    TRAIN = "train"
    """Fake quantization with gradients for weights, and for step sizes that require them; normalisation is frozen."""
    EVALUATE = "evaluate"
    """Fake quantization as the converted network computes it, ranges fixed; models of ``prepare_fx`` stay in float."""


@runtime_checkable
class Prepared(Protocol):
    """A private copy of the user's prepared model; the user's own is touched by ``commit`` alone."""

    trainable: bool
    """False for models that only observe (``prepare_fx``): nothing is trained."""
    lowest_bits: int
    """Narrowest weight or activation that was asked for, in bits."""
    notes: list[str]
    """Sentences for the report: what the backend decided and why."""

    @property
    def module(self) -> nn.Module:
        """The private copy."""

    def phase(self, phase: Phase) -> AbstractContextManager[None]:
        """Switches observers and fake quantizers; restores them at the end of the ``with``."""

    def reference(self) -> Prepared:
        """A copy with the weights of now: in ``Phase.FLOAT``, what each activation is to become."""

    def activations(self) -> AbstractContextManager[Mapping[str, Tensor]]:
        """Hooks for the length of the ``with``: the quantized activations of the latest forward pass by name.

        The names are the same for the :meth:`reference`; the network's input is not among them.
        """

    def set_ranges(self, how: str = "mse") -> None:
        """Turns what OBSERVE has seen into scales and zero points, by least squared error or ``minmax``."""

    def weights(self) -> Sequence[nn.Parameter]:
        """The parameters of the network itself."""

    def weight_units(self) -> Sequence[Tensor]:
        """What a small change of each of ``weights`` is: the quantization step of its channel, broadcastable."""

    def steps(self) -> Sequence[nn.Parameter]:
        """The logarithms of the fake quantizers' step sizes; they require gradients once a method asks for them."""

    def float_model(self) -> nn.Module:
        """An unquantized copy with the same weights, for the teacher when none is given."""

    def commit(self) -> None:
        """Writes the calibrated state into the user's model, in place, ready for conversion."""

    def convert(self) -> nn.Module:
        """The integer network that the toolkit's own convert makes of the calibrated state."""


@runtime_checkable
class Backend(Protocol):
    """One toolkit: how it prepares, what its prepared models look like, how it converts."""

    name: str
    summary: str
    suffix: str
    """How the names of the files end that ``save`` writes."""

    def recognises(self, model: nn.Module) -> bool:
        """Whether ``model`` is this toolkit's, prepared or already converted."""

    def prepare(self, model: nn.Module, input_size: tuple[int, int, int], scheme: Scheme) -> nn.Module:
        """The toolkit's own prepare, on a copy of a float model made ready for it."""

    def open(self, prepared: nn.Module) -> Prepared:
        """A private copy of a prepared model; refuses what can't be calibrated."""

    def integer_macs(self, converted: nn.Module, example: Tensor) -> int:
        """Multiply-adds of one image that integer kernels do in a converted model; ``example`` is a batch of two."""

    def save(self, converted: nn.Module, example: Tensor, path: Path) -> None:
        """Writes a converted model that reloads without this package."""

    def load(self, path: Path) -> nn.Module:
        """Reads what ``save`` wrote."""


@dataclass(frozen=True)
class Task:
    """Everything a method is given."""

    teacher: Teacher
    prepared: Prepared
    settings: Settings
    seed: int
    device: torch.device
    progress: Progress
    minutes: float | None = None
    """Time limit; None for a run of fixed length, which alone is repeatable bit for bit, on a CPU."""


@dataclass
class Outcome:
    """Everything a method gives back; the prepared model itself has been calibrated in place."""

    samples: SyntheticDataset
    history: History = field(default_factory=History)
    notes: list[str] = field(default_factory=list)
    """Sentences for the report: what was decided and why."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Time of each phase."""
    warnings: list[str] = field(default_factory=list)
    """Sentences of which the user is warned: what did not go well."""


@runtime_checkable
class Method(Protocol):
    """A calibration method: makes samples and calibrates ``task.prepared`` with them."""

    name: str
    summary: str
    settings: type[Settings]
    presets: Mapping[str, Mapping[str, Any]]
    """Frozen settings by name, as changes to the defaults."""

    def calibrate(self, task: Task) -> Outcome:
        """Calibrates ``task.prepared`` without any real data."""
