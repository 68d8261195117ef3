"""What a trained network says about its training images: losses that hook into the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from adadfq_plugin.errors import ModelError, SettingsError
from adadfq_plugin.functional import bn_statistics_loss, channel_moments, total_variation
from adadfq_plugin.hooks import capture_inputs

__all__ = ["BNStatistics", "PriorSum", "TotalVariation", "batch_norms"]

SMALLEST = 1e-8
"""Keeps the gradient of a deviation finite where a channel is constant."""


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm layers that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    }


class BNStatistics:
    r"""Batch statistics in front of each BatchNorm as its running ones (``bn_statistics_loss``).

    Args:
        relative: measure each channel in units of its own running deviation, so that no channel or layer
            outweighs the others: :math:`((\mu - \hat\mu) / \hat\sigma)^2 + (\sigma / \hat\sigma - 1)^2`.
            False is the paper's loss, in the activations' own units.
    """

    name = "bn_statistics"

    def __init__(self, relative: bool = True) -> None:
        self.relative = relative

    def reason(self, model: nn.Module) -> str | None:
        """Why this prior can't be used; None if it can."""
        layers = batch_norms(model)
        if not layers:
            return "the network has no BatchNorm layer that keeps running statistics"
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
    def watch(self, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """The loss over the most recent forward pass of ``model``."""
        layers = batch_norms(model)
        with capture_inputs(layers) as seen:

            def loss() -> Tensor:
                means, variances, running_means, running_variances = [], [], [], []
                for name, layer in layers.items():
                    mean, variance = channel_moments(seen[name])
                    expected, spread = cast(Tensor, layer.running_mean), cast(Tensor, layer.running_var)
                    if self.relative:
                        unit = (spread + cast(float, layer.eps)).sqrt()
                        mean, variance = (mean - expected) / unit, (variance + SMALLEST).sqrt() / unit
                        expected, spread = torch.zeros_like(unit), torch.ones_like(unit)
                    means.append(mean)
                    variances.append(variance)
                    running_means.append(expected)
                    running_variances.append(spread)
                return bn_statistics_loss(means, variances, running_means, running_variances)

            yield loss


class TotalVariation:
    """Neighbouring pixels alike (``total_variation`` of the network's input)."""

    name = "total_variation"

    def reason(self, model: nn.Module) -> str | None:
        """Any network with images as its input will do."""
        return None

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """The loss over the most recent forward pass of ``model``."""
        with capture_inputs({"input": model}) as seen:
            yield lambda: total_variation(seen["input"])


class PriorSum:
    """Weighted sum of the priors that a network admits; priors add up, they do not switch.

    Args:
        parts: priors with their weights; a weight of 0 leaves a prior out.
        model: the network.

    Raises:
        ModelError: a statistics prior was asked for and can't be used.
        SettingsError: none was asked for.
    """

    name = "sum"

    def __init__(
        self, parts: Sequence[tuple[float, BNStatistics | TotalVariation]], model: nn.Module
    ) -> None:
        self.parts = [(weight, prior) for weight, prior in parts if weight > 0]
        if not any(isinstance(prior, BNStatistics) for _, prior in self.parts):
            raise SettingsError(
                "gamma = 0 leaves no prior that knows the training images; give gamma a positive weight, or use "
                "method 'noise'"
            )
        for _, prior in self.parts:
            why = prior.reason(model)
            if why is not None:
                raise ModelError(
                    f"prior {prior.name!r} can't be used: {why}; pass teacher= a float model with trained "
                    "BatchNorm layers (prepare_fx and prepare_pt2e fold them away), or use method 'noise'"
                )

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[Callable[[], Tensor]]:
        """The sum over the most recent forward pass of ``model``."""
        with ExitStack() as stack:
            losses = [(weight, stack.enter_context(prior.watch(model))) for weight, prior in self.parts]

            def loss() -> Tensor:
                terms = [weight * part() for weight, part in losses]
                return torch.stack(terms).sum() if terms else torch.zeros(())

            yield loss
