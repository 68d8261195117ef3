"""Adaptive data-free quantization (Qian et al., CVPR 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adadfq_plugin.config import AdaDFQSettings
from adadfq_plugin.contracts import Outcome, Task
from adadfq_plugin.game.run import Run

__all__ = ["AdaDFQ"]

_PAPER: dict[str, Any] = {
    # 400 epochs of 200 steps of 16 images; every batch is new to Q and one step of G comes with each of Q
    "batch_size": 16,
    "generator_interval": 1,
    "generator_cooling": 1.0,
    "replay": False,
    "latent_dim": 100,
    "gamma": 1.0,
    "refine_steps": 0,
    "mixup": 0.0,
    "bn_units": "absolute",
    "generator_width": 128,
    "optimizer": "sgd",
    "weight_decay": 1e-4,
    "loss": "information",
    "feature_weight": 0.0,
    "schedule": "stages",
    "ranges": "minmax",
    "rounding": "nearest",
    "steady_means": False,
    "learn_step_sizes": False,
    "keep_best": False,
}


def _stages(idle: int, *epochs: int) -> tuple[float, ...]:
    """Where epochs of 400 lie in the steps of Q, who is idle in the first."""
    return tuple(round((epoch - idle) / (400 - idle), 4) for epoch in epochs)


class AdaDFQ:
    """Generator and quantized network play a zero-sum game between two boundaries."""

    name = "adadfq"
    summary = "adaptive generator between the disagreement and agreement boundaries (AdaDFQ)"
    settings = AdaDFQSettings
    presets: Mapping[str, Mapping[str, Any]] = {
        "paper_cifar": {
            **_PAPER,
            "steps": 396 * 200,
            "warmup_steps": 4 * 200,
            "learning_rate": 1e-4,
            "stages": _stages(4, 100, 200, 300),
            "temperature": 20.0,
        },
        "paper_resnet18": {
            **_PAPER,
            "steps": 350 * 200,
            "warmup_steps": 50 * 200,
            "learning_rate": 1e-5,
            "stages": _stages(50, 350),
            "temperature": 5.0,
        },
        "paper_mobilenetv2": {
            **_PAPER,
            "steps": 350 * 200,
            "warmup_steps": 50 * 200,
            "learning_rate": 1e-5,
            "stages": _stages(50, 350),
            "temperature": 5.0,
        },
        "paper_resnet50": {
            **_PAPER,
            "steps": 350 * 200,
            "warmup_steps": 50 * 200,
            "learning_rate": 1e-4,
            "stages": _stages(50, 150, 300),
            "temperature": 5.0,
        },
    }

    def calibrate(self, task: Task) -> Outcome:
        """Warm-up, ranges, game."""
        settings = task.settings
        assert isinstance(settings, AdaDFQSettings)
        run = Run(task, views=settings.replay)  # what is shown once needs no views
        player = run.player()
        run.warm_up(player)
        run.make_samples(player)
        run.observe()
        run.play(player)
        return run.outcome(self.name)
