"""REAL images through the training of our own methods: the ceiling of any synthetic set, and no data-free method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import rulers
import torch
from pydantic import Field

from adadfq_plugin.config import Settings
from adadfq_plugin.contracts import Outcome, Task
from adadfq_plugin.errors import SettingsError
from adadfq_plugin.game.pace import KEPT_OUT
from adadfq_plugin.game.run import Run


class RealSettings(Settings):
    """As of every method; ``samples`` unset: all real images that there are, but for those kept from training."""

    network: str = Field("resnet20", description="network of the rulers whose real images are taken")


class RealImages:
    """Ranges and training as for `bn_stats`, on real images instead of G's; P's answers are the targets here too."""

    name = "real_images"
    summary = "REAL images in place of synthetic ones: a ceiling for benchmarks, not a method"
    settings = RealSettings
    presets: Mapping[str, Mapping[str, Any]] = {}

    def calibrate(self, task: Task) -> Outcome:
        settings = task.settings
        assert isinstance(settings, RealSettings)
        images, _ = rulers.images(settings.network)
        images = images[rulers.seen(settings.network, len(images))]
        kept_out = len(images) // KEPT_OUT
        samples = settings.samples or len(images) - kept_out
        if samples > len(images) - kept_out:
            raise SettingsError(f"samples = {samples}: there are {len(images) - kept_out} real images")
        run = Run(replace(task, settings=settings.model_copy(update={"samples": samples})))
        batches = iter(images[torch.randperm(len(images), generator=run.rng)].split(run.plan.batch_size))
        run.fill(lambda: run.answered(next(batches)))
        run.observe()
        run.play()
        return run.outcome(self.name)
