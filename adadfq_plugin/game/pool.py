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
    """A fixed number of places; new samples take the places of the oldest.

    Args:
        capacity: places.
        rng: source of randomness, on the CPU.
    """

    def __init__(self, capacity: int, rng: torch.Generator) -> None:
        self.capacity, self._rng, self._next = capacity, rng, 0
        self.images = torch.empty(0)
        self.labels = torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Keeps samples (N, C, H, W) with labels (N,); beyond the capacity the oldest go."""
        images, labels = images.detach().cpu(), labels.detach().cpu()
        free = self.capacity - len(self)
        if free > 0:
            fresh = images[:free]
            self.images = torch.cat((self.images, fresh)) if len(self) else fresh.clone()
            self.labels = torch.cat((self.labels, labels[:free]))
            images, labels = images[free:], labels[free:]
        if len(labels):
            places = (torch.arange(len(labels)) + self._next) % self.capacity
            self.images[places], self.labels[places] = images, labels
            self._next = int(places[-1] + 1) % self.capacity

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """A random batch of images and labels, without repetition while there are enough."""
        order = torch.randperm(len(self), generator=self._rng)[:count]
        return self.images[order], self.labels[order]
