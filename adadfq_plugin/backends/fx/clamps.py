"""Activations that a quantizer can bound by itself: ReLU6 and its kin behind a layer that has no fused form of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.fx.graphs import module_of, prepared_attributes
from adadfq_plugin.captures import argument

__all__ = ["absorb_clamps"]

HARDTANH = (nn.functional.hardtanh, nn.functional.hardtanh_)
CLAMP = (torch.clamp, torch.clamp_, "clamp", "clamp_")
RELU = (nn.functional.relu, torch.relu, torch.relu_, "relu", "relu_")


def absorb_clamps(model: GraphModule) -> None:
    """Removes each clamp between two uses of one quantizer, which takes over its bounds; in place.

    torch.ao observes what goes into an unfused ReLU6 and lets the output share the levels: of the levels of
    [-60, 40] only a tenth is left for [0, 6]. A quantizer of [0, 6] saturates where the activation would. Between calls
    that stay in float a clamp remains.

    Args:
        model: a prepared model with learned quantizers.
    """
    for node in list(model.graph.nodes):
        quantizer = _quantizer(model, node)
        # the lowest level of a symmetric one lies below every bound
        if quantizer is None or quantizer.symmetric or len(node.users) != 1:
            continue
        (clamp,) = node.users
        bounds = _bounds(model, clamp)
        again = list(clamp.users)
        # levels always include zero: bounds that don't would be lost
        if (
            bounds is None
            or not bounds[0] <= 0 <= bounds[1]
            or len(again) != 1
            or _quantizer(model, again[0]) is not quantizer
        ):
            continue
        if sum(_quantizer(model, other) is quantizer for other in model.graph.nodes) > 2:
            continue  # the levels are shared with a tensor that has no such bounds
        if all(_stays_in_float(model, other) for other in (*node.all_input_nodes, *again[0].users)):
            continue  # torch.ao converts no quantizer between such calls, and the bounds would go with it
        quantizer.limits = bounds
        again[0].replace_all_uses_with(node)
        model.graph.erase_node(again[0])
        model.graph.erase_node(clamp)
    model.recompile()


def _stays_in_float(model: GraphModule, node: Node) -> bool:
    """Whether the user's configuration leaves a call unquantized, as ``convert_fx`` asks it."""
    configured = prepared_attributes(model).node_name_to_qconfig
    return node.name in configured and configured[node.name] is None


def _quantizer(model: GraphModule, node: Node) -> LearnedFakeQuantize | None:
    module = module_of(model, node)
    return module if isinstance(module, LearnedFakeQuantize) else None


def _bounds(model: GraphModule, node: Node) -> tuple[float, float] | None:
    """The limits of a clamp with constant ones; None for everything else."""
    called: Any = node.target
    if (module := module_of(model, node)) is not None:
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return module.min_val, module.max_val
        return (0.0, math.inf) if type(module) is nn.ReLU else None
    if called in RELU:
        return 0.0, math.inf
    if called is nn.functional.relu6:
        return 0.0, 6.0
    if called in HARDTANH:
        names, unset = ("min_val", "max_val"), (-1.0, 1.0)
    elif called in CLAMP:
        names, unset = ("min", "max"), (-math.inf, math.inf)
    else:
        return None
    given = [
        argument(node.args, node.kwargs, place, name, default)
        for place, (name, default) in enumerate(zip(names, unset, strict=True), start=1)
    ]
    values = [default if value is None else value for value, default in zip(given, unset, strict=True)]
    low, high = values
    if not isinstance(low, int | float) or not isinstance(high, int | float):
        return None
    return float(low), float(high)
