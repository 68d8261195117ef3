"""G, the player that makes the samples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from adadfq_plugin.config import AdaDFQSettings, GeneratorSettings
from adadfq_plugin.errors import ModelError
from adadfq_plugin.functional import (
    balance_loss,
    disagreement_information,
    generator_loss,
    margin_loss,
    normalized_information,
)
from adadfq_plugin.game.optimizing import finite_step, laid_out
from adadfq_plugin.game.pace import Pace
from adadfq_plugin.game.pool import augment
from adadfq_plugin.generators import Generator, coloured, natural_noise, whitened
from adadfq_plugin.priors import BNStatistics, choose_priors
from adadfq_plugin.teacher import Teacher
from adadfq_plugin.transfers import Figures, sent

__all__ = ["GeneratorPlayer"]

LABEL = 0.2
"""Weight of the label in the loss of refined images; the statistics are what Q's training feels."""
NATURAL = 0.95
"""Default share of natural noise in G's images, where no BatchNorm tells the statistics of photographs."""

FALLS = 1.0, 0.0
"""Exponents of the spectrum whose coefficients are refined: 1 of photographs, 0 for pixels. Batches take turns: images
of one kind have the faults of their kind, and Q fits these."""


class GeneratorPlayer:
    """The generator with its optimiser, trained against the frozen teacher.

    Args:
        teacher: P.
        settings: sizes, rates and weights.
        batch_size: images a step.
        rng: source of latent vectors and labels, on the CPU.
        device: where to run.

    Raises:
        ModelError: the teacher was never trained, doesn't admit a prior that was asked for, or gives its answers no
            gradient.
    """

    def __init__(
        self,
        teacher: Teacher,
        settings: GeneratorSettings,
        batch_size: int,
        rng: torch.Generator,
        device: torch.device,
    ) -> None:
        self.teacher, self.settings, self.batch_size, self._rng = teacher, settings, batch_size, rng
        self.prior, self.notes = choose_priors(settings, teacher)
        if not teacher(teacher.noise(2).requires_grad_()).requires_grad:
            raise ModelError(
                "the logits have no gradient for the images: the network detaches what it computes, or does it under "
                "torch.no_grad(); take that out of its forward (requires_grad_(False) freezes weights), or use method "
                "'noise'"
            )
        known = any(isinstance(prior, BNStatistics) for _, prior in self.prior.parts)
        self.natural = settings.natural if settings.natural is not None else 0.0 if known else NATURAL
        if self.natural:
            self.notes = [*self.notes, f"natural noise has a share of {self.natural:g} of G's images"]
        self.generator = Generator(teacher.facts, settings.latent_dim, settings.generator_width).to(device)
        if teacher.channels_last:
            self.generator.to(memory_format=torch.channels_last)
        self.parameters = list(self.generator.parameters())
        self._falls = itertools.cycle(FALLS)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        reach = teacher.facts.to_standard(self.generator.highest) - teacher.facts.to_standard(
            self.generator.lowest
        )
        self._refine_rate = settings.refine_rate * reach.mean().item()
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=settings.generator_learning_rate, betas=(0.5, 0.999), fused=True
        )

    @property
    def skipped(self) -> int:
        """Updates left out, in part at least, for their gradients were not finite."""
        return int(self._skipped)

    @contextmanager
    def watching(self) -> Iterator[Callable[[], Tensor]]:
        """The prior's loss over P's most recent forward pass."""
        with self.prior.watch(self.teacher) as loss:
            yield loss

    def make(self) -> tuple[Tensor, Tensor]:
        """A batch of images, with the graph that leads to G, and their labels."""
        z, labels = self.generator.sample(self.batch_size, self._rng)
        images = self.generator(z, labels)
        if self.natural:
            facts = self.teacher.facts
            noise = sent(natural_noise(facts, self.batch_size, self._rng), images)
            share = math.sqrt(1 - self.natural**2)  # the deviation stays about 1
            blend = self.natural * noise + share * facts.to_standard(images)
            images = self.generator.clip(facts.from_standard(blend))
        return images, labels

    @torch.no_grad()
    def sample(self) -> tuple[Tensor, Tensor]:
        """A batch of images and labels without a graph."""
        return self.make()

    def warm_up(self, prior: Callable[[], Tensor], pace: Pace) -> Figures:
        """One step without Q: the prior, and labels that P recognises."""
        images, labels = self.make()
        loss, figures = self._recognised(prior, self.teacher(images), labels)
        self._step(torch.autograd.grad(loss, self.parameters), pace.fraction)
        return figures

    def kept(
        self,
        prior: Callable[[], Tensor],
        pace: Pace,
    ) -> tuple[Tensor, Tensor, Figures]:
        """A new batch, refined: images, labels and figures; see :meth:`refine`."""
        images, labels = self.sample()
        refined, figures = self.refine(prior, images, labels, pace)
        return refined, labels, figures

    def refine(
        self,
        prior: Callable[[], Tensor],
        images: Tensor,
        labels: Tensor,
        pace: Pace,
    ) -> tuple[Tensor, Figures]:
        """The images themselves go down the prior's loss and a little of the labels': a short training of G lacks it.

        Every other batch moves in pixels, the others in the spectrum of photographs.

        Args:
            prior: the prior's loss over P's forward pass.
            images: (N, C, H, W) as G made them.
            labels: the labels that G was given (N,).
            pace: steps of Adam, each on another view of every image.

        Returns:
            the images, valid pixels still, and the figures of the last step.
        """
        fall, facts = next(self._falls), self.teacher.facts
        if pace.total == 0:
            return images.detach(), {}
        white = whitened(facts.to_standard(images.detach()), fall).requires_grad_(True)

        def seen() -> Tensor:
            return facts.from_standard(coloured(white, fall))

        figures: Figures = {}
        optimizer = torch.optim.Adam([white], lr=self._refine_rate, betas=(0.5, 0.999), fused=True)
        for _ in pace:
            share = 0.5 * (1 + math.cos(math.pi * pace.fraction))
            optimizer.param_groups[0]["lr"] = self._refine_rate * share
            pixels = seen()
            valid = pixels + (self.generator.clip(pixels) - pixels).detach()  # clipped ones may come back
            loss, figures = self._recognised(prior, self.teacher(augment(valid, self._rng)), labels, LABEL)
            (gradient,) = torch.autograd.grad(loss, white)
            self._skipped += ~gradient.isfinite().all()
            white.grad = laid_out(gradient.nan_to_num(0.0, 0.0, 0.0), white)
            optimizer.step()
        return self.generator.clip(seen().detach()), figures

    def _recognised(
        self, prior: Callable[[], Tensor], z_p: Tensor, labels: Tensor, weight: float = 1.0
    ) -> tuple[Tensor, Figures]:
        classification, statistics = nn.functional.cross_entropy(z_p, labels), prior()
        figures = {"prior": statistics.detach(), "cross_entropy": classification.detach()}
        return statistics + weight * classification, figures

    def play(
        self, prior: Callable[[], Tensor], z_p: Tensor, z_q: Tensor, labels: Tensor, *, keep_graph: bool
    ) -> tuple[list[Tensor], Figures]:
        """Gradients of G's loss on a batch that both networks have seen.

        Args:
            prior: the prior's loss over P's forward pass of this batch.
            z_p: logits of P, with the graph that leads to G.
            z_q: logits of Q, likewise.
            labels: the labels that G was given.
            keep_graph: whether Q is to learn from the same forward pass; it takes memory.

        Returns:
            gradients in the order of ``parameters``, and the figures of the step.
        """
        settings = self.settings
        assert isinstance(settings, AdaDFQSettings)
        information = normalized_information(disagreement_information(z_p, z_q), z_p.shape[1])
        margin = margin_loss(information, settings.lambda_l, settings.lambda_u)
        balance = balance_loss(z_p, z_q, labels, alpha_ds=settings.alpha_ds, alpha_as=settings.alpha_as)
        statistics = prior()
        loss = generator_loss(margin, balance, statistics, beta=settings.beta, gamma=1.0)
        figures = {
            "margin": margin.detach(),
            "balance": balance.detach(),
            "prior": statistics.detach(),
            "information": information.detach().mean(),
        }
        gradients = torch.autograd.grad(loss, self.parameters, retain_graph=keep_graph)
        return list(gradients), figures

    def update(self, gradients: list[Tensor]) -> None:
        """One update in the game: from gradients in the order of ``parameters``, at the rate it has cooled to."""
        self._apply(gradients, self.settings.generator_cooling)

    def _step(self, gradients: tuple[Tensor, ...], fraction: float) -> None:
        self._apply(list(gradients), 1 - (1 - self.settings.generator_cooling) * fraction)

    def _apply(self, gradients: list[Tensor], rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.generator_learning_rate * rate
        self._skipped += finite_step(self.optimizer, self.parameters, gradients)
