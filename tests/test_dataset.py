"""The synthetic set keeps its pixels, labels and origin through every form it is saved in."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.data
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.errors import DataError, OutputError
from adadfq_plugin.facts import IMAGENET_MEAN, IMAGENET_STD, Facts
from adadfq_plugin.files import atomic_file, atomic_folder, check_file, check_folder

FORMS = ("set.safetensors", "set.npz", "set")
PROVENANCE = {"method": "adadfq", "seed": 3, "settings": {"gamma": 1.0, "steps": None}}


def make(channels: int = 3, count: int = 5, size: tuple[int, int] = (6, 4)) -> SyntheticDataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, channels, *size), generator=generator, dtype=torch.uint8)
    labels = torch.tensor([11, 0, 3, 3, 7, 2][:count])
    facts = Facts(
        (channels, *size), 12, IMAGENET_MEAN[:channels], IMAGENET_STD[:channels], sources={"mean": "timm"}
    )
    return SyntheticDataset.from_pixels(pixels, labels, facts, PROVENANCE)


def test_images_become_the_nearest_valid_pixels() -> None:
    facts = Facts((1, 1, 4), 2, mean=(0.5,), std=(0.25,))
    wanted = torch.tensor([[[[-0.3, 0.0, 100.4 / 255, 1.7]]]])
    data = SyntheticDataset(facts.normalize(wanted), torch.tensor([1]), facts)
    assert data.pixels.tolist() == [[[[0, 0, 100, 255]]]]
    expected = (np.array([0, 0, 100, 255]) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(data.images().numpy().ravel(), expected, atol=1e-6)


@given(st.lists(st.integers(0, 255), min_size=12, max_size=12))
def test_8_bit_images_survive_normalisation(values: list[int]) -> None:
    facts = Facts((3, 2, 2), 2)
    pixels = torch.tensor(values, dtype=torch.uint8).view(1, 3, 2, 2)
    once = SyntheticDataset.from_pixels(pixels, torch.tensor([0]), facts)
    assert torch.equal(SyntheticDataset(once.images(), once.labels, facts).pixels, pixels)


def test_items_slices_and_batches_agree() -> None:
    data = make()
    assert len(data) == 5
    assert [data[index][1] for index in range(-5, 5)] == data.labels.tolist() * 2
    assert torch.equal(data[-1][0], data.images()[4])
    assert torch.equal(data.images(1, 3), data.images()[1:3])
    with pytest.raises(IndexError):
        data[5]
    batches = list(data.loader(2))
    assert [len(labels) for _, labels in batches] == [2, 2, 1]
    assert torch.equal(torch.cat([images for images, _ in batches]), data.images())


def test_the_seed_alone_orders_a_shuffled_loader() -> None:
    data = make()

    def order(seed: int) -> list[int]:
        return [int(label) for _, labels in data.loader(2, shuffle=True, seed=seed) for label in labels]

    first = order(1)
    torch.rand(1, generator=torch.Generator())  # the global generator plays no part; no_leaks sees to it
    assert order(1) == first
    assert sorted(first) == sorted(data.labels.tolist())
    assert len({tuple(order(seed)) for seed in range(6)}) > 1


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_round_trip(tmp_path: Path, form: str, channels: int) -> None:
    data = make(channels)
    data.save(tmp_path / form)
    again = SyntheticDataset.load(tmp_path / form)
    assert torch.equal(again.pixels, data.pixels)
    assert torch.equal(again.labels, data.labels)
    assert again.facts == data.facts
    assert again.provenance == PROVENANCE
    assert [path.name for path in tmp_path.iterdir()] == [form]  # no temporary file is left


@pytest.mark.parametrize("form", FORMS[:2])
def test_the_same_set_makes_the_same_file(tmp_path: Path, form: str) -> None:
    for folder in ("a", "b"):
        make().save(tmp_path / folder / form)
    assert (tmp_path / "a" / form).read_bytes() == (tmp_path / "b" / form).read_bytes()


def test_other_channels_have_no_folder_form(tmp_path: Path) -> None:
    data = make(2)
    data.save(tmp_path / "set.safetensors")
    assert torch.equal(SyntheticDataset.load(tmp_path / "set.safetensors").pixels, data.pixels)
    with pytest.raises(OutputError, match=r"1 or 3 channels, not 2"):
        data.save(tmp_path / "set")


def test_timm_reads_the_folder_form(tmp_path: Path) -> None:
    data = make()
    data.save(tmp_path / "set")
    create: Any = timm.data.create_dataset  # type: ignore[attr-defined]  # timm doesn't list it
    reader = create("", root=str(tmp_path / "set"), class_map="class_map.txt").reader
    assert [label for _, label in reader.samples] == sorted(data.labels.tolist())
    with Image.open(reader.samples[0][0]) as image:
        assert (np.asarray(image) == data.pixels[1].permute(1, 2, 0).numpy()).all()


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (torch.zeros(2, 3, 6, 5), torch.zeros(2, dtype=torch.int64), "input size"),
        (torch.zeros(2, 1, 6, 4), torch.zeros(2, dtype=torch.int64), "input size"),
        (torch.zeros(2, 4, 6, 4), torch.zeros(2, dtype=torch.int64), "input size"),
        (torch.zeros(2, 3, 6, 4), torch.zeros(3, dtype=torch.int64), "labels"),
        (torch.zeros(2, 3, 6, 4), torch.tensor([0, 12]), "from 0 to 12 for 12 classes"),
        (torch.zeros(2, 3, 6, 4), torch.tensor([-1, 2]), "from -1 to 2"),
    ],
)
def test_what_does_not_fit_is_refused(images: Tensor, labels: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SyntheticDataset(images, labels, make().facts)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_is_refused(value: float) -> None:
    images = torch.zeros(1, 3, 6, 4)
    images[0, 1, 2, 3] = value
    with pytest.raises(DataError, match="NaN or infinity"):
        SyntheticDataset(images, torch.tensor([0]), make().facts)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


def _garbage(path: Path) -> None:
    path.write_bytes(b"no such thing" * 20)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("damage", [_truncate, _garbage, _empty, Path.unlink])
def test_damaged_files_are_named(tmp_path: Path, form: str, damage: Callable[[Path], None]) -> None:
    path = tmp_path / form
    make().save(path)
    damage(path)
    with pytest.raises(DataError, match=str(path)):
        SyntheticDataset.load(path)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", images=np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(DataError, match=r"other\.npz.*metadata"):
        SyntheticDataset.load(tmp_path / "other.npz")
    np.savez(
        tmp_path / "labels.npz",
        images=make().pixels.permute(0, 2, 3, 1).numpy(),
        labels=np.full(5, 99),
        metadata=np.array(make()._metadata()),
    )
    with pytest.raises(DataError, match="99 for 12 classes"):
        SyntheticDataset.load(tmp_path / "labels.npz")


@pytest.mark.parametrize("damage", [_truncate, _garbage, _empty])
def test_damaged_images_are_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    make().save(tmp_path / "set")
    image = tmp_path / "set" / "11" / "000000.png"
    damage(image)
    with pytest.raises(DataError, match=str(image)):
        SyntheticDataset.load(tmp_path / "set")


def test_images_of_several_sizes_or_none_are_named(tmp_path: Path) -> None:
    make().save(tmp_path / "set")
    Image.new("RGB", (3, 3)).save(tmp_path / "set" / "11" / "000000.png")
    with pytest.raises(DataError, match=r"000001\.png: an image of another shape than 000000\.png"):
        SyntheticDataset.load(tmp_path / "set")
    for image in (tmp_path / "set").rglob("*.png"):
        image.unlink()
    with pytest.raises(DataError, match=str(tmp_path / "set")):
        SyntheticDataset.load(tmp_path / "set")


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"facts": {"input_size": [3, 6, 4]}})])
def test_damaged_metadata_is_named(tmp_path: Path, text: str) -> None:
    make().save(tmp_path / "set")
    (tmp_path / "set" / "metadata.json").write_text(text)
    with pytest.raises(DataError, match=str(tmp_path / "set")):
        SyntheticDataset.load(tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_size": [3, 6]}, r"images \(3, 6\)"),
        ({"input_size": [3, 6, "4"]}, r"images \(3, 6, '4'\)"),
        ({"num_classes": 0}, "0 classes"),
        ({"mean": [0.5]}, "mean has 1 values for 3 channels"),
        ({"std": [0.5, 0.5, 0.0]}, "must be positive"),
        ({"std": [0.5, 0.5, "x"]}, "is not one number a channel"),
    ],
)
def test_facts_that_cannot_be_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    make().save(tmp_path / "set")
    metadata = tmp_path / "set" / "metadata.json"
    values = json.loads(metadata.read_text())
    values["facts"] |= change
    metadata.write_text(json.dumps(values))
    with pytest.raises(DataError, match=rf"{tmp_path / 'set'}.*{said}"):
        SyntheticDataset.load(tmp_path / "set")


def test_a_lost_image_is_missed(tmp_path: Path) -> None:
    make().save(tmp_path / "set")
    next((tmp_path / "set").rglob("*.png")).unlink()
    count = len(make())
    with pytest.raises(DataError, match=f"set.*{count - 1} images, but {count} were written"):
        SyntheticDataset.load(tmp_path / "set")
    metadata = tmp_path / "set" / "metadata.json"
    values = json.loads(metadata.read_text())
    del values["count"]  # as in sets of before
    metadata.write_text(json.dumps(values))
    assert len(SyntheticDataset.load(tmp_path / "set")) == count - 1


@pytest.mark.parametrize("form", FORMS)
def test_a_path_that_cannot_be_written_is_named(tmp_path: Path, form: str) -> None:
    (tmp_path / "file").write_text("in the way")
    path = tmp_path / "file" / form
    for write in (make().save, SyntheticDataset.check_path):
        with pytest.raises(OutputError, match=str(path)):
            write(path)


def test_unknown_forms_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"set\.pkl.*safetensors"):
        make().save(tmp_path / "set.pkl")
    with pytest.raises(OutputError, match=r"\.npz: a synthetic set is saved as"):
        make().save(tmp_path / ".npz")
    (tmp_path / "set.npz").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        make().save(tmp_path / "set.npz")


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_leaves_nothing(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(np, "savez_compressed", full)
    monkeypatch.setattr("PIL.Image.Image.save", full)
    with pytest.raises(OutputError, match=r"set.*No space left on device"):
        make().save(tmp_path / form)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_kept_unless_told(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    make(count=2).save(folder)  # an empty one is taken
    with pytest.raises(OutputError, match="not empty"):
        make().save(folder)
    assert len(SyntheticDataset.load(folder)) == 2
    make().save(folder, replace=True)
    assert len(SyntheticDataset.load(folder)) == 5
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").write_text("old")

    def half(writer: AbstractContextManager[Path]) -> None:
        with writer as temporary:
            (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
            raise KeyboardInterrupt

    for writer in (atomic_file(tmp_path / "file"), atomic_folder(tmp_path / "folder", replace="kept")):
        with pytest.raises(KeyboardInterrupt):
            half(writer)
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["kept"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_folder_comes_back_where_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "kept").touch()
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if source.suffix == ".part":
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(OutputError, match="no"), atomic_folder(tmp_path / "folder", replace="kept"):
        pass
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["kept"]
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_only_a_folder_of_the_same_kind_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").touch()
    with pytest.raises(OutputError, match=r"photos holds something else, no metadata\.json"):
        make().save(tmp_path / "photos", replace=True)

    def meanwhile() -> None:
        with atomic_folder(tmp_path / "new") as folder:
            (folder / "ours").touch()
            (tmp_path / "new").mkdir()
            (tmp_path / "new" / "theirs").touch()

    with pytest.raises(OutputError, match="not empty"):
        meanwhile()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.png", "new", "photos", "theirs"]


def test_a_file_in_a_folder_is_refused_by_the_name_that_was_given(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").mkdir()
            with atomic_file(folder / "a"):
                pass

    with pytest.raises(OutputError) as caught:
        write()
    assert str(caught.value) == f"{tmp_path}/out/a is a folder, not a file"


def test_checking_leaves_nothing(tmp_path: Path) -> None:
    check_folder(tmp_path / "new")
    check_folder(tmp_path / "a" / "b" / "new")
    SyntheticDataset.check_path(tmp_path / "c" / "set.npz")
    SyntheticDataset.check_path(tmp_path / "set.npz")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="is a file"):
        check_folder(tmp_path / "file")


def test_a_link_stays_and_the_current_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with atomic_folder(tmp_path / "link", replace="old") as folder:
        (folder / "new").touch()
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]
    (tmp_path / "linked").symlink_to(tmp_path / "folder" / "file")  # which isn't there yet
    with atomic_file(tmp_path / "linked") as file:
        file.write_text("whole")
    assert (tmp_path / "linked").is_symlink()
    assert (tmp_path / "folder" / "file").read_text() == "whole"
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for check in (check_folder, check_file):
        with pytest.raises(OutputError, match="circle"):
            check(tmp_path / "circle")
    monkeypatch.chdir(tmp_path / "folder")
    for place in (".", "..", tmp_path / "link"):
        with pytest.raises(OutputError, match="in use"):
            check_folder(place, replace="new")


def test_labels_are_whole_numbers() -> None:
    with pytest.raises(ValueError, match=r"numbers of classes, not torch\.float32"):
        SyntheticDataset(torch.zeros(1, 3, 4, 4), torch.tensor([0.9]), Facts((3, 4, 4), 10))
