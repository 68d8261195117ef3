"""G: label-conditional generators, their cost in proportion to the image and not to the paper's GPU.

Both start from a small map and double it stage by stage while the channels are halved, so that every stage
costs about the same; the last layer is normalised per channel (as the networks' own inputs are) and held to
the values that an image of 8-bit pixels can have.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from adadfq_plugin.teacher import Facts

__all__ = ["ConditionalNormGenerator", "EmbeddingGenerator", "Generator", "make_generator"]

LARGE = 64
"""Image side from which conditional normalisation takes the place of the label embedding (the paper's choice)."""
SMALLEST_WIDTH = 16


def _start(side: int) -> tuple[int, int]:
    """Side of the first map (4 to 8) and the number of doublings that lead to ``side`` or just beyond.

    Example:
        >>> _start(32), _start(224), _start(28)
        ((4, 3), (7, 5), (7, 2))
    """
    stages = 0
    while side > 8 or (side > 4 and side % 2 == 0):
        side = -(-side // 2)
        stages += 1
    return side, stages


class Generator(nn.Module):
    """Latent vectors and labels to images in the teacher's normalised units.

    Args:
        facts: size, classes and valid pixel values of the teacher's input.
        latent_dim: length of the latent vector z.
        width: channels of the first stage.
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self, facts: Facts, latent_dim: int, width: int) -> None:
        super().__init__()
        channels, height, side = facts.input_size
        self.size = (height, side)
        self.latent_dim, self.num_classes = latent_dim, facts.num_classes
        start_height, self.stages = _start(max(height, side))
        start_side = start_height
        if height != side:  # keep the proportion, crop the rest
            start_height, start_side = (max(1, -(-extent // 2**self.stages)) for extent in (height, side))
        self.start = (width, start_height, start_side)
        widths = [max(SMALLEST_WIDTH, width // 2**stage) for stage in range(self.stages + 1)]
        self.stem = nn.Linear(self.stem_features(), width * start_height * start_side)
        self.norms = nn.ModuleList(self.norm(w) for w in widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.standardize = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)
        self.register_buffer("lowest", facts.normalize(torch.zeros(1, channels, 1, 1)), persistent=False)
        self.register_buffer("highest", facts.normalize(torch.ones(1, channels, 1, 1)), persistent=False)

    def stem_features(self) -> int:
        """Length of what :meth:`embed` returns."""
        return self.latent_dim

    def norm(self, width: int) -> nn.Module:
        """Normalisation of one stage."""
        return nn.BatchNorm2d(width, track_running_stats=False)

    def embed(self, z: Tensor, labels: Tensor) -> Tensor:
        """What the first layer sees."""
        raise NotImplementedError

    def normalize_stage(self, stage: int, x: Tensor, labels: Tensor) -> Tensor:
        """Normalised activations of one stage."""
        return cast(Tensor, self.norms[stage](x))

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Images of the given labels.

        Args:
            z: latent vectors (N, latent_dim), standard normal.
            labels: classes (N,), integers.

        Returns:
            images (N, channels, height, width), normalised as the teacher's input.
        """
        x = self.stem(self.embed(z, labels)).view(-1, *self.start)
        x = nn.functional.leaky_relu(self.normalize_stage(0, x, labels), 0.2)
        for stage, conv in enumerate(self.convs, start=1):
            x = nn.functional.interpolate(conv(x), scale_factor=2.0, mode="nearest")
            x = nn.functional.leaky_relu(self.normalize_stage(stage, x, labels), 0.2)
        x = self.standardize(self.to_image(x))[..., : self.size[0], : self.size[1]]
        return torch.minimum(torch.maximum(x, self.lowest), self.highest)

    def sample(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latent vectors and uniform labels, on the generator's device."""
        device = self.lowest.device
        z = torch.randn(count, self.latent_dim, generator=rng)
        labels = torch.randint(self.num_classes, (count,), generator=rng)
        return z.to(device), labels.to(device)


class EmbeddingGenerator(Generator):
    """For small images: the latent vector times an embedding of the label."""

    def __init__(self, facts: Facts, latent_dim: int, width: int) -> None:
        super().__init__(facts, latent_dim, width)
        self.embedding = nn.Embedding(facts.num_classes, latent_dim)

    def embed(self, z: Tensor, labels: Tensor) -> Tensor:
        return z * cast(Tensor, self.embedding(labels))


class ConditionalNormGenerator(Generator):
    """For large images: every stage's scale and shift belong to the label."""

    def __init__(self, facts: Facts, latent_dim: int, width: int) -> None:
        super().__init__(facts, latent_dim, width)
        widths = [cast(nn.BatchNorm2d, norm).num_features for norm in self.norms]
        self.scales = nn.ModuleList(nn.Embedding(facts.num_classes, w) for w in widths)
        self.shifts = nn.ModuleList(nn.Embedding(facts.num_classes, w) for w in widths)
        for scale, shift in zip(self.scales, self.shifts, strict=True):
            nn.init.normal_(cast(nn.Embedding, scale).weight, 1.0, 0.1)
            nn.init.normal_(cast(nn.Embedding, shift).weight, 0.0, 0.1)

    def norm(self, width: int) -> nn.Module:
        return nn.BatchNorm2d(width, affine=False, track_running_stats=False)

    def embed(self, z: Tensor, labels: Tensor) -> Tensor:
        return z

    def normalize_stage(self, stage: int, x: Tensor, labels: Tensor) -> Tensor:
        scale, shift = self.scales[stage](labels), self.shifts[stage](labels)
        normalized: Tensor = self.norms[stage](x)
        return torch.addcmul(shift[:, :, None, None], normalized, scale[:, :, None, None])


def make_generator(facts: Facts, latent_dim: int, width: int) -> Generator:
    """The generator that fits the image size.

    Example:
        >>> small = Facts(input_size=(3, 32, 32), num_classes=10)
        >>> make_generator(small, 16, 32)(torch.zeros(2, 16), torch.tensor([0, 1])).shape
        torch.Size([2, 3, 32, 32])
    """
    kind = EmbeddingGenerator if max(facts.input_size[1:]) <= LARGE else ConditionalNormGenerator
    return kind(facts, latent_dim, width)
