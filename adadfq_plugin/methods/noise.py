"""Gaussian inputs: the floor under every other method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adadfq_plugin.config import Settings
from adadfq_plugin.contracts import Outcome, Task
from adadfq_plugin.game.run import Run

__all__ = ["Noise"]


class Noise:
    """Standard normal inputs in the network's normalised units, with P's own answers."""

    name = "noise"
    summary = "Gaussian noise in place of images (baseline)"
    settings = Settings
    presets: Mapping[str, Mapping[str, Any]] = {}

    @staticmethod
    def draw(count: int, size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        """Inputs (count, channels, height, width) on the CPU."""
        return torch.randn(count, *size, generator=generator)

    def calibrate(self, task: Task) -> Outcome:
        """Ranges, training of Q on noise."""
        run = Run(task, views=False)  # a view of noise is another, smoother noise
        run.notes.append(
            "noise goes beyond valid pixels: the samples, and the figures on them, have it clipped to these"
        )
        count, size = run.plan.batch_size, task.teacher.facts.input_size
        run.fill(lambda: run.answered(self.draw(count, size, run.rng)))
        run.observe()
        run.play()
        return run.outcome(self.name)
