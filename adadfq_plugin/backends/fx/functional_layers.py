"""Functional layers of prepared models (``F.conv2d(x, self.weight)``) as the modules that they amount to."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from adadfq_plugin.backends.fx.clamps import RELU
from adadfq_plugin.backends.fx.graphs import called, is_quantizer, module_of, prepared_attributes
from adadfq_plugin.backends.fx.lift import lift
from adadfq_plugin.sites import replace_module

__all__ = ["LAYERS", "lift_functions"]

LAYERS = (F.conv1d, F.conv2d, F.conv3d, F.linear)

# class to train, class with a ReLU behind, and class to train of that one
MODULES: dict[type[nn.Module], tuple[Any, Any, Any]] = {
    nn.Conv1d: (nnqat.Conv1d, nni.ConvReLU1d, nniqat.ConvReLU1d),
    nn.Conv2d: (nnqat.Conv2d, nni.ConvReLU2d, nniqat.ConvReLU2d),
    nn.Conv3d: (nnqat.Conv3d, nni.ConvReLU3d, nniqat.ConvReLU3d),
    nn.Linear: (nnqat.Linear, nni.LinearReLU, nniqat.LinearReLU),
}


def lift_functions(model: GraphModule) -> None:
    """Makes a module of each call of a layer on a parameter of which torch.ao has observed the weight; in place.

    torch.ao puts the quantizer of such a weight among those of the activations.

    Args:
        model: a prepared model; the modules share its parameters.
    """
    attributes = prepared_attributes(model)
    for node in list(model.graph.nodes):
        if node.target not in LAYERS:
            continue
        values = {each: _value(model, each) for each in node.all_input_nodes}
        args, kwargs = map_arg(node.args, values.__getitem__), map_arg(node.kwargs, values.__getitem__)
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        observed = next((each for each, value in values.items() if value is weight), None)
        quantizer = None if observed is None else module_of(model, observed)
        if getattr(quantizer, "dtype", None) is not torch.qint8 or not isinstance(weight, nn.Parameter):
            continue
        found = lift(node.target, args, kwargs, {}, {}, "")
        if found is None or isinstance(found.constants["bias"], Node):
            continue
        layer: Any = found.build()
        layer.qconfig = qconfig = attributes.node_name_to_qconfig[node.name]
        plain, with_relu, trained_with_relu = MODULES[found.kind]
        relu = next(iter(node.users)) if len(node.users) == 1 else None
        # not left alone: torch.ao's lowering would drop it
        if relu is not None and called(model, relu) in (*RELU, nn.ReLU):
            layer, plain = with_relu(layer, nn.ReLU()), trained_with_relu
            layer.qconfig = qconfig
            relu.replace_all_uses_with(node)
            model.graph.erase_node(relu)
        if attributes.is_qat:
            layer = plain.from_float(layer)
            layer.weight, layer.bias = weight, found.constants["bias"]
            layer.weight_fake_quant = quantizer
        name = next(name for i in itertools.count() if not hasattr(model, name := f"{node.name}_{i}"))
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
