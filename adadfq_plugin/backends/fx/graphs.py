"""FX graphs: torch.ao's notes on prepared ones, their modules, and what their nodes call."""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.ao.quantization.fake_quantize import FakeQuantizeBase
from torch.ao.quantization.observer import ObserverBase
from torch.fx import GraphModule, Node

from adadfq_plugin.sites import replace_module

__all__ = [
    "ATTRIBUTES",
    "INTEGER",
    "MEANS",
    "MOVES",
    "POOLINGS",
    "VIEWS",
    "called",
    "free_name",
    "is_quantizer",
    "module_of",
    "prepared_attributes",
    "quantizer_nodes",
    "separate_calls",
]

ATTRIBUTES = "_observed_graph_module_attrs"
INTEGER = (torch.quint8, torch.qint8)
_ADAPTIVE: dict[Any, str] = {
    nn.AdaptiveAvgPool1d: "torch.nn.functional.adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "torch.nn.functional.adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "torch.nn.functional.adaptive_avg_pool3d",
    F.adaptive_avg_pool2d: "torch.nn.functional.adaptive_avg_pool2d",
}
POOLINGS = (*_ADAPTIVE, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, F.avg_pool2d)
MEANS: dict[Any, str] = {**_ADAPTIVE, torch.mean: "torch.mean", "mean": ".mean"}
"""Averages of so many numbers that they use few of the levels of these, which their integer kernels would give them;
with the name that `in_float` calls each by."""
VIEWS = (
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "contiguous"),
    *("select", "narrow", "expand", "split", "split_with_sizes", "chunk", "unbind"),
    *("unflatten", "movedim", "swapaxes"),
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze),
    *(torch.select, torch.narrow, torch.split, torch.split_with_sizes, torch.chunk, torch.unbind),
    *(torch.movedim, torch.swapaxes, operator.getitem, F.dropout, nn.Dropout, nn.Identity, nn.Flatten),
)
"""What may give a tensor's own memory on: writing there changes the tensor."""
MOVES = (
    *VIEWS,
    *("clone", "index_select", "gather", "roll", "flip", "repeat"),
    *(torch.index_select, torch.gather, torch.roll, torch.flip, F.pad),
)
"""What gives the values of tensors, or some of them, elsewhere."""


def prepared_attributes(model: nn.Module) -> Any:
    """torch.ao's notes on a prepared FX model, or None if it isn't one; torchao leaves its own in the same place."""
    if not isinstance(model, GraphModule) or any(map(_is_exported, model.graph.nodes)):
        return None
    return model.meta.get(ATTRIBUTES)


def _is_exported(node: Node) -> bool:
    """Whether a call comes from torch.export, which writes ATen's operators."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "aten"


def is_quantizer(module: nn.Module) -> bool:
    """Whether torch.ao takes the module for an observer or a fake quantizer."""
    return isinstance(module, ObserverBase | FakeQuantizeBase)


def module_of(model: GraphModule, node: Node) -> nn.Module | None:
    """The module that a node calls; None where it calls none."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def called(model: GraphModule, node: Node) -> object:
    """The function, the method's name, or the module's class."""
    module = module_of(model, node)
    return node.target if module is None else type(module)


def quantizer_nodes(model: GraphModule) -> list[Node]:
    """The calls of observers and fake quantizers of activations."""
    modules = ((node, module_of(model, node)) for node in model.graph.nodes)
    return [node for node, module in modules if module is not None and is_quantizer(module)]


def free_name(model: nn.Module, path: str) -> str:
    """The name of a place beside ``path`` that nothing has."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    return next(f"{path}_{i}" for i in itertools.count(1) if not hasattr(owner, f"{name}_{i}"))


def separate_calls(model: GraphModule, concerned: Callable[[Node, nn.Module], bool]) -> dict[str, str]:
    """Gives each further call of a module a copy of its own, in place.

    Args:
        model: a float or a prepared model.
        concerned: whether a call of a module counts; the others share the module still.

    Returns:
        the name of the module that each copy was made of.
    """
    seen, origins = set[nn.Module](), dict[str, str]()
    for node in model.graph.nodes:
        module = module_of(model, node)
        if module is None or not concerned(node, module):
            continue
        if module in seen:
            path = str(node.target)
            node.target = name = free_name(model, path)
            replace_module(model, name, copy.deepcopy(module))
            origins[name] = path
        seen.add(module)
    model.recompile()
    return origins
