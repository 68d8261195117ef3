"""Random images with structure of every scale, in place of synthetic ones: for networks whose weights are random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from networks import random_images

from adadfq_plugin.config import Settings
from adadfq_plugin.contracts import Outcome, Task
from adadfq_plugin.game.run import Run

__all__ = ["RandomImages"]


class RandomImages:
    """Ranges and training on random images; networks of random weights have nothing that others could imitate."""

    name = "random_images"
    summary = "random images with structure of every scale, for benchmarks of untrained networks"
    settings = Settings
    presets: Mapping[str, Mapping[str, Any]] = {}

    def calibrate(self, task: Task) -> Outcome:
        """Ranges and training, as for `noise`."""
        run = Run(task, views=False)
        size, count = task.teacher.facts.input_size, run.plan.batch_size
        run.fill(lambda: run.answered(random_images(count, size, run.rng)))
        run.observe()
        run.play()
        return run.outcome(self.name)
