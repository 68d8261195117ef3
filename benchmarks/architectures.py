"""timm's registry: its architectures by family, by size, and on the smallest input that they take."""

from contextlib import suppress
from typing import Any, cast

import timm
import torch
from torch import nn

from adadfq_plugin.hooks import fork_rng

_SMALL_SIDES = (96, 112, 126, 128, 192)
"""Multiples of 32 or 16, and of 14 for patches of that size."""


def families() -> list[str]:
    """Return the names of timm's model modules that have registered architectures, sorted."""
    return sorted(family for family in timm.list_modules() if timm.list_models(module=family))


def architectures() -> list[str]:
    """Return the names of timm's architectures, without its own test architectures (``test_*``), sorted."""
    return [name for name in sorted(timm.list_models()) if not name.startswith("test_")]


def family_of(name: str) -> str:
    """Return the family of an architecture: the name of the module that registers it."""
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


def count_parameters(name: str) -> int:
    """Return the number of an architecture's parameters; it is built without memory for them."""
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False)
    return sum(parameter.numel() for parameter in model.parameters())


def smallest_architecture(family: str) -> tuple[str, int]:
    """Return the architecture of a family with the fewest parameters, and their number.

    timm's own test architectures (``test_*``) do not count. The models are built without memory for their weights.

    Args:
        family: One of `families`.

    Raises:
        ValueError: No architecture of the family can be built.
    """
    sizes: dict[str, int] = {}
    for name in timm.list_models(module=family):
        if name.startswith("test_"):
            continue
        with suppress(Exception):  # some architectures need weights or optional packages to be built
            sizes[name] = count_parameters(name)
    if not sizes:
        raise ValueError(f"no architecture of timm's family {family!r} can be built")
    name = min(sizes, key=lambda key: (sizes[key], key))
    return name, sizes[name]


@torch.no_grad()
def smallest_model(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """Return an architecture with random weights, in eval mode, and the smallest of a few input sizes it runs with.

    Args:
        name: One of `architectures`. Where its input size is fixed, it is built for a smaller one, if timm can.

    Raises:
        Exception: The model doesn't even run with the size that it is meant for; whatever it raises.
    """

    def built(**arguments: Any) -> nn.Module:
        with fork_rng(0):
            made: nn.Module = timm.create_model(name, pretrained=False, **arguments)
        return made.eval()

    model = built()
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    channels, height, width = cast(tuple[int, int, int], config.get("input_size") or (3, 224, 224))
    for side in _SMALL_SIDES:
        if side >= min(height, width):
            break
        try:
            smaller = built(img_size=side) if config.get("fixed_input_size") else model
            smaller(torch.zeros(2, channels, side, side))
        except Exception:  # too small for this architecture, or it can't be built for another size
            continue
        return smaller, (channels, side, side)
    model(torch.zeros(2, channels, height, width))
    return model, (channels, height, width)
