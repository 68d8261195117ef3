"""The samples that Q learns from: kept, renewed, and shown with small changes."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ReplayPool", "augment", "mixed"]


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


def mixed(images: Tensor, share: float, rng: torch.Generator) -> Tensor:
    r"""Sometimes mixes a batch in pairs: :math:`\lambda x_i + (1 - \lambda) x_j`, images between the classes.

    Args:
        images: (N, C, H, W).
        share: of the batches that are mixed, 0 to 1.
        rng: source of randomness, on the CPU.

    Returns:
        images of the same shape; what P says about them is their target.
    """
    if torch.rand((), generator=rng) >= share:
        return images
    ratio = torch.rand(len(images), 1, 1, 1, generator=rng).to(images)
    others = images[torch.randperm(len(images), generator=rng).to(images.device)]
    return torch.lerp(others, images, ratio)


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

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """The samples that were added last, in the order of their age."""
        return self.images[-count:], self.labels[-count:]

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """A random batch of images and labels, without repetition while there are enough."""
        order = torch.randperm(len(self), generator=self._rng)[:count]
        return self.images[order], self.labels[order]
