"""A calibrated FX model made ready for ``convert_fx``: its outputs stay what they were."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.intrinsic.modules.fused import _FusedModule
from torch.ao.quantization import QConfig
from torch.ao.quantization.observer import ObserverBase, PlaceholderObserver
from torch.fx import GraphModule, Node

from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.fx.graphs import (
    INTEGER,
    POOLINGS,
    called,
    free_name,
    module_of,
    prepared_attributes,
    quantizer_nodes,
)
from adadfq_plugin.ranges import levels_that_fit

__all__ = [
    "average_channels_last",
    "clamp_computed_weights",
    "narrow_observed_weight",
    "saturate_activations",
    "settle_weights",
    "weighted",
]

WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d)


def settle_weights(model: GraphModule, trainable: bool) -> None:
    """Weights beyond the last level: torch.ao's integer type would give them levels of their own. Ties: see settled."""
    layers = list(model.modules())
    fused = {weighted(layer) for layer in layers if weighted(layer) is not layer}
    found: list[tuple[LearnedFakeQuantize, nn.Parameter]] = []
    for layer in layers:
        module = weighted(layer)
        quantizer = getattr(module, "weight_fake_quant", None)
        if not trainable and layer not in fused:
            quantizer = _observed_weight(layer)
        weight = getattr(module, "weight", None)
        if isinstance(quantizer, LearnedFakeQuantize) and isinstance(weight, nn.Parameter):
            found.append((quantizer, weight))
    for quantizer, weight in found:  # all are observed by now: layers may share a weight
        weight.data.copy_(quantizer.settled(weight))


def weighted(layer: nn.Module | None) -> nn.Module | None:
    """The layer that has the weight: within what torch.ao has fused with an activation for its own observers."""
    fused = isinstance(layer, _FusedModule) and not isinstance(layer, WEIGHTED)
    return layer[0] if fused else layer  # type: ignore[index]


def narrow_observed_weight(layer: nn.Module | None, largest_activation: int) -> bool:
    """Levels that fit the kernel for a weight that torch.ao's own observer would give more; whether it was so."""
    make = _maker(layer)
    if make is None:
        return False
    observer = make()
    levels = observer.quant_min, observer.quant_max
    fitting = levels_that_fit(*levels, largest_activation)
    if fitting == levels:
        return False
    _let_make(layer, functools.partial(_with_levels, make, *fitting))
    return True


def _with_levels(make: Callable[[], Any], low: int, high: int) -> Any:
    made = make()
    for each in (made, getattr(made, "activation_post_process", made)):  # a fake quantizer asks its observer
        each.quant_min, each.quant_max = low, high
    return made


def _observed_weight(layer: nn.Module) -> LearnedFakeQuantize | None:
    """Fixes the range that torch.ao's own observer of the weight chooses (``prepare_fx``)."""
    make = _maker(layer)
    if make is None:
        return None
    weight: Any = weighted(layer).weight  # type: ignore[union-attr]
    observer = make().to(weight.device)
    observer(weight)
    quantizer = LearnedFakeQuantize.like(observer)
    quantizer.fix(*observer.calculate_qparams())
    where_converted = copy.deepcopy(quantizer).cpu()
    _let_make(layer, functools.partial(copy.deepcopy, where_converted))
    return quantizer


def _maker(layer: nn.Module | None) -> Callable[[], Any] | None:
    """What makes the observer of a layer's integer weight, where it has one of torch.ao's own."""
    qconfig = getattr(layer, "qconfig", None)
    if qconfig is None or not isinstance(weighted(layer), WEIGHTED):
        return None
    return qconfig.weight if getattr(qconfig.weight(), "dtype", None) in INTEGER else None


def _let_make(layer: nn.Module | None, make: Callable[[], Any]) -> None:
    assert layer is not None
    layer.qconfig = QConfig(activation=layer.qconfig.activation, weight=make)  # type: ignore[assignment,union-attr]


def _limits(module: nn.Module) -> tuple[float, float] | None:
    """Bounds of an activation whose levels are fewer than its integer type holds; None if all are used."""
    if isinstance(module, LearnedFakeQuantize):
        quantizer = module
    elif isinstance(module, ObserverBase) and not isinstance(module, PlaceholderObserver):
        if module.dtype not in INTEGER or getattr(module, "is_dynamic", False):
            return None
        quantizer = LearnedFakeQuantize.like(module)
        quantizer.fix(*module.calculate_qparams())
    else:
        return None
    if quantizer.per_channel or not quantizer.saturates_early():
        return None
    low, high = quantizer.bounds()
    return float(low), float(high)


def saturate_activations(model: GraphModule) -> None:
    """A clamp behind each quantizer of few levels: ``convert_fx`` keeps clamps, but not quant_max."""
    for node in quantizer_nodes(model):
        limits, source = _limits(model.get_submodule(str(node.target))), node.args[0]
        if limits is None or not isinstance(source, Node):
            continue
        users = list(node.users)
        if _is_saturated(users, limits) or _keeps_levels(model, source, node):
            continue
        with model.graph.inserting_after(node):
            clamp = model.graph.call_function(torch.clamp, (node, *limits))
        _put_between(model, node, clamp, users)


def clamp_computed_weights(model: GraphModule) -> None:
    """Bounds in front of the quantizer of each computed weight: ``convert_fx`` keeps no quant_max of these either."""
    for node in quantizer_nodes(model):
        quantizer, weight = module_of(model, node), node.all_input_nodes[0]
        if (
            not isinstance(quantizer, LearnedFakeQuantize)
            or not quantizer.per_channel
            or not quantizer.saturates_early()
        ):
            continue
        bounds = [quantizer.along(bound.detach(), quantizer.ndim).clone() for bound in quantizer.bounds()]
        if _is_bounded(model, weight, bounds[1]):
            continue
        bounded = weight
        for nearer, bound in zip((torch.maximum, torch.minimum), bounds, strict=True):
            name = free_name(model, f"{node.name}_bound")
            model.register_buffer(name, bound)
            with model.graph.inserting_before(node):
                bounded = model.graph.call_function(nearer, (bounded, model.graph.get_attr(name)))
        node.replace_input_with(weight, bounded)


def _is_bounded(model: GraphModule, weight: Node, highest: Tensor) -> bool:
    """Whether a computed weight has been bounded so already: when a calibrated model is finished again."""
    bound = weight.args[1] if weight.target is torch.minimum else None
    if not isinstance(bound, Node) or bound.op != "get_attr":
        return False
    kept = model.get_buffer(str(bound.target))
    return kept.shape == highest.shape and torch.allclose(kept, highest)


def average_channels_last(model: GraphModule) -> None:
    """Channels last in front of integer poolings: in the other layout they round ties as the zero point is odd."""
    inputs = {node: module_of(model, node) for node in quantizer_nodes(model)}
    for pool in [node.all_input_nodes[0] for node in inputs]:
        if called(model, pool) not in POOLINGS:
            continue
        node = pool.all_input_nodes[0]
        quantizer = inputs.get(node)
        if (
            not isinstance(quantizer, LearnedFakeQuantize)
            or quantizer.ndim != 4
            or "memory_format" in node.all_input_nodes[0].kwargs
        ):
            continue
        with model.graph.inserting_after(node):
            ordered = model.graph.call_method("contiguous", (node,), {"memory_format": torch.channels_last})
        _put_between(model, node, ordered, [pool])


def _put_between(model: GraphModule, node: Node, call: Node, users: Sequence[Node]) -> None:
    """Hands ``users`` what ``call`` makes of an activation, at the levels of its quantizer, instead of itself."""
    with model.graph.inserting_after(call):
        again = model.graph.call_module(str(node.target), (call,))
    for user in users:
        user.replace_input_with(node, again)
    scopes, (source,) = prepared_attributes(model).node_name_to_scope, node.all_input_nodes
    scopes[call.name] = scopes.get(source.name, ("", None))


def _is_saturated(users: Sequence[Node], limits: tuple[float, float]) -> bool:
    """Whether all that becomes of a value has been bounded so already: when a calibrated model is finished again."""
    if len(users) != 1 or users[0].target is not torch.clamp:
        return False
    bounds = users[0].args[1:]
    return len(bounds) == 2 and all(map(math.isclose, bounds, limits))  # type: ignore[arg-type]


def _keeps_levels(model: GraphModule, source: Node, node: Node) -> bool:
    """Whether the value has already been saturated: an operation on one tensor with shared levels."""
    inputs = source.all_input_nodes
    return len(inputs) == 1 and module_of(model, inputs[0]) is module_of(model, node)
