"""The same generator without the game: what AdaDFQ is to be compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adadfq_plugin.config import GeneratorSettings
from adadfq_plugin.contracts import Outcome, Task
from adadfq_plugin.game.run import Run

__all__ = ["BNStats"]


class BNStats:
    """Samples with P's BatchNorm statistics; Q is not in the generator's loop."""

    name = "bn_stats"
    summary = "generator trained on BatchNorm statistics and labels, Q not in its loop (baseline)"
    settings = GeneratorSettings
    presets: Mapping[str, Mapping[str, Any]] = {}

    def calibrate(self, task: Task) -> Outcome:
        """Warm-up, ranges, training of Q on the samples."""
        run = Run(task)
        player = run.player()
        run.warm_up(player)
        run.make_samples(player)
        run.observe()
        run.play()
        return run.outcome(self.name)
