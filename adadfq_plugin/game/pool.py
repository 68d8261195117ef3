"""The samples that Q learns from: kept, renewed, and shown with small changes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ReplayPool", "augment"]


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Flips half of the batches and shifts each by up to a tenth of the image, wrapped around.

    Args:
        images: (N, C, H, W).
        rng: source of randomness, on the CPU.

    Returns:
        images of the same shape.
    """
    if torch.rand((), generator=rng) < 0.5:
        images = images.flip(3)
    reach = max(1, images.shape[3] // 10)
    down, right = torch.randint(-reach, reach + 1, (2,), generator=rng).tolist()
    return images.roll((down, right), (2, 3))


class ReplayPool:
    """Samples in the order of their age; beyond the capacity the oldest go.

    Args:
        capacity: places.
        rng: source of randomness, on the CPU.
    """

    def __init__(self, capacity: int, rng: torch.Generator) -> None:
        self.capacity, self._rng = capacity, rng
        self.images = torch.empty(0)
        self.labels = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Keeps samples (N, C, H, W) with labels (N,)."""
        images, labels = images.detach().cpu(), labels.detach().cpu()
        if len(self):
            images, labels = torch.cat((self.images, images)), torch.cat((self.labels, labels))
        self.images, self.labels = images[-self.capacity :].clone(), labels[-self.capacity :].clone()

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """A random batch of images and labels, without repetition while there are enough."""
        order = torch.randperm(len(self), generator=self._rng)[:count]
        return self.images[order], self.labels[order]
