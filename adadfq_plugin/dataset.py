"""The synthetic set: images that stand where a toolkit asks for real calibration data."""

from __future__ import annotations

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from adadfq_plugin.errors import DataError, ModelError, OutputError
from adadfq_plugin.facts import Facts
from adadfq_plugin.files import atomic_file, atomic_folder, check_file, check_folder

__all__ = ["SyntheticDataset", "facts_from_json"]

_FILES = (".safetensors", ".npz")
_METADATA = "metadata.json"  # of a folder, which is known by it
_KEY = "adadfq_plugin"  # one key: safetensors keeps no order among several
_BROKEN = (
    OSError,
    EOFError,
    KeyError,
    TypeError,
    ValueError,
    RuntimeError,  # images of several sizes, or none
    zipfile.BadZipFile,
    zlib.error,
    safetensors.SafetensorError,
    ModelError,  # facts of no network
)


class SyntheticDataset(Dataset[tuple[Tensor, int]]):
    """Images with labels, kept as 8-bit pixels and given back as the network's normalised input.

    Args:
        images: normalised images (N, C, H, W); clamped to valid pixels and rounded to 8 bits.
        labels: the classes they were made for (N,), in [0, ``facts.num_classes``).
        facts: what is known of the network's input.
        provenance: what made them (method, settings, seed, versions); anything JSON holds.

    Raises:
        ValueError: shapes or labels that don't fit ``facts``.
        DataError: images with NaN or infinity.

    Example:
        >>> facts = Facts(input_size=(3, 4, 4), num_classes=10, mean=(0.5,) * 3, std=(0.5,) * 3)
        >>> data = SyntheticDataset(torch.zeros(2, 3, 4, 4), torch.tensor([7, 1]), facts)
        >>> len(data), data.pixels.dtype, data[0][1]
        (2, torch.uint8, 7)
    """

    def __init__(
        self, images: Tensor, labels: Tensor, facts: Facts, provenance: Mapping[str, Any] | None = None
    ) -> None:
        self._check_shape(images, facts)
        if labels.is_floating_point():
            raise ValueError(f"labels are the numbers of classes, not {labels.dtype}")
        if not bool(torch.isfinite(images).all()):
            raise DataError("synthetic images hold NaN or infinity")
        images = images.detach().to("cpu", torch.float32)
        pixels = facts.denormalize(images).clamp_(0, 1).mul_(255).round_().to(torch.uint8)
        self._fill(pixels, labels.detach().to("cpu", torch.int64), facts, provenance or {})

    def _fill(self, pixels: Tensor, labels: Tensor, facts: Facts, provenance: Mapping[str, Any]) -> None:
        self._check_shape(pixels, facts)
        shape = tuple(pixels.shape)
        if pixels.dtype != torch.uint8:
            raise ValueError(f"pixels are torch.uint8, not {pixels.dtype}")
        if labels.dtype != torch.int64 or labels.shape != shape[:1]:
            raise ValueError(f"{shape[0]} images, but labels {tuple(labels.shape)} {labels.dtype}")
        if len(labels):
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or high >= facts.num_classes:
                raise ValueError(f"labels from {low} to {high} for {facts.num_classes} classes")
        self.pixels = pixels
        """The images as 8-bit pixels (N, C, H, W)."""
        self.labels = labels
        """The classes (N,), int64."""
        self.facts = facts
        self.provenance = dict(provenance)

    @staticmethod
    def _check_shape(images: Tensor, facts: Facts) -> None:
        shape = tuple(images.shape)
        if shape[1:] != tuple(facts.input_size):
            raise ValueError(f"images {shape} don't fit input size {facts.input_size}")

    @classmethod
    def from_pixels(
        cls, pixels: Tensor, labels: Tensor, facts: Facts, provenance: Mapping[str, Any] | None = None
    ) -> SyntheticDataset:
        """The set from uint8 pixels (N, C, H, W), kept as they are."""
        self = cls.__new__(cls)
        self._fill(pixels, labels, facts, provenance or {})
        return self

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return self.images(index, index + 1)[0], int(self.labels[index])

    def images(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Normalised images ``start`` to ``stop``, float32 (N, C, H, W)."""
        return self.facts.normalize(self.pixels[start:stop].to(torch.float32) / 255)

    def loader(
        self, batch_size: int = 64, *, shuffle: bool = False, seed: int = 0
    ) -> DataLoader[tuple[Tensor, int]]:
        """Batches of (images, labels); ``seed`` alone decides the order, the global RNG is left alone."""
        generator = torch.Generator().manual_seed(seed)  # without one DataLoader draws from the global RNG
        return DataLoader(self, batch_size=batch_size, shuffle=shuffle, generator=generator)

    @staticmethod
    def check_path(path: str | Path, *, replace: bool = False, channels: int | None = None) -> None:
        """Refuses now what :meth:`save` would refuse at its beginning; leaves nothing behind.

        Args:
            path: as :meth:`save` takes it.
            replace: likewise.
            channels: of the images, where they are known.

        Raises:
            OutputError: the path can't be written, its suffix is none that is known, or the form can't hold the images.
        """
        path = Path(path)
        if path.suffix in _FILES:
            check_file(path)
        elif not path.suffix and path.name not in _FILES:
            check_folder(path, replace=_METADATA if replace else None)
            if channels not in (None, 1, 3):
                raise OutputError(f"{path}: PNG holds 1 or 3 channels, not {channels}; save as .safetensors")
        else:
            forms = ", ".join(f"*{suffix}" for suffix in _FILES)
            raise OutputError(f"{path}: a synthetic set is saved as {forms} or as a folder (no suffix)")

    def save(self, path: str | Path, *, replace: bool = False) -> None:
        """Writes the set; the suffix decides the form, and the file or folder appears whole or not at all.

        Args:
            path: ``*.safetensors`` (tensors ``images`` (N, C, H, W) uint8 and ``labels``; facts and
                provenance as JSON in the metadata), ``*.npz`` (``images`` (N, H, W, C) uint8, ``labels``,
                ``metadata``), or a folder: a sub-folder a class with PNG files, ``class_map.txt`` for
                timm's readers, and ``metadata.json``.
            replace: whether a folder that holds another synthetic set may be replaced; a file always is.

        Raises:
            OutputError: the path can't be written, or the form can't hold these images.
        """
        self.check_path(path, replace=replace, channels=self.facts.input_size[0])
        path = Path(path)
        if path.suffix == ".safetensors":
            tensors = {"images": self.pixels.contiguous(), "labels": self.labels.contiguous()}
            data = safetensors.torch.save(tensors, {_KEY: self._metadata()})
            with atomic_file(path) as temporary:
                temporary.write_bytes(data)
        elif path.suffix == ".npz":
            with atomic_file(path) as temporary, temporary.open("wb") as stream:
                np.savez_compressed(
                    stream,
                    images=self.pixels.permute(0, 2, 3, 1).numpy(),
                    labels=self.labels.numpy(),
                    metadata=np.array(self._metadata()),
                )
        else:
            with atomic_folder(path, replace=_METADATA if replace else None) as temporary:
                self._write_folder(temporary)

    @classmethod
    def load(cls, path: str | Path) -> SyntheticDataset:
        """Reads what :meth:`save` wrote.

        Raises:
            DataError: the file or folder is missing, damaged or something else; the message names it.
        """
        path = Path(path)
        try:
            if path.suffix == ".safetensors":
                with safetensors.safe_open(str(path), framework="pt") as file:
                    metadata = (file.metadata() or {})[_KEY]
                    pixels, labels = file.get_tensor("images"), file.get_tensor("labels")
            elif path.suffix == ".npz":
                with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                    metadata = str(arrays["metadata"])
                    pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
                    labels = torch.from_numpy(arrays["labels"])
            else:
                metadata = (path / _METADATA).read_text(encoding="utf-8")
                pixels, labels = _read_folder(path)
            values = json.loads(metadata)
            facts, provenance = facts_from_json(values["facts"]), values["provenance"]
            if (count := values.get("count", len(pixels))) != len(pixels):
                raise ValueError(f"{len(pixels)} images, but {count} were written")
            return cls.from_pixels(pixels, labels, facts, provenance)
        except DataError:
            raise
        except _BROKEN as error:
            reason = f"no {error} in it" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path} is not a readable synthetic set: {reason}") from error

    def _metadata(self) -> str:
        facts = dataclasses.asdict(self.facts)
        values = {"count": len(self), "facts": facts, "provenance": self.provenance}
        return json.dumps(values, sort_keys=True)

    def _write_folder(self, folder: Path) -> None:
        digits = len(str(self.facts.num_classes - 1))  # one width: every reader sorts alike
        names = [f"{index:0{digits}d}" for index in range(self.facts.num_classes)]
        for index, (pixels, label) in enumerate(zip(self.pixels, self.labels.tolist(), strict=True)):
            (folder / names[label]).mkdir(exist_ok=True)
            array = pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).contiguous().numpy()
            Image.fromarray(array).save(folder / names[label] / f"{index:06d}.png")
        (folder / "class_map.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        (folder / _METADATA).write_text(self._metadata() + "\n", encoding="utf-8")


def _read_folder(folder: Path) -> tuple[Tensor, Tensor]:
    files = sorted(folder.glob("*/*.png"), key=lambda file: int(file.stem))
    pixels = []
    for file in files:
        try:
            with Image.open(file) as image:
                array = np.array(image)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's PNG reader raises SyntaxError too
            raise DataError(f"{file}: {error}") from error
        pixels.append(torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1)))
        if pixels[-1].shape != pixels[0].shape:
            raise DataError(f"{file}: an image of another shape than {files[0].name}")
    return torch.stack(pixels), torch.tensor([int(file.parent.name) for file in files])


def facts_from_json(values: Mapping[str, Any]) -> Facts:
    """Facts from what JSON made of ``dataclasses.asdict(facts)``.

    Raises:
        KeyError: a fact is missing.
        TypeError: there is one too many.
        ModelError: one that can't be.

    Example:
        >>> facts = Facts(input_size=(3, 32, 32), num_classes=10)
        >>> facts_from_json(json.loads(json.dumps(dataclasses.asdict(facts)))) == facts
        True
    """
    lists = {name: tuple(values[name]) for name in ("input_size", "mean", "std")}
    return Facts(**{**values, **lists})
