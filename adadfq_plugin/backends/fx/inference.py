"""A user's prepared graph in the form in which it is trained and converted: nothing random, nothing overwritten.

torch.fx writes down what it sees in training mode: ``F.dropout`` with ``training=True``, and calls that overwrite
their input, which the gradient of the quantizer in front of them needs.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from adadfq_plugin.backends.fx.calls import with_argument
from adadfq_plugin.backends.fx.graphs import VIEWS, called, is_quantizer, module_of
from adadfq_plugin.captures import argument
from adadfq_plugin.errors import ModelError

__all__ = ["as_inference"]

DROPOUTS = tuple(
    getattr(torch, f"{name}{suffix}")
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
)
"""Their arguments have no names that Python could see: input, p, train."""
AUGMENTED = {
    getattr(operator, f"i{name.rstrip('_')}"): getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "pow", "and_", "or_")
}
HARMLESS = ("requires_grad_", "share_memory_")
"""Methods that write no values."""


def as_inference(model: GraphModule) -> None:
    """Switches off dropout and the like, and gives calls that overwrite their input a result of their own; in place.

    What reads an overwritten tensor later on reads the result instead.

    Args:
        model: a prepared model.

    Raises:
        ModelError: a call that overwrites a tensor whose other views are read later, or that has no form which doesn't.
    """
    overwriting = {module for module in model.modules() if getattr(module, "inplace", False) is True}
    for module in overwriting:
        module.inplace = False  # type: ignore[assignment]
    for node in list(model.graph.nodes):
        if node.op == "call_function":
            _switch_off(node)
        if module_of(model, node) in overwriting or _write_anew(node):
            _redirect(model, node)
        if node.op in ("call_function", "call_method"):
            _refuse_overwriting(node)
    model.recompile()


def _switch_off(node: Node) -> None:
    if node.target in DROPOUTS:
        node.args, node.kwargs = (node.all_input_nodes[0], 0.0, False), {}
        return
    if node.target is F.batch_norm and argument(node.args, node.kwargs, 1, "running_mean") is None:
        return  # it has none but the batch's
    for name, value in (("training", False), ("dropout_p", 0.0)):
        _set(node, name, value)


def _set(node: Node, name: str, value: Any) -> bool:
    """Gives a call's argument another value; returns whether it had another."""
    before = node.args, node.kwargs
    node.args, node.kwargs = with_argument(cast(Any, node.target), *before, name, value)
    return (node.args, node.kwargs) != before


def _write_anew(node: Node) -> bool:
    """Gives a call that overwrites its first argument the form that doesn't; returns whether it had another."""
    if node.op == "call_function" and node.target in AUGMENTED:
        node.target = AUGMENTED[node.target]
        return True
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if name in HARMLESS:
        return False
    plain = name[:-1] if name.endswith("_") and not name.endswith("__") else ""
    if name.startswith("__i") and hasattr(Tensor, f"__{name[3:]}"):
        plain = f"__{name[3:]}"
    if node.op == "call_method" and plain and hasattr(Tensor, plain):
        node.target = plain
        return True
    if node.op != "call_function":
        return False
    for module in (torch, F):
        if plain and getattr(module, name, None) is node.target and hasattr(module, plain):
            node.target = getattr(module, plain)
            return True
    given = node.args, node.kwargs
    overwrites = with_argument(cast(Any, node.target), *given, "inplace", True) == given
    return _set(node, "inplace", False) and overwrites


def _redirect(model: GraphModule, node: Node) -> None:
    """Hands the result, quantized where it is, to what reads the first argument after it was overwritten."""
    source = node.all_input_nodes[0]
    order = {each: place for place, each in enumerate(model.graph.nodes)}

    def read_later(tensor: Node) -> list[Node]:
        return [user for user in tensor.users if order[user] > order[node]]

    whole = source
    while whole.all_input_nodes and (is_view := called(model, whole) in VIEWS) | _is_quantizer(model, whole):
        whole = whole.all_input_nodes[0]
        if is_view and read_later(whole):
            raise ModelError(
                f"{node.name!r} overwrites part of {whole.name!r}, which is read again: write a new tensor instead, or "
                "let adadfq_plugin.prepare trace the network"
            )
    quantized = [user for user in node.users if _is_quantizer(model, user)]
    for user in read_later(source):
        user.replace_input_with(source, quantized[0] if quantized else node)


def _is_quantizer(model: GraphModule, node: Node) -> bool:
    module = module_of(model, node)
    return module is not None and is_quantizer(module)


def _refuse_overwriting(node: Node) -> None:
    name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
    if name.endswith("_") and not name.endswith("__") and name not in HARMLESS:
        raise ModelError(
            f"{node.name!r} ({name}) overwrites its tensor and has no form that doesn't: write a new tensor, or "
            "let adadfq_plugin.prepare trace the network"
        )
