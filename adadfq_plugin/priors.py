"""What a trained network says about its training images: losses that hook into the teacher, and their sum."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from adadfq_plugin.captures import Call, capture_calls, capture_inputs
from adadfq_plugin.config import GeneratorSettings
from adadfq_plugin.errors import ModelError, SettingsError
from adadfq_plugin.facts import device_of
from adadfq_plugin.functional import (
    bn_statistics_loss,
    channel_moments,
    head_similarity,
    patch_similarity_entropy,
    squared_norm,
    total_variation,
)
from adadfq_plugin.teacher import Teacher, keeping_statistics

__all__ = [
    "BNStatistics",
    "HeadSimilarity",
    "ImageNorm",
    "PatchSimilarity",
    "Prior",
    "PriorSum",
    "TotalVariation",
    "choose_priors",
]

SMALLEST = 1e-8
"""Keeps the gradient of a deviation finite where a channel is constant."""
ATTENTION = ("scaled_dot_product_attention",)
NORMS = ("layer_norm", "rms_norm", "group_norm")
CONVOLUTIONS = ("conv2d",)
LEAST_PATCHES = 4
MOST_HEADS, MOST_QUERIES = 4, 16
"""Heads and queries that are compared: pairs of heads grow with the square, and neighbouring queries are alike."""
PAIRS = 128
"""Pairs of patches compared in an image: with 512 the prior took longer than the network."""


class Prior(Protocol):
    """One loss over P's forward pass."""

    name: str

    def reason(self, teacher: Teacher) -> str | None:
        """Why this prior can't be used for a network; None if it can."""

    def watch(self, teacher: Teacher) -> AbstractContextManager[Callable[[], Tensor]]:
        """The loss over the most recent forward pass of the teacher, once for each; for the length of the ``with``."""


class BNStatistics:
    r"""Batch statistics in front of each BatchNorm as its running ones (``bn_statistics_loss``).

    Args:
        relative: measure each channel in units of its own running deviation, so that no channel or layer
            outweighs the others: :math:`((\mu - \hat\mu) / \hat\sigma)^2 + (\sigma / \hat\sigma - 1)^2`, with the
            layer's epsilon in the variance of both, as it divides by them.
            False is the paper's loss, in the activations' own units.
    """

    name = "bn_statistics"

    def __init__(self, relative: bool = True) -> None:
        self.relative = relative

    def reason(self, teacher: Teacher) -> str | None:
        """None where a layer that takes part has been trained."""
        layers = teacher.batch_norms
        if not layers and keeping_statistics(teacher.model):
            return "none of its BatchNorm layers takes part in what it answers"
        if not layers:
            return (
                "the network has no BatchNorm layer that keeps running statistics (if prepare_fx or prepare_pt2e "
                "folded them away, pass teacher= the float model)"
            )
        fresh = [
            name
            for name, layer in layers.items()
            if bool((layer.running_mean == 0).all()) and bool((layer.running_var == 1).all())  # type: ignore[union-attr]
        ]
        if len(fresh) == len(layers):
            return (
                "its BatchNorm layers hold no statistics (mean 0, variance 1): the network was never trained"
            )
        return None

    @contextmanager
    def watch(self, teacher: Teacher) -> Iterator[Callable[[], Tensor]]:
        """The loss over the most recent forward pass of the teacher."""
        targets = _Targets.of(teacher.batch_norms, self.relative)
        with capture_inputs(teacher.batch_norms) as seen:

            def loss() -> Tensor:
                moments = [channel_moments(seen[name]) for name in targets.names]
                seen.clear()  # they are as large as the network's graph
                means, variances = map(torch.cat, zip(*moments, strict=True))
                return targets.loss(means, variances)

            yield loss


@dataclass(frozen=True)
class _Targets:
    """The running statistics of layers, of all at a time: they are many and small.

    Args:
        names: of the layers.
        means: running means.
        variances: running variances; 1 in relative units.
        units: what relative statistics are measured by (channels of all layers,): the means, the layers' epsilons, and
            the variances with these.
    """

    names: list[str]
    means: list[Tensor]
    variances: list[Tensor]
    units: tuple[Tensor, Tensor, Tensor] | None

    @classmethod
    def of(cls, layers: Mapping[str, nn.Module], relative: bool) -> _Targets:
        means = [cast(Tensor, layer.running_mean) for layer in layers.values()]
        variances = [cast(Tensor, layer.running_var) for layer in layers.values()]
        if not relative:
            return cls(list(layers), means, variances, None)
        eps = torch.cat(
            [
                torch.full_like(each, max(cast(float, layer.eps), SMALLEST))
                for each, layer in zip(variances, layers.values(), strict=True)
            ]
        )
        units = torch.cat(means), eps, torch.cat(variances) + eps
        return cls(list(layers), [*map(torch.zeros_like, means)], [*map(torch.ones_like, means)], units)

    def loss(self, means: Tensor, variances: Tensor) -> Tensor:
        """The loss of a batch's statistics (channels of all layers,)."""
        if self.units is not None:
            middle, eps, unit = self.units
            means, variances = (means - middle) / unit.sqrt(), ((variances + eps) / unit).sqrt()
        sizes = [len(each) for each in self.means]
        return bn_statistics_loss(means.split(sizes), variances.split(sizes), self.means, self.variances)


class _OfCalls:
    """A loss of what the network calls; each call that counts weighs the same, and its value is to be large."""

    name: str
    names: frozenset[str]
    """Functions that are watched."""
    missing: str
    """What a network lacks in which no call counts."""

    def values(self, calls: Sequence[Call]) -> list[Tensor]:
        """The value of each call that counts."""
        raise NotImplementedError

    def reason(self, teacher: Teacher) -> str | None:
        """None where a trial shows a call that counts."""
        with self._calls(teacher.model) as calls, torch.no_grad():
            teacher(teacher.noise(2))
        return None if self.values(calls) else self.missing

    @classmethod
    def _calls(cls, model: nn.Module) -> AbstractContextManager[list[Call]]:
        return capture_calls(model, cls.names)

    @contextmanager
    def watch(self, teacher: Teacher) -> Iterator[Callable[[], Tensor]]:
        """The loss over the most recent forward pass of the teacher."""
        with self._calls(teacher.model) as calls:

            def loss() -> Tensor:
                values = self.values(calls)
                calls.clear()  # they are as large as the network's graph
                return -torch.stack(values).mean()

            yield loss


def _tokens(call: Call) -> Tensor | None:
    """Features of patches (N, T, D) from what an attention, a normalisation or a convolution returned."""
    x = call.output
    if x.ndim == 4 and call.name in ATTENTION:
        tokens = x.transpose(1, 2).flatten(2)  # heads side by side
    elif x.ndim == 4 and call.name in ("group_norm", *CONVOLUTIONS):
        tokens = x.flatten(2).transpose(1, 2)
    elif x.ndim >= 3 and call.name in ("layer_norm", "rms_norm"):
        tokens = x.flatten(1, -2)
    else:
        return None
    return tokens if tokens.shape[1] >= LEAST_PATCHES else None


class PatchSimilarity(_OfCalls):
    """Patches as unlike each other as those of real images (``patch_similarity_entropy``, to be large).

    Patches are what attention returns; in networks without it, what normalisations of single images return; in
    networks without these, what convolutions return.
    """

    name = "patch_similarity"
    names = frozenset({*ATTENTION, *NORMS, *CONVOLUTIONS})
    missing = (
        f"the network has no attention, normalisation or convolution over {LEAST_PATCHES} patches or more"
    )

    def values(self, calls: Sequence[Call]) -> list[Tensor]:
        """The entropy of each call's patches."""
        for kind in (ATTENTION, NORMS, CONVOLUTIONS):
            found = [_tokens(call) for call in calls if call.name in kind]
            if known := [tokens for tokens in found if tokens is not None]:
                return [patch_similarity_entropy(tokens, pairs=PAIRS).mean() for tokens in known]
        return []


def _attention(call: Call) -> Tensor | None:
    """Probabilities (N, h, T, S) of some heads and queries of an attention, or None where it has one head."""
    if call.name == "softmax":
        x = call.output
        if x.ndim != 4 or x.shape[1] < 2 or x.shape[3] < LEAST_PATCHES:
            return None
        # ResNeSt weighs branches by a softmax over its second dimension
        if call.argument(1, "dim") not in (-1, 3):
            return None
        return x[:, _some(x.shape[1], MOST_HEADS)][:, :, _some(x.shape[2], MOST_QUERIES)]
    query, key = call.argument(0, "query"), call.argument(1, "key")
    if (
        query.ndim != 4
        or query.shape[1] < 2
        or key.shape[1] != query.shape[1]
        or key.shape[2] < LEAST_PATCHES
    ):
        return None
    heads, queries = _some(query.shape[1], MOST_HEADS), _some(query.shape[2], MOST_QUERIES)
    scale = call.kwargs.get("scale") or query.shape[-1] ** -0.5
    scores = query[:, heads][:, :, queries] @ key[:, heads].transpose(-2, -1) * scale
    mask = call.argument(3, "attn_mask")
    if call.argument(5, "is_causal", False):
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        mask = mask.expand(*mask.shape[:-3], query.shape[1], query.shape[2], key.shape[2])
        mask = mask[..., heads, :, :][..., queries, :]
        # numbers are relative positions
        scores = scores + mask if mask.is_floating_point() else scores.masked_fill(~mask, -torch.inf)
    probabilities: Tensor = scores.softmax(-1)
    return probabilities


def _some(count: int, most: int) -> slice:
    return slice(None, None, -(-count // most))


class HeadSimilarity(_OfCalls):
    """Heads that attend to the same places (``head_similarity``, to be large), over every attention."""

    name = "head_similarity"
    names = frozenset({*ATTENTION, "softmax"})
    missing = "the network has no attention of several heads"

    def values(self, calls: Sequence[Call]) -> list[Tensor]:
        """The similarity of each attention's heads."""
        maps = [_attention(call) for call in calls]
        return [head_similarity(each).mean() for each in maps if each is not None]


class _OfInput:
    """A loss of the network's input alone."""

    name: str
    loss: Callable[[Tensor], Tensor]

    def reason(self, teacher: Teacher) -> str | None:
        """Any network with images as its input will do."""
        return None

    @contextmanager
    def watch(self, teacher: Teacher) -> Iterator[Callable[[], Tensor]]:
        """The loss over the most recent forward pass of the teacher."""
        with capture_inputs({"input": teacher.model}) as seen:
            yield lambda: type(self).loss(seen.pop("input"))


class TotalVariation(_OfInput):
    """Neighbouring pixels alike (``total_variation`` of the network's input)."""

    name = "total_variation"
    loss = staticmethod(total_variation)

    def reason(self, teacher: Teacher) -> str | None:
        """None where pixels have neighbours both ways."""
        return None if min(teacher.facts.input_size[1:]) > 1 else "images are one pixel high or wide"


class ImageNorm(_OfInput):
    """Pixels near the mean (``squared_norm`` of the network's input)."""

    name = "image_norm"
    loss = staticmethod(squared_norm)


class PriorSum:
    """Weighted sum of priors; they add up, they do not switch.

    Args:
        parts: priors with their weights; none where a network tells nothing, whose sum is 0.
    """

    name = "sum"

    def __init__(self, parts: Sequence[tuple[float, Prior]]) -> None:
        self.parts = list(parts)

    @contextmanager
    def watch(self, teacher: Teacher) -> Iterator[Callable[[], Tensor]]:
        """The sum over the most recent forward pass of the teacher."""
        with ExitStack() as stack:
            losses = [(weight, stack.enter_context(prior.watch(teacher))) for weight, prior in self.parts]
            nothing = torch.zeros((), device=device_of(teacher.model))
            yield lambda: sum((weight * part() for weight, part in losses), nothing)


def choose_priors(settings: GeneratorSettings, teacher: Teacher) -> tuple[PriorSum, list[str]]:
    """The priors that a network admits, at the weights of the settings, and a sentence for each decision.

    Args:
        settings: the weights; 0 leaves a prior out.
        teacher: the network and what is known of its images.

    Raises:
        ModelError: the network was never trained, or a prior that was asked for can't be used.
        SettingsError: the network's statistics were left out and nothing takes their place.
    """
    statistics = BNStatistics(settings.bn_units == "relative")
    parts: list[tuple[float, Prior]] = [
        (settings.gamma, statistics),
        (settings.patch_similarity, PatchSimilarity()),
        (settings.head_similarity, HeadSimilarity()),
        (settings.tv, TotalVariation()),
        (settings.image_norm, ImageNorm()),
    ]
    notes = []
    if not teacher.batch_norms:
        notes.append(f"prior {statistics.name} is left out: {statistics.reason(teacher)}")
        parts = parts[1:]
    elif settings.gamma == settings.patch_similarity == settings.head_similarity == 0:
        raise SettingsError(
            "gamma = 0 leaves no prior that knows the training images; give gamma, patch_similarity or "
            "head_similarity a positive weight, or use method 'noise'"
        )
    parts = [(weight, prior) for weight, prior in parts if weight > 0]
    for weight, prior in parts:
        if (why := prior.reason(teacher)) is not None:
            raise ModelError(
                f"prior {prior.name!r} can't be used: {why}; leave it out, or use method 'noise'"
            )
        notes.append(f"prior {prior.name} has weight {weight:g}")
    return PriorSum(parts), notes
