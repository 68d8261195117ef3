"""Functional layers of prepared models (``F.conv2d(x, self.weight)``) as the modules that they amount to."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from adadfq_plugin.backends.fx.clamps import RELU
from adadfq_plugin.backends.fx.graphs import called, free_name, is_quantizer, module_of, prepared_attributes
from adadfq_plugin.backends.fx.layers import FUNCTIONS
from adadfq_plugin.backends.fx.lift import lift
from adadfq_plugin.captures import argument
from adadfq_plugin.sites import replace_module

__all__ = ["lift_functions"]


def lift_functions(model: GraphModule) -> None:
    """Makes a module of each call of a layer on a parameter of which torch.ao has observed the weight; in place.

    torch.ao puts the quantizer of such a weight among those of the activations.

    Args:
        model: a prepared model; the modules share its parameters.
    """
    attributes = prepared_attributes(model)
    for node in list(model.graph.nodes):
        if node.target not in FUNCTIONS:
            continue
        values = {each: _value(model, each) for each in node.all_input_nodes}
        args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
        weight = argument(args, kwargs, 1, "weight")
        observed = next((each for each, value in values.items() if value is weight), None)
        quantizer = None if observed is None else module_of(model, observed)
        if getattr(quantizer, "dtype", None) is not torch.qint8 or not isinstance(weight, nn.Parameter):
            continue
        found = lift(node.target, args, kwargs, {}, {}, "")
        if found is None or isinstance(found.constants["bias"], Node):
            continue
        layer: Any = found.build()
        layer.qconfig = qconfig = attributes.node_name_to_qconfig[node.name]
        kinds = FUNCTIONS[node.target]
        trained = kinds.trained
        relu = next(iter(node.users)) if len(node.users) == 1 else None
        # not left alone: torch.ao's lowering would drop it
        if relu is not None and called(model, relu) in (*RELU, nn.ReLU):
            layer, trained = kinds.relu(layer, nn.ReLU()), kinds.trained_relu
            layer.qconfig = qconfig
            relu.replace_all_uses_with(node)
            model.graph.erase_node(relu)
        if attributes.is_qat:
            layer = trained.from_float(layer)
            layer.weight, layer.bias = weight, found.constants["bias"]
            layer.weight_fake_quant = quantizer
        name = free_name(model, node.name)
        replace_module(model, name, layer.train(model.training))
        node.op, node.target, node.args, node.kwargs = "call_module", name, (found.input,), {}
        for each, value in values.items():
            if value is not each:
                _drop(model, each)
    model.recompile()


def _value(model: GraphModule, node: Node) -> Any:
    """The parameter or buffer that a node stands for, through its quantizer where it has one; else the node."""
    module = module_of(model, node)
    source = node.all_input_nodes[0] if module is not None and is_quantizer(module) else node
    return operator.attrgetter(str(source.target))(model) if source.op == "get_attr" else node


def _drop(model: GraphModule, node: Node) -> None:
    """Takes out a parameter that nothing reads any more, and its quantizer."""
    if node.users:
        return
    sources, module = node.all_input_nodes, module_of(model, node)
    model.graph.erase_node(node)
    if module is not None and all(module_of(model, other) is not module for other in model.graph.nodes):
        model.delete_submodule(str(node.target))
    for source in sources:
        _drop(model, source)
