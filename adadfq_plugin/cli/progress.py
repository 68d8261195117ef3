"""What is shown while a run goes on: bars on a terminal, else a line for each phase."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["Bars"]


class Bars:
    """A progress callback, ``bars(phase, step, total, figures)``, and the context in which it shows.

    Each phase has its bar and its own time left, from the speed of its last half minute; what later phases
    will take is not known before they run, and isn't guessed.

    Args:
        terminal: whether to draw; unset: whether stderr is a terminal.
    """

    def __init__(self, terminal: bool | None = None) -> None:
        drawn = sys.stderr.isatty() if terminal is None else terminal
        self._bars = _bars() if drawn else None
        self._tasks: dict[str, TaskID] = {}
        self._phase = ""
        self._count = ""
        self._began = self._last = time.perf_counter()

    def __enter__(self) -> Bars:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
        elif kind is None:
            self._end_phase()

    def __call__(self, phase: str, step: int, total: int, figures: Mapping[str, float]) -> None:
        """Shows one step; step 0 announces a phase that is still to come."""
        if self._bars is not None:
            if phase not in self._tasks:
                self._tasks[phase] = self._bars.add_task(phase, start=False, total=total, figures="")
            task = self._tasks[phase]
            if step:
                self._bars.start_task(task)
            shown = "  ".join(f"{name} {value:.4g}" for name, value in list(figures.items())[:3])
            self._bars.update(task, completed=step, total=total, figures=shown)
        else:
            if phase != self._phase:
                self._end_phase()
            if step:
                self._phase, self._count, self._last = phase, f"{step}/{total}", time.perf_counter()
            else:
                self._began = time.perf_counter()

    def _end_phase(self) -> None:
        """A phase takes the time from its announcement, or else from the end of the one before it, to its last step."""
        if self._phase:
            click.echo(f"{self._phase}: {self._count}, {self._last - self._began:.1f} s", err=True)
            self._began = self._last
        self._phase = ""


def _bars() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[figures]}", style="dim"),
        console=Console(stderr=True),
        expand=True,
    )
