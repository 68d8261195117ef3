"""Which calls keep the levels of their input, and what they need where torch.ao gives their output others."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.ao.quantization.backend_config import ObservationType, get_native_backend_config
from torch.fx import GraphModule, Node

from adadfq_plugin.backends.fx.calls import in_float
from adadfq_plugin.backends.fx.graphs import INTEGER, MEANS, called, is_quantizer, module_of
from adadfq_plugin.captures import argument

__all__ = ["averages_in_float", "has_fixed_levels", "is_average", "is_interpolation", "requantize"]

INTERPOLATE = (nn.functional.interpolate, nn.functional.upsample)


@functools.cache
def _keeping_levels() -> frozenset[Any]:
    """The functions, names of methods and classes of modules whose integer forms have no scale of their own."""
    share = ObservationType.OUTPUT_SHARE_OBSERVER_WITH_INPUT
    return frozenset(
        each.pattern for each in get_native_backend_config().configs if each.observation_type is share
    )


@functools.cache
def _fixing_levels() -> frozenset[Any]:
    """What torch.ao gives the same levels whatever comes out: sigmoid, hyperbolic tangent, softmax."""
    return frozenset(
        each.pattern
        for each in get_native_backend_config().configs
        if any(types.output_dtype_with_constraints.scale_exact_match for types in each.dtype_configs)
    )


def has_fixed_levels(model: GraphModule, node: Node) -> bool:
    """Whether torch.ao quantizes a tensor to [0, 1) or [-1, 1), as it does with a sigmoid and views of one.

    Args:
        model: a traced model, not prepared yet.
        node: what gives the tensor.
    """
    while called(model, node) in _keeping_levels() and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return called(model, node) in _fixing_levels()


def is_average(model: GraphModule, node: Node) -> bool:
    """Whether a call takes one of the averages, hidden by :func:`averages_in_float` or not."""
    what = called(model, node)
    return what in MEANS or (what is in_float and node.args[0] in MEANS.values())


def is_interpolation(model: GraphModule, node: Node) -> bool:
    """Whether a call weighs neighbours: with weights of sixteenths many results lie midway between two levels."""
    module = module_of(model, node)
    if isinstance(module, nn.Upsample):
        return module.mode == "bilinear"
    return node.target in INTERPOLATE and argument(node.args, node.kwargs, 3, "mode", "nearest") == "bilinear"


def averages_in_float(model: GraphModule) -> None:
    """Hides averages from torch.ao that are quantized anew behind themselves; in place.

    torch.ao lowers what stands between two quantizers whatever its qconfig, and the integer kernel rounds an average to
    the levels of what it takes, before it gets its own.

    Args:
        model: a prepared model.
    """
    for node in list(model.graph.nodes):
        what = called(model, node)
        source = node.all_input_nodes[0] if what in MEANS else None
        levels = None if source is None else _quantizer(model, source)
        behind = {_quantizer(model, each) for each in node.users} - {None}
        if levels is None or behind <= {levels}:
            continue
        module = module_of(model, node)
        args = node.args if module is None else (source, module.output_size)
        node.op, node.target, node.args = "call_function", in_float, (MEANS[what], *args)
    model.recompile()


def requantize(model: GraphModule) -> None:
    """Puts a further quantizer where a call that keeps its levels lies between two different ones; in place.

    torch.ao lets such a call (a view, a pooling, a concatenation) share the quantizer of its first tensor. But a
    concatenation hands that one to its other tensors as well, whatever these share with the calls around them. So the
    quantizer behind a view may be another than the one in front, and that of a first tensor another than its
    concatenation's; the integer calls know nothing of it.

    Args:
        model: a prepared model.
    """
    for node in list(model.graph.nodes):
        if called(model, node) not in _keeping_levels():
            continue
        for quantized in [each for each in node.users if _quantizer(model, each) is not None]:
            for source in node.all_input_nodes:
                if _quantizer(model, source) in (None, _quantizer(model, quantized)):
                    continue
                if source is node.args[0]:  # keeps the levels, and then takes the others
                    before, levels, user = node, source, quantized
                else:  # one of several tensors
                    before, levels, user = source, quantized, node
                with model.graph.inserting_before(user):
                    again = model.graph.call_module(str(levels.target), (before,))
                user.replace_input_with(before, again)
    model.recompile()


def _quantizer(model: GraphModule, node: Node) -> nn.Module | None:
    """The observer or fake quantizer that a node calls, if it is one of integers with a scale of their own."""
    module = module_of(model, node)
    if module is None or not is_quantizer(module) or getattr(module, "is_dynamic", False):
        return None
    return module if getattr(module, "dtype", None) in INTEGER else None
