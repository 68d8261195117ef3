"""G: a label-conditional generator whose cost is in proportion to the image.

It starts from a small map and doubles it stage by stage while the channels are halved, so that every stage
costs about the same, for images of 32 as of 224 pixels. The label enters twice: beside the latent vector, and
as scale and shift of every normalisation. (The published generator for small images multiplies the latent
vector by an embedding of the label: as the latent is symmetric, the sign of the embedding is lost and the
classes are learned slowly.) The last layer is normalised per channel, given the brightness and contrast of
photographs, and held to the values that an image of 8-bit pixels can have.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from adadfq_plugin.facts import Facts
from adadfq_plugin.transfers import sent

__all__ = ["Generator", "coloured", "natural_noise", "whitened"]

SMALLEST_WIDTH = 16
COLOUR = 0.9
"""Correlation of the channels of natural noise; that of photographs is about as large."""
SCENE = 2
"""Side of the scene that natural noise is cut from, in images: a whole one would meet itself at its edges."""


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


class _ConditionalNorm(nn.Module):
    """BatchNorm whose scale and shift belong to the label."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width, affine=False, track_running_stats=False)
        self.scale = nn.Embedding(num_classes, width)
        self.shift = nn.Embedding(num_classes, width)
        nn.init.normal_(self.scale.weight, 1.0, 0.1)
        nn.init.normal_(self.shift.weight, 0.0, 0.1)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        scale, shift = self.scale(labels)[:, :, None, None], self.shift(labels)[:, :, None, None]
        return torch.addcmul(shift, self.norm(x), scale)


class Generator(nn.Module):
    """Latent vectors and labels to images in the teacher's normalised units.

    Args:
        facts: size, classes and valid pixel values of the teacher's input.
        latent_dim: length of the latent vector z.
        width: channels of the first stage.

    Example:
        >>> generator = Generator(Facts((3, 32, 32), num_classes=10), latent_dim=16, width=32)
        >>> generator(torch.zeros(2, 16), torch.tensor([0, 1])).shape
        torch.Size([2, 3, 32, 32])
    """

    lowest: Tensor
    highest: Tensor

    def __init__(self, facts: Facts, latent_dim: int, width: int) -> None:
        super().__init__()
        channels, height, side = facts.input_size
        self.facts, self.size = facts, (height, side)
        self.latent_dim, self.num_classes = latent_dim, facts.num_classes
        _, stages = _start(max(height, side))
        start = (-(-height // 2**stages), -(-side // 2**stages))
        self.start = (width, *start)
        widths = [max(SMALLEST_WIDTH, width // 2**stage) for stage in range(stages + 1)]
        self.embedding = nn.Embedding(facts.num_classes, latent_dim)
        self.stem = nn.Linear(2 * latent_dim, width * start[0] * start[1])
        self.norms = nn.ModuleList(_ConditionalNorm(each, facts.num_classes) for each in widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in itertools.pairwise(widths)
        )
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.standardize = nn.BatchNorm2d(channels, affine=False, track_running_stats=False)
        self.register_buffer("lowest", facts.normalize(torch.zeros(1, channels, 1, 1)), persistent=False)
        self.register_buffer("highest", facts.normalize(torch.ones(1, channels, 1, 1)), persistent=False)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """Images of the given labels.

        Args:
            z: latent vectors (N, latent_dim), standard normal; N of at least 2.
            labels: classes (N,), integers.

        Returns:
            images (N, channels, height, width), normalised as the teacher's input.
        """
        x = self.stem(torch.cat((z, self.embedding(labels)), dim=1)).view(-1, *self.start)
        x = nn.functional.leaky_relu(self.norms[0](x, labels), 0.2)
        for norm, conv in zip(list(self.norms)[1:], self.convs, strict=True):
            x = conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = nn.functional.leaky_relu(norm(x, labels), 0.2)
        x = self.standardize(self.to_image(x))[..., : self.size[0], : self.size[1]]
        return self.clip(self.facts.from_standard(x))

    def clip(self, images: Tensor) -> Tensor:
        """Images held to the values of valid pixels."""
        return torch.minimum(torch.maximum(images, self.lowest), self.highest)

    def sample(self, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latent vectors and uniform labels, on the generator's device."""
        device = self.lowest.device
        z = torch.randn(count, self.latent_dim, generator=rng)
        labels = torch.randint(self.num_classes, (count,), generator=rng)
        return sent(z, device), sent(labels, device)


def _amplitudes(size: tuple[int, int], like: Tensor, fall: float) -> Tensor:
    """Amplitudes at the frequencies of a real transform; white noise of deviation 1 keeps it."""
    down, across = (torch.fft.fftfreq(side, device=like.device) for side in size)
    amplitudes = (down.square()[:, None] + across.square()).sqrt().clamp_min(1 / max(size)) ** -fall
    half: Tensor = (amplitudes / amplitudes.square().mean().sqrt())[:, : size[1] // 2 + 1]
    return half.to(like)


def coloured(white: Tensor, fall: float = 1.0) -> Tensor:
    r"""White noise as noise with the spectrum of photographs, whose amplitudes fall with the frequency.

    .. math:: |\hat x(f)| \propto |\hat \varepsilon(f)| / f^a

    The lowest frequency's holds for the mean as well.

    Args:
        white: (N, channels, height, width), of deviation 1.
        fall: the exponent a, 1 for photographs; 0 leaves the noise white.

    Returns:
        images of the same shape, of deviation 1 over all of them.

    Source: Field, "Relations between the statistics of natural images and the response properties of cortical
    cells", JOSA A, 1987.

    Example:
        >>> noise = coloured(torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        >>> round(noise.std().item(), 1), torch.allclose(coloured(whitened(noise)), noise, atol=1e-5)
        (1.0, True)
    """
    size = (white.shape[-2], white.shape[-1])
    image: Tensor = torch.fft.irfft2(torch.fft.rfft2(white) * _amplitudes(size, white, fall), s=size)
    return image


def whitened(images: Tensor, fall: float = 1.0) -> Tensor:
    """What :func:`coloured` makes these images of.

    Args:
        images: (N, channels, height, width).
        fall: the exponent a.

    Returns:
        coefficients of the same shape, alike at all frequencies for photographs.
    """
    size = (images.shape[-2], images.shape[-1])
    white: Tensor = torch.fft.irfft2(torch.fft.rfft2(images) / _amplitudes(size, images, fall), s=size)
    return white


def natural_noise(facts: Facts, count: int, rng: torch.Generator) -> Tensor:
    """Noise with the spectrum of photographs (:func:`coloured`).

    Each image is cut from a larger scene, so that some are bright and some dark. Colours are nearly alike.

    Args:
        facts: size of an image.
        count: images N.
        rng: source of randomness, on the CPU.

    Returns:
        images (N, channels, height, width) on the CPU, of mean 0 and deviation 1; see :meth:`Facts.from_standard`.

    Example:
        >>> noise = natural_noise(Facts((3, 32, 32), num_classes=10), 64, torch.Generator().manual_seed(0))
        >>> noise.shape, round(noise.std().item(), 2)
        (torch.Size([64, 3, 32, 32]), 1.0)
    """
    channels, height, width = facts.input_size
    field = SCENE * height, SCENE * width
    white = torch.randn(count, channels, *field, generator=rng)
    own, shared = math.sqrt(1 - COLOUR), math.sqrt(COLOUR)
    white = own * white + shared * torch.randn(count, 1, *field, generator=rng)
    noise = coloured(white)[..., :height, :width]
    scaled: Tensor = noise / noise.square().mean().sqrt()
    return scaled
