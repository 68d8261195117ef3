"""A calibration method of a third party: ranges from images of uniform noise."""

from collections.abc import Mapping
from typing import Any

import torch

from adadfq_plugin.config import Settings
from adadfq_plugin.contracts import Outcome, Phase, Task
from adadfq_plugin.dataset import SyntheticDataset


class UniformNoise:
    """Every pixel is drawn uniformly from its valid range; nothing is trained."""

    name = "uniform_noise"
    summary = "ranges from images of uniform noise, nothing is trained"
    settings = Settings
    presets: Mapping[str, Mapping[str, Any]] = {"quick": {"range_samples": 16}}

    def calibrate(self, task: Task) -> Outcome:
        """Shows the images to the observers."""
        facts, count = task.teacher.facts, task.settings.samples or task.settings.range_samples
        rng = torch.Generator().manual_seed(task.seed)
        pixels = torch.rand(count, *facts.input_size, generator=rng)
        images = facts.normalize(pixels).to(task.device)
        with torch.no_grad(), task.prepared.phase(Phase.OBSERVE):
            task.prepared.module(images)
            labels = task.teacher(images).argmax(dim=1)
        task.prepared.set_ranges(task.settings.ranges)
        task.progress("ranges", count, count, {})
        samples = SyntheticDataset(images, labels, facts, {"method": self.name, "seed": task.seed})
        return Outcome(samples, notes=[f"ranges seen on {count} images of uniform noise"])
