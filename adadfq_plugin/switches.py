"""A toolkit's own observers and fake quantizers: which can be learned, and what they do in each phase."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adadfq_plugin.errors import ModelError
from adadfq_plugin.fake_quantize import LearnedQuantizer
from adadfq_plugin.hooks import kept_buffers

__all__ = ["has_own_rule", "own_rules_note", "refuse_dynamic", "switched"]


def refuse_dynamic(named: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuses quantizers that take the range of each batch.

    Args:
        named: a toolkit's quantizers, by name.

    Raises:
        ModelError: the first that does, by name.
    """
    for name, each in named:
        if getattr(each, "is_dynamic", False):
            raise ModelError(
                f"{name!r} takes the range of each batch as it comes (is_dynamic=True): no calibration reaches it; "
                "prepare the model with a static configuration, or convert it as it is"
            )


def has_own_rule(quantizer: nn.Module, package: str) -> bool:
    """Whether a fake quantizer, or the observer in it, rounds or takes its range as neither we nor a toolkit do.

    Args:
        quantizer: a fake quantizer.
        package: dotted name of the toolkit's package.
    """
    rules = [
        getattr(type(each), name, None)
        for each in (quantizer, getattr(quantizer, "activation_post_process", quantizer))
        if not isinstance(each, LearnedQuantizer)
        for name in ("forward", "calculate_qparams")
    ]
    known = (f"{package}.", "torch.nn.")
    return any(rule is not None and not f"{rule.__module__}.".startswith(known) for rule in rules)


def own_rules_note(names: Collection[str]) -> list[str]:
    """A sentence about classes of quantizers with rules of their own, where there are any."""
    if not names:
        return []
    return [
        f"quantizers of the model's own stay ({', '.join(sorted(names))}): their ranges are what they make of the "
        "samples, and are not trained"
    ]


def _forget(observer: nn.Module) -> None:
    """Takes from a toolkit's observer what it has seen."""
    per_channel = hasattr(observer, "ch_axis")
    for name, nothing in (("min_val", torch.inf), ("max_val", -torch.inf), ("histogram", 0.0)):
        seen = getattr(observer, name, None)
        if isinstance(seen, Tensor):
            seen.resize_(0) if per_channel else seen.fill_(nothing)


@contextmanager
def switched(
    quantizers: Iterable[Any], observers: Iterable[nn.Module], *, observe: bool, quantize: bool
) -> Iterator[None]:
    """Switches fake quantizers of either toolkit, and puts each of its switches back afterwards.

    Args:
        quantizers: modules with torch.ao's or torchao's toggles.
        observers: those that have none.
        observe: whether both see what passes; they forget what they saw before, and learned ones keep a sample.
        quantize: whether it is rounded.
    """
    before = [(each, each.observer_enabled.clone(), each.fake_quant_enabled.clone()) for each in quantizers]
    learned = [each for each, *_ in before if isinstance(each, LearnedQuantizer)]
    with ExitStack() as kept:
        for observer in observers:
            if observe:
                _forget(observer)
            else:
                kept.enter_context(kept_buffers(observer))
        for each, *_ in before:
            each.enable_observer(observe)
            each.enable_fake_quant(quantize)
        for each in learned:
            each.sampling = observe
            if observe:
                each.reset()
        try:
            yield
        finally:
            for each, observer_was, fake_quant_was in before:
                each.observer_enabled.copy_(observer_was)
                each.fake_quant_enabled.copy_(fake_quant_was)
            for each in learned:
                each.sampling = False
