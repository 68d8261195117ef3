"""A calibration method of a third party: activation ranges from images of uniform noise."""

from collections.abc import Mapping
from typing import Any

import torch

from adadfq_plugin.config import Settings
from adadfq_plugin.contracts import Outcome, Phase, Progress, Task
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.teacher import Teacher


class UniformNoise:
    """Every pixel is drawn uniformly from its valid range; nothing is trained."""

    name = "uniform_noise"
    summary = "ranges from images of uniform noise, nothing is trained"
    settings: type[Settings] = Settings
    presets: Mapping[str, Mapping[str, Any]] = {"quick": {"range_samples": 16}}

    def synthesize(
        self, teacher: Teacher, settings: Settings, count: int, *, seed: int, progress: Progress
    ) -> SyntheticDataset:
        """Images of noise, labelled by the teacher."""
        pixels = torch.rand(count, *teacher.facts.input_size, generator=torch.Generator().manual_seed(seed))
        images = teacher.facts.normalize(pixels)
        with torch.no_grad():
            labels = teacher(images).argmax(dim=1)
        progress("synthesize", 1, 1, {})
        return SyntheticDataset(images, labels, teacher.facts, {"method": self.name, "seed": seed})

    def calibrate(self, task: Task) -> Outcome:
        """Shows the images to the observers."""
        count = task.settings.range_samples
        samples = self.synthesize(task.teacher, task.settings, count, seed=task.seed, progress=task.progress)
        with task.prepared.phase(Phase.OBSERVE), torch.no_grad():
            task.prepared.module(samples.images())
        task.prepared.set_ranges()
        return Outcome(samples, notes=[f"ranges seen on {count} images of uniform noise"])
