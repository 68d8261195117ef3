"""Which state of Q is left: the best one on images that it did not learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adadfq_plugin.contracts import Prepared
from adadfq_plugin.functional import kl_divergence_loss
from adadfq_plugin.teacher import Teacher

__all__ = ["BestState"]

LOOKS = 8
"""How often Q is looked at on its way, beside the state that it starts from."""
MARGIN = 0.2
"""By how much the last state must be worse than the best one to be given up: few images judge them."""
SAME = 1e-4
"""Difference of two divergences, in nats at the training's temperature, that rounding makes of equal networks."""
PIECE = 16
"""Images a forward pass."""


class BestState:
    """Keeps the parameters at which Q's divergence from P was smallest; no label is asked for.

    It is a safety net: with rates that fall to zero the last state is nearly as good as any, or training did harm.

    Args:
        prepared: Q, whose phase is the caller's business.
        teacher: P.
        images: (N, C, H, W), none of which Q learns from.
        parameters: what Q's training changes.
        temperature: of the divergence, as in Q's training; at 1 a few images that P is sure of outweigh the rest.
    """

    def __init__(
        self,
        prepared: Prepared,
        teacher: Teacher,
        images: Tensor,
        parameters: Sequence[nn.Parameter],
        temperature: float,
    ) -> None:
        self._prepared, self._images, self._parameters = prepared, images, parameters
        self._temperature = temperature
        with torch.no_grad():
            self._z_p = torch.cat([teacher(piece) for piece in images.split(PIECE)])
        self._kept: list[Tensor] = []
        self.divergence, self.step = math.inf, 0
        self.latest, self.looked = math.inf, -1

    def due(self, step: int, total: int) -> bool:
        """Whether an eighth of the steps ends with this one."""
        return step * LOOKS // max(1, total) > (step - 1) * LOOKS // max(1, total)

    @torch.no_grad()
    def look(self, step: int) -> float:
        """The divergence after ``step`` steps, in nats; the state is kept if there was no better one."""
        z_q = torch.cat([self._prepared.module(piece) for piece in self._images.split(PIECE)])
        divergence = kl_divergence_loss(self._z_p, z_q, temperature=self._temperature).item()
        self.latest, self.looked = max(0.0, divergence) if math.isfinite(divergence) else math.inf, step
        if self.latest < self.divergence or not self._kept:
            self.divergence, self.step = self.latest, step
            self._kept = [parameter.detach().clone() for parameter in self._parameters]
        return divergence

    @torch.no_grad()
    def restore(self) -> bool:
        """Puts the best state back where the last one looked at is clearly worse; whether it was."""
        if self.latest <= (1 + MARGIN) * self.divergence + SAME:
            return False
        for parameter, kept in zip(self._parameters, self._kept, strict=True):
            parameter.copy_(kept)
        return True
