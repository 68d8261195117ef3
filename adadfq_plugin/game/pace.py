"""How long each phase runs: a plan from the bit width and the network's cost, or the user's minutes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from adadfq_plugin.config import GeneratorSettings, Settings
from adadfq_plugin.errors import SettingsError
from adadfq_plugin.teacher import Teacher

__all__ = ["Pace", "Plan", "check_limit", "make_plan"]

BATCH, LARGE_BATCH = 32, 8
"""Images in a step of Q, up to 64 pixels and beyond: twice the steps of half the images teach more."""
GENERATED, LARGE_GENERATED = 64, 9
"""Images in a step of G, whose statistics are to be the network's; with 10 large ones, the whole command took
EfficientNet-Lite0 beyond 3 GiB."""
SAMPLES = 1024
"""Images kept, up to 64 pixels."""
LARGE_SAMPLES = {2: 128, 3: 128, 4: 128, 5: 128, 6: 64, 7: 64, 8: 64}
"""Images kept beyond 64 pixels, by the narrowest width: each takes two seconds, and weights of few bits need more."""
STEPS = {2: 3000, 3: 3000, 4: 1200, 5: 1000, 6: 500, 7: 240, 8: 160}
"""Training steps of Q by the narrowest width, for networks that are cheap to run; more did not help at 4 to 6 bits."""
WARMUP = {2: 300, 3: 300, 4: 300, 5: 240, 6: 200, 7: 160, 8: 120}
"""Steps of the generator before Q joins, likewise."""
CHEAP = 2e9
"""Multiply-adds of a batch's forward pass up to which a step of Q counts as cheap."""
REFINE = {2: 60, 3: 60, 4: 60, 5: 50, 6: 40, 7: 30, 8: 30}
"""Steps of each kept batch of images themselves."""
LEAST_STEPS, LEAST_WARMUP = 120, 40
LEAST_SAMPLES = 256
"""Images kept, of more, where a time limit is short: with fewer Q learns them by heart."""
LEAST_REFINE = 0.5
"""Share of its usual steps that each image has, before fewer of them are made."""
MOST = 3
"""Longest phases under a time limit, in lengths of a cheap network's: more steps have not helped."""
LENGTHS = {"warmup": "warmup_steps", "samples": "refine_steps", "game": "steps"}
"""The setting that tells each phase's length."""
SHARE = {"warmup": 0.15, "samples": 0.35, "game": 0.45}
"""What the phases take of the user's minutes, in proportion: those that don't run leave theirs to the others."""
REST = 0.05
"""Share of the user's minutes for the ranges and the report."""
ROUNDING = 0.1
"""Share of the user's minutes after which no further layer's weights are rounded; the game's, where there is one."""
KEPT_OUT = 8
"""Every how manieth image judges Q's states instead of teaching it: some of every way that images are made in."""
MEASURED = 3
"""Steps timed before a phase with a time limit knows its length."""


@dataclass(frozen=True)
class Plan:
    """Sizes and lengths of one run; every unset setting has become a number.

    Args:
        batch_size: images in a step of Q.
        generator_batch_size: images in a step of G.
        samples: images kept.
        warmup: steps of G alone.
        steps: steps of Q.
        refine: steps of each kept batch of images.
        minutes: the user's time limit, None for a run of fixed (repeatable) length.
        rest: share of the minutes that no phase gets.
        told: phases whose number of steps the user has set; the time limit leaves it alone.
        most: steps of each phase beyond which more time would not help.
        least: images kept where a time limit leaves no time for more.
    """

    batch_size: int
    generator_batch_size: int
    samples: int
    warmup: int
    steps: int
    refine: int = 0
    minutes: float | None = None
    rest: float = REST
    told: frozenset[str] = frozenset()
    most: Mapping[str, int] = field(default_factory=dict)
    least: int = 0

    def pace(self, phase: str, spent: float = 0.0) -> Pace:
        """The length of ``warmup``, of ``game``, or of one batch of ``samples``.

        Args:
            phase: its name.
            spent: seconds of its share of the user's minutes that are gone already.
        """
        lengths = {"warmup": self.warmup, "samples": self.refine, "game": self.steps}
        if self.minutes is None or phase in self.told or lengths[phase] == 0:
            return Pace(lengths[phase])
        running = sum(SHARE[each] for each, steps in lengths.items() if steps and each not in self.told)
        seconds = self.minutes * 60 * (1 - self.rest) * SHARE[phase] / running
        seconds /= self._batches if phase == "samples" else 1
        return Pace(lengths[phase], max(0.0, seconds - spent), self.most.get(phase, sys.maxsize))

    @property
    def _batches(self) -> int:
        """Batches that the generator makes until all images are kept, those that judge Q beside them."""
        return math.ceil(self.samples * KEPT_OUT / (KEPT_OUT - 1) / self.generator_batch_size)

    def fitting(self, step: float) -> Plan:
        """This plan with no more images than its time allows to refine: few good ones teach Q more than many raw ones.

        Args:
            step: seconds of a step on one batch, about.
        """
        seconds = self.pace("samples").seconds
        if seconds is None:
            return self
        batches = seconds * self._batches / (max(1e-9, step) * LEAST_REFINE * self.refine)
        fitting = int(batches * self.generator_batch_size * (KEPT_OUT - 1) / KEPT_OUT)
        return replace(self, samples=max(self.least, min(fitting, self.samples)))


def make_plan(
    settings: Settings, teacher: Teacher, bits: int, minutes: float | None = None, *, trains: bool = True
) -> Plan:
    """The plan for a network: what the settings leave open follows from its cost and the bits.

    Args:
        settings: the method's settings.
        teacher: the network with its facts and cost.
        bits: narrowest width, 2 to 8.
        minutes: time limit, or None.
        trains: whether Q can be trained.

    Raises:
        SettingsError: a time limit where all that is run has a number of steps that was set.
    """
    bits = min(max(bits, 2), 8)
    small = not teacher.facts.large
    batch, generator_batch = _batch_sizes(settings, small)
    warmup, refine, most = 0, 0, {"game": MOST * STEPS[bits]}
    slow = max(1.0, batch * teacher.macs / CHEAP)
    if isinstance(settings, GeneratorSettings):
        # without statistics images start from natural noise
        usual_warmup = WARMUP[bits] / (1 if teacher.batch_norms else 4)
        refine = REFINE[bits] // (1 if teacher.batch_norms else 2)
        warmup = max(LEAST_WARMUP, round(usual_warmup / slow))
        most |= {"warmup": max(LEAST_WARMUP, round(MOST * usual_warmup)), "samples": MOST * refine}
        if settings.warmup_steps is not None:
            warmup = settings.warmup_steps
        if settings.refine_steps is not None:
            refine = settings.refine_steps
    steps = settings.steps if settings.steps is not None else max(LEAST_STEPS, round(STEPS[bits] / slow))
    steps *= trains
    samples = settings.samples or (SAMPLES if small else LARGE_SAMPLES[bits])
    least = settings.samples or min(samples, LEAST_SAMPLES)
    told = frozenset(phase for phase, name in LENGTHS.items() if getattr(settings, name, None) is not None)
    check_limit(settings, minutes, trains=trains)
    apart = trains and settings.rounding == "compensated" and (steps == 0 or "game" in told)
    rest = REST + ROUNDING * apart
    return Plan(batch, generator_batch, samples, warmup, steps, refine, minutes, rest, told, most, least)


def check_limit(settings: Settings, minutes: float | None, *, trains: bool = True) -> None:
    """Refuses a time limit that nothing would heed.

    Args:
        settings: the method's settings.
        minutes: time limit, or None.
        trains: whether Q can be trained.

    Raises:
        SettingsError: all that is run has a number of steps that was set.
    """
    names = [
        name for phase, name in LENGTHS.items() if hasattr(settings, name) and (trains or phase != "game")
    ]
    run = [name for name in names if getattr(settings, name) != 0]
    if minutes is not None and run and all(getattr(settings, name) is not None for name in run):
        raise SettingsError(
            f"minutes = {minutes:g} has no say where {', '.join(sorted(run))} are set, by a preset or by hand: leave "
            "one of them unset, or leave out the minutes"
        )


def _batch_sizes(settings: Settings, small: bool) -> tuple[int, int]:
    """Images in a step of Q, and of G where there is one."""
    batch = settings.batch_size or (BATCH if small else LARGE_BATCH)
    if not isinstance(settings, GeneratorSettings):
        return batch, 0
    usual = GENERATED if small else LARGE_GENERATED
    if not getattr(settings, "replay", True):  # Q moves on what G has made
        both = settings.generator_batch_size or settings.batch_size or usual
        return both, both
    return batch, settings.generator_batch_size or min(settings.batch_size or usual, usual)


class Pace:
    """Counts the steps of a phase: a fixed number, or as many as fit into a time.

    Args:
        steps: number of steps when there is no time limit.
        seconds: time limit; the number of steps follows from the time of the first ones.
        most: steps at which a time limit's phase ends though there is time left.

    Example:
        >>> [(step, pace.total) for pace in [Pace(2)] for step in pace]
        [(1, 2), (2, 2)]
    """

    def __init__(self, steps: int, seconds: float | None = None, most: int = sys.maxsize) -> None:
        self.total, self.seconds, self.most, self.step = steps, seconds, most, 0
        self.enough = False
        """Whether the time would have allowed more steps than ``most``."""

    @property
    def fraction(self) -> float:
        """How much of the phase lies behind the current step, 0 at the first."""
        return min(1.0, (self.step - 1) / max(1, self.total))

    def __iter__(self) -> Iterator[int]:
        start = time.monotonic()
        while self.step < self.total or (self.seconds is not None and self.step < MEASURED):
            self.step += 1
            yield self.step
            if self.seconds is not None and self.step >= MEASURED:
                elapsed = max(1e-9, time.monotonic() - start)  # some clocks are coarse
                fitting = int(self.seconds * self.step / elapsed)
                self.enough = fitting > self.most
                self.total = max(self.step, min(fitting, self.most))
