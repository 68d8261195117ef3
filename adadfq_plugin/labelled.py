"""Labelled images for measuring: what a loader reads, and an error that names the broken one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adadfq_plugin.errors import DataError, first_line

__all__ = ["LabelledImages", "ValidationLoader"]


class ValidationLoader:
    """Batches of (images, labels) in the order of the files; made by :func:`adadfq_plugin.zoo.validation_loader`.

    A broken image ends the iteration with a :class:`DataError` that names its file.
    """

    def __init__(
        self, images: Dataset[tuple[Tensor, int]], count: int, batch_size: int, workers: int, classes: str
    ) -> None:
        self.count, self.classes = count, classes
        """How many images there are, and how their sub-folders were matched with the network's classes."""
        generator = torch.Generator().manual_seed(0)  # without one DataLoader draws from the global RNG
        self._loader = DataLoader(images, batch_size=batch_size, num_workers=workers, generator=generator)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        try:
            yield from self._loader
            return
        except DataError as error:  # from a worker it comes with that worker's traceback as its message
            last = str(error).strip().splitlines()[-1]
            error.__traceback__ = None  # it holds the loader, whose workers would live on
        raise DataError(last.removeprefix(f"{DataError.__module__}.{DataError.__qualname__}: "))


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images and labels of timm's own reader, through its own transform; its dataset passes over what it can't read.

    Args:
        reader: timm's, of streams and labels.
        mode: Pillow's, ``L`` or ``RGB``.
        transform: from an image to a tensor.
    """

    def __init__(self, reader: Any, mode: str, transform: Any) -> None:
        self.reader, self.mode, self.transform = reader, mode, transform

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            stream, label = self.reader[index]
            with stream, warnings.catch_warnings():
                warnings.simplefilter("ignore")  # odd metadata is no reason to distrust the pixels
                with Image.open(stream) as image:
                    pixels = _in_bytes(image).convert(self.mode)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.reader.filename(index, absolute=True)}: {first_line(error)}") from error
        return self.transform(pixels), label


def _in_bytes(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel; Pillow cuts 16 bits off at 255, which leaves white."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"pixels of 32 bits (mode {image.mode}) have no known range: save it with 8 or 16 bits"
        )
    return image
