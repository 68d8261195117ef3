"""What happened in a run: one row a step, by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["History"]


@dataclass
class History:
    """Rows of figures, one a recorded step.

    Args:
        rows: each with ``phase``, ``step`` (from 1) and the figures of that step.

    Example:
        >>> history = History()
        >>> history.record("warmup", 1, {"bns": 2.0})
        >>> history.record("warmup", 2, {"bns": 1.5})
        >>> history.column("warmup", "bns")
        ([1, 2], [2.0, 1.5])
        >>> history.phases()
        ('warmup',)
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def record(self, phase: str, step: int, figures: Mapping[str, float]) -> None:
        """Appends one row."""
        self.rows.append({"phase": phase, "step": step, **figures})

    def phases(self) -> tuple[str, ...]:
        """The phases in the order in which they ran."""
        return tuple(dict.fromkeys(row["phase"] for row in self.rows))

    def figures(self, phase: str) -> tuple[str, ...]:
        """The names of the figures that a phase recorded."""
        names = (name for row in self.rows if row["phase"] == phase for name in row)
        return tuple(name for name in dict.fromkeys(names) if name not in ("phase", "step"))

    def column(self, phase: str, figure: str) -> tuple[list[int], list[float]]:
        """Steps and values of one figure in one phase."""
        rows = [row for row in self.rows if row["phase"] == phase and figure in row]
        return [row["step"] for row in rows], [float(row[figure]) for row in rows]
