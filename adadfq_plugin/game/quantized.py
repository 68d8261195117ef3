"""Q, the player that is trained to agree with P."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adadfq_plugin.config import Settings
from adadfq_plugin.contracts import Phase, Prepared
from adadfq_plugin.functional import feature_loss, kl_divergence_loss, quantized_loss
from adadfq_plugin.game.biases import SteadyMeans
from adadfq_plugin.game.optimizing import finite_step
from adadfq_plugin.game.pace import BATCH, Pace
from adadfq_plugin.teacher import Teacher

__all__ = ["QuantizedPlayer", "default_rate", "default_step_rate", "feature_weight", "in_pieces"]


RATE = 0.005
"""Default learning rate of the weights under Adam, in quantization steps of each channel, from 32 images a step."""
FEATURES = {2: 10.0, 3: 10.0, 4: 10.0, 5: 10.0}
"""Default weight of the activations' loss by the narrowest width; none where it isn't named."""
SAME = 1e-3
"""Mean difference of logits, in their standard deviations, up to which two networks are the same."""


def default_step_rate(bits: int) -> float:
    """Learning rate of the logarithms of the step sizes: fewer levels, more to gain.

    Example:
        >>> default_step_rate(4), default_step_rate(8)
        (0.0005, 3.125e-05)
    """
    return 5e-4 * 2.0 ** (4 - bits)


def default_rate(images: int) -> float:
    """Learning rate of the weights: fewer images a step, noisier gradients, of which Adam keeps the sign alone.

    Example:
        >>> default_rate(64), default_rate(8)
        (0.005, 0.00125)
    """
    return RATE * min(1.0, images / BATCH)


def feature_weight(settings: Settings, bits: int) -> float:
    """Weight of the activations' loss: what is set, else by the narrowest width."""
    return FEATURES.get(bits, 0.0) if settings.feature_weight is None else settings.feature_weight


def in_pieces(network: Callable[[Tensor], Tensor], images: Tensor, size: int = 4) -> Tensor:
    """The logits of a network that treats each image alone, run again for the gradient, piece by piece.

    Nothing is kept between the two passes but the images: P's graph and Q's together are what fills the memory.

    Args:
        network: images to logits.
        images: (N, C, H, W).
        size: images a piece.

    Returns:
        logits (N, classes).
    """
    pieces = [
        checkpoint(network, piece, use_reentrant=False, preserve_rng_state=False)
        for piece in images.split(size)
    ]
    return torch.cat(pieces)


class QuantizedPlayer:
    """Loss, optimiser and schedule of Q; step sizes learn beside the weights.

    Adam's rate is a fraction of each channel's quantization step: with BatchNorm folded, the weights of
    different channels differ by orders of magnitude, and one absolute rate would wipe out the small ones.

    Args:
        prepared: the private copy of the prepared network.
        teacher: P.
        settings: losses and rates.
        pace: the phase that the schedule follows.
        reference: Q before its weights were changed, whose activations Q's are to match; None: as it is now.
        images: how many come in a step.
        means: what keeps the outputs' means where the weights put them; None: nothing does.
    """

    def __init__(
        self,
        prepared: Prepared,
        teacher: Teacher,
        settings: Settings,
        pace: Pace,
        reference: Prepared | None = None,
        images: int = BATCH,
        means: SteadyMeans | None = None,
    ) -> None:
        self.prepared, self.teacher, self.settings, self.pace = prepared, teacher, settings, pace
        self.feature_weight = feature_weight(settings, prepared.lowest_bits)
        self._reference = (reference or prepared.reference()) if self.feature_weight else None
        self._means = means
        self._teaches: bool | None = None
        self._of_p: Mapping[str, Tensor] = {}
        self._of_q: Mapping[str, Tensor] = {}
        steps = list(prepared.steps()) if settings.learn_step_sizes else []
        for step in steps:
            step.requires_grad_(True)
        rate = settings.learning_rate or default_rate(images)
        self.parameters: list[nn.Parameter] = [*prepared.weights(), *steps]
        groups = [{"params": list(prepared.weights()), "lr": rate, "weight_decay": settings.weight_decay}]
        if steps:
            relative = settings.step_size_learning_rate or default_step_rate(prepared.lowest_bits)
            groups.append({"params": steps, "lr": relative, "weight_decay": 0.0})
        self.optimizer: torch.optim.Optimizer
        if settings.optimizer == "adam":
            self.optimizer = torch.optim.Adam(groups, fused=True)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True)
            for parameter in self.parameters:  # a first step that is left out would leave them to chance
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        self._units = list(prepared.weight_units()) if settings.optimizer == "adam" else []
        self._skipped: int | Tensor = 0
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    @property
    def skipped(self) -> int:
        """Updates left out, for their gradients were not finite."""
        return int(self._skipped)

    @property
    def rates(self) -> str:
        """What it learns at, and from, in words."""
        rates = [
            f"{rate:.3g} of {what}"
            for rate, what in zip(self._rates, ("weights", "step sizes"), strict=False)
        ]
        weight = f", activations weighing {self.feature_weight:g}" if self.feature_weight else ""
        return f"rate {' and '.join(rates)}{weight}"

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Q in training for the length of the ``with``, its activations watched where they count."""
        with self.prepared.phase(Phase.TRAIN):
            if self._reference is None:
                yield
                return
            with (
                self._reference.phase(Phase.FLOAT),
                self._reference.activations() as self._of_p,
                self.prepared.activations() as self._of_q,
            ):
                yield

    @torch.no_grad()
    def answers(self, images: Tensor) -> Tensor:
        """P's logits of images that Q is going to see, and the activations that Q's are to match.

        Both come from one pass through Q's own unquantized copy, unless the teacher is another network.
        """
        if self._reference is None:
            return self.teacher(images)
        own: Tensor = self._reference.module(images)
        if self._teaches is None:
            z_p = self.teacher(images)
            self._teaches = bool((own - z_p).abs().mean() <= SAME * z_p.std())
        return own if self._teaches else self.teacher(images)

    def loss(self, z_p: Tensor, z_q: Tensor) -> Tensor:
        """What Q minimises on one batch that it and :meth:`answers` have seen; no gradient reaches P."""
        match = kl_divergence_loss if self.settings.loss == "kl" else quantized_loss
        loss = match(z_p.detach(), z_q, temperature=self.settings.temperature)
        if not self._of_p:  # of no weight, or no activation is quantized
            return loss
        names = list(self._of_p)
        features = feature_loss([self._of_p[name] for name in names], [self._of_q[name] for name in names])
        return loss + self.feature_weight * features

    def learn(self, images: Tensor, size: int | None = None) -> Tensor:
        """One update from a batch of images; the loss on it.

        Args:
            images: (N, C, H, W).
            size: images whose graph is kept at a time; None: all. Graphs of large images are what fills the memory.
        """
        total = images.new_zeros(())
        gradients: list[Tensor | None] = [None] * len(self.parameters)
        for piece in images.split(size or len(images)):
            z_p = self.answers(piece)
            loss = self.loss(z_p, self.prepared.module(piece)) * (len(piece) / len(images))
            found = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            gradients = [
                old if more is None else more if old is None else old + more
                for old, more in zip(gradients, found, strict=True)
            ]
            total += loss.detach()
        self.update(gradients)
        return total

    def update(self, gradients: Sequence[Tensor | None]) -> None:
        """One update from gradients in the order of ``parameters``; none from gradients that are not finite.

        A division by an activation that was rounded to zero makes them so.
        """
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._decay()
        before = [parameter.detach().clone() for parameter in self.parameters[: len(self._units)]]
        self._skipped += finite_step(self.optimizer, self.parameters, gradients)
        with torch.no_grad():
            for parameter, old, unit in zip(self.parameters, before, self._units, strict=False):
                parameter.copy_(torch.addcmul(old, parameter - old, unit))
        if self._means is not None:
            self._means.follow()

    def _decay(self) -> float:
        fraction = self.pace.fraction
        if self.settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * fraction))
        return math.pow(0.1, sum(fraction >= stage for stage in self.settings.stages))
