"""The samples that Q learns from: kept, renewed, and shown in changing views."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from adadfq_plugin.transfers import sent

__all__ = ["ReplayPool", "augment", "mixed"]

SMALLEST_VIEW = 0.6
"""Least share of an image's side that a view of it shows."""


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Views of images: each flipped or not, and a part of it, at a random place, at the size of the whole.

    Args:
        images: (N, C, H, W).
        rng: source of randomness, on the CPU.

    Returns:
        images of the same shape.
    """
    count = len(images)
    share = 1 - (1 - SMALLEST_VIEW) * torch.rand(count, generator=rng)
    flip = torch.where(torch.rand(count, generator=rng) < 0.5, -1.0, 1.0)
    place = (2 * torch.rand(count, 2, generator=rng) - 1) * (1 - share)[:, None]
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = share * flip, share, place
    grid = F.affine_grid(sent(theta, images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


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
    ratio = torch.rand(len(images), 1, 1, 1, generator=rng)
    others = images[sent(torch.randperm(len(images), generator=rng), images.device)]
    return torch.lerp(others, images, sent(ratio, images))


class ReplayPool:
    """Samples in the order of their age; beyond the capacity the oldest go.

    They stay where the first came from, in half precision, an eighth of a pixel's level at most: 256 large images take
    77 MB.

    Args:
        capacity: places.
        rng: source of randomness, on the CPU.
    """

    def __init__(self, capacity: int, rng: torch.Generator) -> None:
        self.capacity, self._rng = capacity, rng
        self._images = torch.empty(0)
        self._labels = torch.empty(0, dtype=torch.int64)
        self._added = 0

    def __len__(self) -> int:
        return min(self._added, self.capacity)

    def _places(self, first: int, last: int) -> Tensor:
        """Where the samples are that were added from the ``first`` to before the ``last``."""
        return torch.arange(first, last) % self.capacity

    def _aged(self) -> Tensor:
        """The places in the order of their samples' age, the oldest first."""
        return self._places(self._added - len(self), self._added)

    @property
    def images(self) -> Tensor:
        """A copy of all images (N, C, H, W), the oldest first."""
        return self._at(self._aged())[0]

    @property
    def labels(self) -> Tensor:
        """A copy of all labels (N,), the oldest first."""
        return self._at(self._aged())[1]

    def add(self, images: Tensor, labels: Tensor) -> None:
        """Keeps samples (N, C, H, W) with labels (N,)."""
        images, labels = images[-self.capacity :].detach(), labels[-self.capacity :].detach()
        if not self._added:
            self._images = images.new_empty(self.capacity, *images.shape[1:], dtype=torch.half)
            self._labels = labels.new_empty(self.capacity)
        places = sent(self._places(self._added, self._added + len(images)), self._images.device)
        self._images[places], self._labels[places] = images.half(), labels
        self._added += len(images)

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """The samples that were added last, in the order of their age."""
        return self._at(self._aged()[-count:])

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """A random batch of images and labels, without repetition; all there are where they are fewer."""
        order = torch.randperm(len(self), generator=self._rng)[:count]
        return self._at(self._aged()[order])

    def _at(self, places: Tensor) -> tuple[Tensor, Tensor]:
        places = sent(places, self._images.device)
        return self._images[places].float(), self._labels[places]
