"""What is known of a network's images: told, left by timm, or found by a trial."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, is_dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from adadfq_plugin.errors import ModelError, first_line
from adadfq_plugin.hooks import kept_buffers, module_modes
from adadfq_plugin.transfers import sent

__all__ = [
    "AVERAGED",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "SIZE",
    "SIZE_SOURCE",
    "Facts",
    "averaged",
    "checked_numbers",
    "device_of",
    "find_facts",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
AVERAGED = "guess: the mean of timm's channels"
SIZE = "adadfq_input_size"
"""Key of a prepared model's ``meta`` for its input size (channels, height, width)."""
SIZE_SOURCE = "adadfq_input_size_from"
"""Key for where that size came from, as in :attr:`Facts.sources`."""
LARGE = 64
USUAL_SIDE = {10: 32, 100: 32, 200: 64, 1000: 224, 21843: 224, 21841: 224}
"""Image side of the usual data set with that many classes (CIFAR, Tiny ImageNet, ImageNet)."""
ALONE = "wrap it so that it does"
TRIAL_SIDES = (224, 32, 64, 28, 96, 128, 160, 192, 240, 256, 288, 299, 320, 384, 448, 512)


@dataclass(frozen=True)
class Facts:
    """What has to be known of a network's input and output.

    Args:
        input_size: channels, height, width of one image.
        num_classes: length of the logits, C.
        mean: per-channel mean of the normalisation, in units of pixel value / 255.
        std: per-channel standard deviation, likewise.
        crop_pct: centre crop of evaluation, a fraction of the resized image.
        interpolation: resampling of evaluation, timm's names.
        sources: where each fact came from: ``argument``, ``timm``, ``model`` or ``guess: why``.

    Raises:
        ModelError: a size that no image has, no class, or constants that :func:`checked_numbers` refuses.

    Example:
        >>> facts = Facts((1, 8, 8), 10, mean=(0.5,), std=(0.25,))
        >>> facts.normalize(torch.ones(1, 1, 1, 1)).item()
        2.0
        >>> bright = facts.from_standard(torch.ones(1, 1, 1, 1))
        >>> round(facts.denormalize(bright).item(), 3), facts.to_standard(bright).item()
        (0.675, 1.0)
    """

    input_size: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    crop_pct: float = 1.0
    interpolation: str = "bicubic"
    sources: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        numbers = (*self.input_size, self.num_classes)
        if len(numbers) != 4 or not all(isinstance(each, Integral) and each > 0 for each in numbers):
            raise ModelError(f"images {self.input_size!r} of {self.num_classes!r} classes can't be")
        for name in ("mean", "std"):
            checked_numbers(name, getattr(self, name), self.input_size[0])

    @property
    def guesses(self) -> dict[str, str]:
        """The facts that nobody told, with the reason for the value taken."""
        return {name: source for name, source in self.sources.items() if source.startswith("guess")}

    @property
    def guessed(self) -> str:
        """The same as a sentence; empty where nothing was guessed."""
        taken = "; ".join(f"{name} = {getattr(self, name)} ({why})" for name, why in self.guesses.items())
        return f"not told, so taken: {taken}" if taken else ""

    @property
    def large(self) -> bool:
        """Images beyond 64 pixels: small batches, few samples, and channels last in memory."""
        return max(self.input_size[1:]) > LARGE

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels (N, channels, H, W) in [0, 1] as the network's input."""
        mean, std = self._constants(pixels)
        return (pixels - mean) / std

    def denormalize(self, images: Tensor) -> Tensor:
        """The network's input (N, channels, H, W) as pixels, [0, 1] for valid images."""
        mean, std = self._constants(images)
        return images * std + mean

    def from_standard(self, images: Tensor) -> Tensor:
        """Images of mean 0 and deviation 1 as the network's input, with the brightness and contrast of photographs.

        Networks are told pixels from 0 to 1, from -1 to 1, or in units of ImageNet's channels, where nothing changes.
        """
        centre, spread = self._photographs(images)
        return images * spread + centre

    def to_standard(self, images: Tensor) -> Tensor:
        """What :meth:`from_standard` makes these images of."""
        centre, spread = self._photographs(images)
        return (images - centre) / spread

    def _constants(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return _per_channel(self.mean, like), _per_channel(self.std, like)

    def _photographs(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = self._constants(like)
        colours = (_per_channel(IMAGENET_MEAN, like), _per_channel(IMAGENET_STD, like))
        usual_mean, usual_std = colours if self.input_size[0] == 3 else (each.mean() for each in colours)
        return (usual_mean - mean) / std, usual_std / std


def _per_channel(values: Sequence[float], like: Tensor) -> Tensor:
    return sent(torch.tensor(values, dtype=like.dtype), like).view(1, -1, 1, 1)


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first tensor is; the CPU where it has none."""
    return next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))


def _left_by_timm(models: Sequence[nn.Module | None]) -> dict[str, Any]:
    """The ``pretrained_cfg`` of the first of the models that still has one."""
    for model in models:
        config = getattr(model, "pretrained_cfg", None)
        if isinstance(config, Mapping):
            return dict(config)
        if is_dataclass(config):
            return dict(vars(config))
    return {}  # what else has that name is the user's own


class _RefusedSizeError(Exception):
    """The model makes no logits of images of a size; why."""


def _count_logits(model: nn.Module, input_size: Sequence[int]) -> int:
    """How many logits the model gives an image of that size; :class:`_RefusedSizeError` where it gives none."""
    try:
        inspect.signature(model.forward).bind(None)
    except ValueError:  # it tells nobody what it takes
        pass
    except TypeError as error:
        raise ModelError(f"the model doesn't take images alone ({error}): {ALONE}") from error
    try:
        with torch.no_grad(), module_modes(model, False), kept_buffers(model):
            output = model(torch.zeros(2, *input_size, device=device_of(model)))
    except Exception as error:  # whatever the model raises
        raise _RefusedSizeError(first_line(error)) from error
    if not isinstance(output, Tensor):
        raise ModelError(f"the model returns {type(output).__name__}; wrap it so that it returns its logits")
    if output.dim() != 2:
        raise _RefusedSizeError(
            f"its output has shape {tuple(output.shape)} for two images; logits (2, classes) are needed"
        )
    return output.shape[1]


def _channels(model: nn.Module) -> int:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            return int(module.in_channels)
    return 3


def _smallest_map(model: nn.Module, input_size: Sequence[int]) -> int:
    """Side of the smallest feature map in front of the last global step."""
    sides: list[int] = []

    def note(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        sides.append(int(output.shape[-1]))

    handles = [each.register_forward_hook(note) for each in model.modules() if isinstance(each, nn.Conv2d)]
    try:
        _count_logits(model, input_size)
    finally:
        for handle in handles:
            handle.remove()
    return min((side for side in sides if side > 1), default=1)


def _try_sizes(model: nn.Module) -> tuple[tuple[int, int, int], str]:
    """An input size that the model takes, with the reason for the choice."""
    channels = _channels(model)
    smallest: dict[int, int] = {}
    refusals: list[str] = []
    for side in TRIAL_SIDES:
        size = (channels, side, side)
        try:
            classes = _count_logits(model, size)
        except _RefusedSizeError as error:
            refusals.append(str(error))
            continue
        smallest[side] = _smallest_map(model, size)
        if side == USUAL_SIDE.get(classes) and smallest[side] >= 2:
            return size, f"guess: usual for {classes} classes, and the model takes it"
    if not smallest:
        tried = ", ".join(map(str, sorted(TRIAL_SIDES)))
        raise ModelError(
            f"no square image of side {tried} runs through the model ({refusals[-1]}); pass input_size="
        )
    side = min(smallest, key=lambda each: abs(math.log(smallest[each] / 7)))
    return (channels, side, side), "guess: its last feature map comes nearest to 7 pixels"


def _takes(model: nn.Module, size: Sequence[int]) -> bool:
    with suppress(_RefusedSizeError):
        return _count_logits(model, size) > 0
    return False


def _size_of(example_inputs: Any) -> tuple[int, ...]:
    """(channels, height, width) of what torch.ao's prepare takes."""
    first = example_inputs
    if isinstance(example_inputs, tuple | list) and len(example_inputs) == 1:
        first = example_inputs[0]
    if not isinstance(first, Tensor) or first.dim() != 4:
        raise ModelError(
            "example_inputs are a batch of images (N, channels, height, width), or a tuple of one, not "
            f"{_kind(first)}; a network of several inputs doesn't take images alone: {ALONE}"
        )
    return tuple(first.shape[1:])


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"{len(value)} of them" if isinstance(value, tuple | list) else type(value).__name__


def _as_size(model: nn.Module, value: Any, channels: Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width) of a size as it was told, with the first number of channels that the model takes."""
    try:
        size = (int(value),) * 2 if isinstance(value, Integral) else tuple(int(extent) for extent in value)
    except (TypeError, ValueError):
        size = ()
    if isinstance(value, str) or len(size) not in (2, 3) or min(size) < 1:
        raise ModelError(f"input_size {value!r} is not a side, (height, width) or (channels, height, width)")
    if len(size) == 3:
        return size[0], size[1], size[2]
    candidates = list(dict.fromkeys((*channels, _channels(model))))
    taken = (each for each in candidates if len(candidates) == 1 or _takes(model, (each, *size)))
    return next(taken, candidates[0]), size[0], size[1]


def averaged(left: Sequence[float], channels: int) -> tuple[float, ...]:
    """What timm left for another number of channels: its mean for each; :data:`AVERAGED` says so.

    Example:
        >>> averaged((0.25, 0.5, 0.75), 1)
        (0.5,)
    """
    return (sum(left) / len(left),) * channels


def checked_numbers(name: str, values: Any, channels: int) -> tuple[float, ...]:
    """The mean or deviation of each channel, checked for its unit.

    Args:
        name: ``mean`` or ``std``.
        values: a number a channel, in units of pixel value / 255.
        channels: how many there are to be.

    Raises:
        ModelError: another number of them, or one out of bounds.
    """
    try:
        numbers = tuple(float(each) for each in values)
    except (TypeError, ValueError):
        raise ModelError(f"{name} = {values!r} is not one number a channel") from None
    if len(numbers) != channels:
        raise ModelError(f"{name} has {len(numbers)} values for {channels} channels")
    if not all(0 <= each <= 1 for each in numbers):
        raise ModelError(f"{name} = {numbers} is not in units of pixel / 255, from 0 to 1: divide by 255")
    if name == "std" and not all(numbers):
        raise ModelError(f"std {numbers} must be positive")
    return numbers


def find_facts(
    model: nn.Module,
    *,
    relatives: Sequence[nn.Module | None] = (),
    example_inputs: Any = None,
    input_size: Any = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Facts:
    """What the arguments tell, else what timm left on the models, else what a trial shows.

    Args:
        model: the float network; it is run in eval mode, and left as it was.
        relatives: other models that may still carry timm's ``pretrained_cfg``.
        example_inputs: a tensor or tuple as torch.ao's prepare takes it.
        input_size: side, (height, width) or (channels, height, width).
        num_classes: length of the logits, checked against the model.
        mean: normalisation of the images; a number a channel.
        std: likewise.

    Raises:
        ModelError: the model doesn't take the size, has fewer than two classes, or the facts disagree.
    """
    timm, sources = _left_by_timm((model, *relatives)), {}
    other = next(
        (each for each in model.parameters() if each.is_floating_point() and each.dtype != torch.float), None
    )
    if other is not None:
        raise ModelError(
            f"the model computes in {str(other.dtype).removeprefix('torch.')}; call .float() on it first"
        )
    metas = [meta for each in (model, *relatives) if isinstance(meta := getattr(each, "meta", None), dict)]
    kept = next((each[SIZE] for each in metas if SIZE in each), None)
    of_timm = timm.get("input_size")
    known = [each[0] for each in (kept, of_timm) if each]
    example_size = None if example_inputs is None else _size_of(example_inputs)
    if input_size is None:
        input_size = example_size
    elif example_size is not None and _as_size(model, input_size, example_size[:1]) != example_size:
        raise ModelError(
            f"input_size {input_size!r} and example_inputs of size {example_size} contradict each other"
        )
    if input_size is not None:
        size, sources["input_size"] = _as_size(model, input_size, known), "argument"
    elif kept is not None:
        source = next((each[SIZE_SOURCE] for each in metas if SIZE_SOURCE in each), "argument")
        size, sources["input_size"] = _as_size(model, kept, ()), "model" if source == "argument" else source
    elif of_timm:  # its channels may have been changed by in_chans=
        size, sources["input_size"] = _as_size(model, of_timm[1:], known), "timm"
    else:
        size, sources["input_size"] = _try_sizes(model)
    try:
        logits = _count_logits(model, size)
    except _RefusedSizeError as error:
        way_out = "pass another input_size=" if sources["input_size"] == "argument" else "pass input_size="
        raise ModelError(
            f"the model does not take images of size {size} (from: {sources['input_size']}): {error}; {way_out}"
        ) from error
    if logits < 2:
        raise ModelError("the model has one class; AdaDFQ needs at least two to let P and Q disagree")
    if num_classes is not None and num_classes != logits:
        raise ModelError(f"num_classes={num_classes}, but the model's output has {logits}")
    sources["num_classes"] = "model" if num_classes is None else "argument"
    constants: dict[str, tuple[float, ...]] = {}
    usual = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    for name, given in (("mean", mean), ("std", std)):
        left = timm.get(name)
        if given is not None:
            constants[name], sources[name] = checked_numbers(name, given, size[0]), "argument"
        elif isinstance(left, Sequence) and len(left) != size[0]:
            constants[name], sources[name] = averaged(left, size[0]), AVERAGED
        elif left is not None:
            constants[name], sources[name] = checked_numbers(name, left, size[0]), "timm"
        else:
            constants[name] = usual[name] if size[0] == 3 else (0.5,) * size[0]
            sources[name] = "guess: ImageNet's" if size[0] == 3 else "guess: one half"
    crop_pct, interpolation = timm.get("crop_pct") or 1.0, timm.get("interpolation") or "bicubic"
    return Facts(size, logits, constants["mean"], constants["std"], crop_pct, interpolation, sources)
