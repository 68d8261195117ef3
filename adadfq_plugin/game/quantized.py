"""Q, the player that is trained to agree with P."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from adadfq_plugin.config import Settings
from adadfq_plugin.contracts import Prepared
from adadfq_plugin.functional import kl_divergence_loss, quantized_loss
from adadfq_plugin.game.pace import Pace

__all__ = ["QuantizedPlayer", "default_step_rate", "in_pieces"]


RATE = 0.005
"""Default learning rate of the weights under Adam, in quantization steps of each channel."""


def default_step_rate(bits: int) -> float:
    """Learning rate of the logarithms of the step sizes: fewer levels, more to gain.

    Example:
        >>> default_step_rate(4), default_step_rate(8)
        (0.0005, 3.125e-05)
    """
    return 5e-4 * 2.0 ** (4 - bits)


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
        settings: losses and rates.
        pace: the phase that the schedule follows.
    """

    def __init__(self, prepared: Prepared, settings: Settings, pace: Pace) -> None:
        self.prepared, self.settings, self.pace = prepared, settings, pace
        steps = list(prepared.steps()) if settings.learn_step_sizes else []
        for step in steps:
            step.requires_grad_(True)
        rate = settings.learning_rate or RATE
        self.parameters: list[nn.Parameter] = [*prepared.weights(), *steps]
        groups = [{"params": list(prepared.weights()), "lr": rate, "weight_decay": settings.weight_decay}]
        if steps:
            relative = settings.step_size_learning_rate or default_step_rate(prepared.lowest_bits)
            groups.append({"params": steps, "lr": relative, "weight_decay": 0.0})
        self.optimizer: torch.optim.Optimizer
        if settings.optimizer == "adam":
            self.optimizer = torch.optim.Adam(groups)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True)
        self._units = list(prepared.weight_units()) if settings.optimizer == "adam" else []
        self.skipped = 0
        """Updates left out, for their gradients were not finite."""
        self._rates = [group["lr"] for group in self.optimizer.param_groups]

    def loss(self, z_p: Tensor, z_q: Tensor) -> Tensor:
        """What Q minimises on one batch; no gradient reaches P."""
        if self.settings.loss == "kl":
            return kl_divergence_loss(z_p.detach(), z_q, temperature=self.settings.temperature)
        return quantized_loss(z_p.detach(), z_q, temperature=self.settings.temperature)

    def step(self, loss: Tensor) -> None:
        """One update from a loss whose graph leads to Q."""
        self.update(torch.autograd.grad(loss, self.parameters, allow_unused=True))

    def update(self, gradients: Sequence[Tensor | None]) -> None:
        """One update from gradients in the order of ``parameters``; none from gradients that are not finite.

        A division by an activation that was rounded to zero makes them so.
        """
        known = [gradient for gradient in gradients if gradient is not None]
        if not bool(torch.isfinite(nn.utils.get_total_norm(known))):
            self.skipped += 1
            return
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * self._decay()
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient
        before = [parameter.detach().clone() for parameter in self.parameters[: len(self._units)]]
        self.optimizer.step()
        with torch.no_grad():
            for parameter, old, unit in zip(self.parameters, before, self._units, strict=False):
                parameter.copy_(torch.addcmul(old, parameter - old, unit))
        self.optimizer.zero_grad(set_to_none=True)

    def _decay(self) -> float:
        fraction = self.pace.fraction
        if self.settings.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * fraction))
        return math.pow(0.1, sum(fraction >= stage for stage in self.settings.stages))
