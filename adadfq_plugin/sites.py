"""Places of modules in a network's tree, of no toolkit."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.fx import GraphModule

__all__ = ["replace_module", "sites", "take_over"]


def sites(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every place of a module in the tree, a shared module at each of its places."""
    yield from model.named_modules(remove_duplicate=False)


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Puts ``new`` in the place ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, new)


def take_over(original: GraphModule, work: GraphModule) -> None:
    """Makes a graph what another one is, in place, its modules in the modes of before.

    Args:
        original: gets the graph, the modules, and the parameters and buffers that no module holds.
        work: whose these are; nobody else may go on using it.
    """
    modes = {path: module.training for path, module in sites(original)}
    for path, module in sites(work):
        module.training = modes.get(path, original.training)
    for kind in ("_modules", "_parameters", "_buffers"):
        setattr(original, kind, getattr(work, kind))
    original.graph = work.graph
