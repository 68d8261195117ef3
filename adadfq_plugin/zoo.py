"""All that is asked of timm: models by name, facts of them and of their input, labelled images.

The only module of the package that imports timm, and it does so when it is asked.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adadfq_plugin.config import nearest
from adadfq_plugin.errors import DataError, ModelError, SettingsError, UnknownNameError, first_line
from adadfq_plugin.facts import AVERAGED, Facts, averaged, checked_numbers
from adadfq_plugin.hooks import fork_rng
from adadfq_plugin.labelled import LabelledImages, ValidationLoader

__all__ = [
    "crop_mode",
    "facts",
    "load_model",
    "validation_loader",
]

TOLD = ("crop_pct", "img_size", "in_chans", "input_size", "interpolation", "mean", "num_classes", "std")
"""What can be told of a network's images."""
COUNTER = ".num_batches_tracked"
UNREAD = (".jfif", ".jpe", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif", ".heic")
"""Suffixes of images that timm's reader passes over."""


def load_model(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    remap: bool = False,
) -> nn.Module:
    """A trained network by its timm name.

    Args:
        name: a timm name with or without tag (``resnet18``, ``resnet18.a1_in1k``), ``hf-hub:OWNER/MODEL``
            or ``local-dir:FOLDER``.
        checkpoint: a file with the weights, instead of a download; of several sets in a training
            checkpoint the averaged one (EMA) is taken, as timm does.
        pretrained: whether weights are downloaded when there is no ``checkpoint``; random weights otherwise.
        num_classes: classes of the network; unset: what timm has for the name.
        model_kwargs: further arguments of the model's constructor.
        remap: match the tensors of ``checkpoint`` by their order instead of their names.

    Returns:
        The model in eval mode.

    Raises:
        UnknownNameError: timm has no such model or no such pretrained tag; the nearest is named.
        SettingsError: ``model_kwargs`` or ``num_classes`` don't suit the model.
        DataError: the weights can't be downloaded or read, or don't fit; the message names the file and
            the first tensor that doesn't.
    """
    import timm

    local = name.lower().startswith("local-dir:")
    if not local and ":" not in name:
        _known(name, pretrained and checkpoint is None)
    download = pretrained and checkpoint is None
    arguments = {**(model_kwargs or {}), **({} if num_classes is None else {"num_classes": num_classes})}
    try:
        with fork_rng(0):  # constructors draw from the global generator
            model: nn.Module = timm.create_model(name, pretrained=download, **arguments)
    except Exception as error:  # a download fails in as many ways as there are HTTP libraries
        if "loading state_dict" in str(error):
            raise DataError(f"model {name!r}: its weights don't fit: {first_line(error)}") from error
        unsuited = isinstance(error, TypeError | AssertionError | ValueError)
        if local and not isinstance(error, TypeError | AssertionError):
            raise DataError(f"model {name!r} can't be read: {first_line(error)}") from error
        plain = not download and ":" not in name  # nothing was fetched
        if plain or (unsuited and not isinstance(error, OSError)):  # some hubs' errors are both
            raise SettingsError(
                f"model {name!r} can't be made with {arguments}: {first_line(error)}"
            ) from error
        raise DataError(
            f"model {name!r}: its weights can't be downloaded ({first_line(error)}); "
            "download them elsewhere and give the file as checkpoint (--checkpoint FILE)"
        ) from error
    own_classes = dict(getattr(model, "pretrained_cfg", None) or {}).get("num_classes")
    classes = arguments.get("num_classes")
    if download and classes not in (None, own_classes):
        raise SettingsError(
            f"the pretrained {name!r} has {own_classes} classes; with num_classes = {classes} its last "
            "layer would be random: give a checkpoint of the fine-tuned network"
        )
    if checkpoint is not None:
        _load_checkpoint(model, Path(checkpoint), name, remap)
    return model.eval()


def _known(name: str, download: bool) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        hint = nearest(architecture, timm.list_models())
        if "/" in name:
            hint = f": write hf-hub:{name} for the Hub, local-dir:{name} for a folder"
        raise UnknownNameError(f"timm has no model {architecture!r}{hint}")
    full = timm.list_pretrained(f"{architecture}.*") + timm.list_pretrained(architecture)
    tags = sorted({other.partition(".")[2] for other in full})
    if tag and tag not in tags:
        raise UnknownNameError(
            f"timm has no weights {tag!r} of {architecture}{nearest(tag, tags)} (it has: {', '.join(tags)})"
        )
    if download and not full:
        raise DataError(f"timm has no weights of {name!r} to download; give a checkpoint (--checkpoint FILE)")


def _load_checkpoint(model: nn.Module, path: Path, name: str, remap: bool) -> None:
    import timm.models

    try:
        state = timm.models.load_state_dict(str(path))
    except FileNotFoundError as error:
        raise DataError(f"checkpoint {path}: no such file") from error
    except Exception as error:  # unpickling garbage raises nearly anything
        if "weights_only" in str(error):  # torch's advice is to trust the file
            raise DataError(
                f"checkpoint {path} holds other objects than tensors, such as a whole network: "
                "save its state_dict() and give that file"
            ) from error
        raise DataError(f"checkpoint {path} can't be read: {first_line(error)}") from error
    own = model.state_dict()
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        held = f" but {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, Mapping) and state else ""
        raise DataError(f"checkpoint {path} holds no tensors by name{held}: it is to be a state_dict()")
    if remap:
        if len(state) != len(own):
            raise DataError(f"checkpoint {path} has {len(state)} tensors, {name} has {len(own)}")
        state = dict(zip(own, state.values(), strict=True))
    misfit = _misfit(own, state)
    if misfit and not remap:
        with suppress(Exception):  # timm asks for tensors that no other file has
            renewed = _renewed(model, state, name)
            if not _misfit(own, renewed):
                state, misfit = renewed, ""
    if misfit:
        raise DataError(f"checkpoint {path} doesn't fit {name}: {misfit}")
    counters = {key: value for key, value in own.items() if key.endswith(COUNTER)}
    model.load_state_dict({**counters, **state})


def _misfit(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    """The first tensor of a network that a file has in no such shape, or the other way round; nothing where all fit."""
    for key, value in own.items():
        if key not in state and not key.endswith(COUNTER):  # which files of old or of conversions lack
            return f"it has no tensor {key!r}"
        if state.get(key, value).shape != value.shape:
            shapes = f"{tuple(state[key].shape)} in the file and {tuple(value.shape)} in the network"
            return f"tensor {key!r} is {shapes}"
    extra = [key for key in state if key not in own]
    return f"the network has no tensor {extra[0]!r}" if extra else ""


def _renewed(model: nn.Module, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """What timm makes of the files that it downloads: of its older versions, or of a network's authors."""
    import timm.models

    told = dict(getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    entry = timm.models.model_entrypoint(told or name.partition(".")[0])
    renew = getattr(sys.modules[entry.__module__], "checkpoint_filter_fn", None)
    renewed: dict[str, Tensor] = state if renew is None else renew(dict(state), model)
    return renewed


def facts(model: nn.Module, overrides: Mapping[str, Any] | None = None) -> Facts:
    """What timm left on a model about its images, in the order: argument, timm, guess (classes: argument, model, timm).

    Args:
        model: a network of timm, or one with ``pretrained_cfg`` or ``num_classes`` like those.
        overrides: ``input_size`` or ``img_size``, ``in_chans``, ``num_classes``, ``mean``, ``std``, ``crop_pct``,
            ``interpolation``; those that are None don't count.

    Raises:
        SettingsError: an override of no known name, one out of bounds, or one that doesn't fit the others (three means
            for one channel).
        ModelError: nobody says how many classes there are, or timm's own mean or deviation can't be.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    if unknown := sorted(given.keys() - TOLD):
        raise SettingsError(f"{unknown[0]!r} is nothing that is asked of images{nearest(unknown[0], TOLD)}")
    timm_has = dict(getattr(model, "pretrained_cfg", None) or {})
    told: Sequence[int] = given.get("input_size") or ()
    channels = told[0] if len(told) == 3 else given.get("in_chans")
    guessed: tuple[str, ...] = _with_channels(timm_has, channels) if channels else ()
    try:
        config = _timm_data().resolve_data_config({"in_chans": 3, **given}, timm_has)
    except AssertionError as error:
        raise SettingsError(f"input_size, mean and std don't fit each other: {given}") from error
    if min(config["input_size"]) < 1:
        raise SettingsError(f"images of size {tuple(config['input_size'])} have no pixels")
    classes, classes_source = given.get("num_classes"), "argument"
    if classes is None:
        classes, classes_source = getattr(model, "num_classes", None), "model"
    if not classes:
        classes, classes_source = timm_has.get("num_classes"), "timm"
    if not classes:
        raise ModelError("the number of classes is unknown; give num_classes (--num-classes)")
    for name in ("mean", "std"):
        try:
            checked_numbers(name, config[name], config["input_size"][0])
        except ModelError as error:
            if name not in given:
                raise
            raise SettingsError(str(error)) from error
    sources = {"num_classes": classes_source}
    for key in ("input_size", "mean", "std", "crop_pct", "interpolation"):
        if key in given or (key == "input_size" and "img_size" in given):
            sources[key] = "argument"
        elif key in guessed:
            sources[key] = AVERAGED
        elif timm_has.get(key) is not None:
            sources[key] = "timm"
        else:
            sources[key] = "guess: timm's default, the model says nothing"
    return Facts(
        input_size=tuple(config["input_size"]),
        num_classes=int(classes),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        crop_pct=float(config["crop_pct"]),
        interpolation=str(config["interpolation"]),
        sources=sources,
    )


def _with_channels(config: dict[str, Any], channels: int) -> tuple[str, ...]:
    """Gives timm's record another number of channels, in place; returns what had to be guessed for that."""
    size = config.get("input_size") or (3, 224, 224)
    if size[0] == channels:
        return ()
    config["input_size"] = (channels, *size[1:])
    guessed = tuple(name for name in ("mean", "std") if config.get(name))
    for name in guessed:
        config[name] = averaged(config[name], channels)
    return guessed


def crop_mode(model: nn.Module) -> str:
    """How timm crops the images of a model: ``center``, ``squash`` or ``border``."""
    return str(dict(getattr(model, "pretrained_cfg", None) or {}).get("crop_mode") or "center")


def validation_loader(
    folder: str | Path,
    facts: Facts,
    *,
    batch_size: int = 64,
    class_map: str | Path | None = None,
    crop_mode: str = "center",
    workers: int = 0,
) -> ValidationLoader:
    """Labelled images for measuring, one sub-folder a class, read with timm's reader and transform.

    Without a ``class_map`` the sub-folders are taken for, in this order: ImageNet synsets, if all are and
    the network has as many classes as one of timm's ImageNet lists (a part of the 1000 is enough); class
    indices, if all are numbers; the network's classes in timm's natural order, if there are as many.

    Args:
        folder: the images, or a folder with ``val`` or ``validation`` in it.
        facts: input size, normalisation, crop and classes of the network.
        batch_size: images in a batch.
        class_map: file as timm takes it, the class on line k being class k.
        crop_mode: timm's ``center``, ``squash`` or ``border``.
        workers: processes that read images; 0 reads in this one.

    Raises:
        DataError: no images, folders that can't be matched with the classes, a broken class map.
    """
    folder, data = Path(folder), _timm_data()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    mode = {1: "L", 3: "RGB"}.get(facts.input_size[0])
    if mode is None:
        raise DataError(
            f"{folder}: image files have 1 or 3 channels, the network takes {facts.input_size[0]}"
        )
    try:
        reader = data.create_dataset("", root=str(folder)).reader
        if class_map is None:
            indices, classes = _class_indices(folder, reader.class_to_idx, facts.num_classes)
        else:
            classes = f"classes as {class_map} lists them"
            indices = _listed(class_map, folder)
        _refuse_uncounted(folder, reader, indices, facts.num_classes)
        reader = data.create_dataset("", root=str(folder), class_map=indices).reader
    except (RuntimeError, AssertionError, OSError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise DataError(f"{folder}: {first_line(error)}") from error
    transform = data.create_transform(
        facts.input_size,
        interpolation=facts.interpolation,
        mean=facts.mean,
        std=facts.std,
        crop_pct=facts.crop_pct,
        crop_mode=crop_mode,
    )
    images = LabelledImages(reader, mode, transform)
    return ValidationLoader(images, len(images), batch_size, workers, classes)


def _refuse_uncounted(folder: Path, reader: Any, indices: Mapping[str, Any], num_classes: int) -> None:
    """Refuses images that no class of the network is for, or that timm passes over: no figure would count them."""
    for name in sorted(reader.class_to_idx):
        if name not in indices:
            raise DataError(
                f"the class map doesn't list {name!r}, a sub-folder of {folder}: its images would not be counted; "
                "list it, or move it away"
            )
        index = indices[name]
        if not isinstance(index, Integral) or not 0 <= int(index) < num_classes:
            raise DataError(
                f"{folder}: sub-folder {name!r} is of class {index!r}, the network has {num_classes} classes"
            )
    for path, _ in reader.samples:
        if len(Path(path).relative_to(reader.root).parts) > 2:
            raise DataError(
                f"{path} lies deeper than in one sub-folder a class: timm would take the innermost folder for its "
                f"class; move it up, or name the folder that the classes lie in instead of {folder}"
            )
    files = (
        Path(where, name) for where, _, names in os.walk(reader.root, followlinks=True) for name in names
    )
    unread = sorted(file for file in files if file.suffix.lower() in UNREAD)
    if unread:
        raise DataError(
            f"{len(unread)} images of {folder} would not be counted, {unread[0].name} the first: timm reads "
            f"{' '.join(_timm_data().readers.get_img_extensions())}; convert them, or move them away"
        )


def _listed(class_map: str | Path, folder: Path) -> Mapping[str, Any]:
    """The classes that a file lists, as timm reads it, which passes over what shifts all that follows."""
    indices: Mapping[str, Any] = _timm_data().readers.class_map.load_class_map(str(class_map), str(folder))
    if Path(class_map).suffix.lower() != ".txt":
        return indices
    file = Path(class_map) if Path(class_map).exists() else folder / class_map
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").rstrip().splitlines()]
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            what = f"{name!r} stands there again" if name else "it is blank"
            raise DataError(f"class map {file}, line {index + 1}: {what}, and each line is a class's")
    return {name: index for index, name in enumerate(names)}


def _class_indices(
    folder: Path, natural: Mapping[str, int], num_classes: int
) -> tuple[Mapping[str, int], str]:
    """The class of each sub-folder, and what was taken for it."""
    names = list(natural)
    if "" in names:
        raise DataError(f"{folder}: images must lie in one sub-folder a class; some lie beside them")
    data = _timm_data()
    subset = data.infer_imagenet_subset({"num_classes": num_classes})
    if subset is not None:
        synsets = {synset: index for index, synset in enumerate(data.ImageNetInfo(subset).label_names())}
        if synsets.keys() >= set(names):
            return synsets, "ImageNet synsets"
    if all(name.isdecimal() and int(name) < num_classes for name in names):
        return {name: int(name) for name in names}, "numbers of classes, from 0"
    if len(names) == num_classes:
        return natural, f"the classes in timm's order, {names[0]} to {names[-1]}"
    raise DataError(
        f"{folder}: {len(names)} sub-folders ({names[0]}, ...) and a network of {num_classes} classes; "
        "say which is which with a class map (--class-map FILE)"
    )


def _timm_data() -> Any:
    import timm.data

    return timm.data  # half of its functions have no types
