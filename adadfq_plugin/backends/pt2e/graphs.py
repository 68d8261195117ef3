"""Exported graphs: private copies, constants, and the same computation without modes and side effects."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from adadfq_plugin.errors import ModelError

__all__ = [
    "aten",
    "free_name",
    "is_constant",
    "is_exported",
    "plain_copy",
    "set_tensor",
    "tensor_at",
    "tidy",
    "use_eval_mode",
    "use_explicit_padding",
    "use_no_mutation",
    "value_of",
]

aten: Any = torch.ops.aten
DROPOUTS = (aten.dropout, aten.dropout_, aten.feature_dropout, aten.feature_dropout_, aten.alpha_dropout)
RECURRENT = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}
"""What a tensor is after one of its views was written to."""
ATTENTION = aten.scaled_dot_product_attention.default
GUARDS = "_guards_fn"
"""torch.export's check of input shapes, which would tie the graph to the example's."""


def is_exported(model: nn.Module) -> bool:
    """Whether the model is a graph of torch.export, at the level of ATen operators."""
    return isinstance(model, GraphModule) and any(
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace == "aten"
        for node in model.graph.nodes
    )


def plain_copy(model: GraphModule) -> GraphModule:
    """A copy with tensors of its own, without input checks, hooks and refusals of ``train`` and ``eval``."""
    shell = GraphModule(model, copy.deepcopy(model.graph))
    shell.meta = dict(model.meta)
    result = copy.deepcopy(shell)
    for node in list(result.graph.nodes):
        if node.op == "call_module" and node.target == GUARDS:
            result.graph.erase_node(node)
    _follow_input(result.graph)
    result.meta = dict(model.meta)
    return tidy(result)


def _follow_input(graph: Graph) -> None:
    """Makes tensors where the input is: exporting has written down the device that the example was on."""
    source = next((node for node in graph.nodes if node.op == "placeholder"), None)
    place: Node | None = None

    def moved(value: Any) -> Any:
        return place if isinstance(value, torch.device) else value

    for node in list(graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif source is not None and any(
            isinstance(each, torch.device) for each in (*node.args, *node.kwargs.values())
        ):
            if place is None:
                with graph.inserting_after(source):
                    place = graph.call_function(getattr, (source, "device"))
            node.args = tuple(map(moved, node.args))
            node.kwargs = {name: moved(each) for name, each in node.kwargs.items()}


def tidy(model: GraphModule) -> GraphModule:
    """Leaves out what nothing uses, tensors included; in place."""
    model.graph.eliminate_dead_code()
    used = {str(node.target) for node in model.graph.nodes if node.op in ("get_attr", "call_module")}
    model.delete_all_unused_submodules()
    for path, _ in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, name = path.rpartition(".")
        inside = any(path.startswith(f"{module}.") for module in used)
        if path not in used and not inside:
            delattr(model.get_submodule(owner), name)
    model.recompile()
    return model


def tensor_at(model: nn.Module, path: str) -> Tensor:
    """The parameter, buffer or constant of a ``get_attr`` node."""
    owner, _, name = path.rpartition(".")
    found: Tensor = getattr(model.get_submodule(owner), name)
    return found


def free_name(module: nn.Module, name: str) -> str:
    """``name``, numbered where the module has something of that name."""
    names = itertools.chain([name], (f"{name}_{count}" for count in itertools.count(1)))
    return next(each for each in names if not hasattr(module, each))


def set_tensor(model: nn.Module, path: str, value: Tensor, trained: bool) -> str:
    """Puts a new parameter beside the one at ``path`` and returns where; nothing is overwritten."""
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    name = free_name(module, name)
    module.register_parameter(name, nn.Parameter(value, requires_grad=trained))
    return f"{owner}.{name}" if owner else name


def is_constant(node: Any) -> bool:
    """Whether a value depends on parameters and buffers alone."""
    waiting, seen = [node] if isinstance(node, Node) else [], set()
    while waiting:  # graphs are deeper than Python's stack
        each = waiting.pop()
        if each.op in ("placeholder", "call_module"):
            return False
        if each not in seen:
            seen.add(each)
            waiting.extend(each.all_input_nodes)
    return True


def value_of(model: GraphModule, node: Any) -> Any:
    """What a constant node computes."""
    if not isinstance(node, Node):
        return node
    if node.op == "get_attr":
        return tensor_at(model, str(node.target))
    assert callable(node.target)
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda each: value_of(model, each))
    return node.target(*args, **kwargs)


def _set_argument(node: Node, name: str, value: Any) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    if len(node.args) > place:
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


def use_eval_mode(model: GraphModule) -> None:
    """BatchNorm by its running statistics, no dropout, whatever mode was exported; in place.

    Raises:
        ModelError: something else draws random numbers, such as drop path.
    """
    for node in list(model.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target is aten.batch_norm.default:
            if node.args[3] is not None:  # without running statistics there is one mode
                _set_argument(node, "training", False)
        elif node.target is ATTENTION:
            _set_argument(node, "dropout_p", 0.0)
        elif node.target.overloadpacket in RECURRENT:
            _set_argument(node, "train", False)
        elif node.target.overloadpacket in (aten.rrelu, aten.rrelu_):
            _set_argument(node, "training", False)
        elif node.target.overloadpacket in DROPOUTS:
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)
        elif torch.Tag.nondeterministic_seeded in node.target.tags:
            raise ModelError(
                f"the model was exported in training mode: {node.name!r} ({node.target}) draws random numbers; "
                "export it after model.eval()"
            )
        elif node.target is aten.add_.Tensor and _counts_batches(node):
            model.graph.erase_node(node)


def _counts_batches(node: Node) -> bool:
    counter = node.args[0]
    return isinstance(counter, Node) and str(counter.target).endswith("num_batches_tracked")


def _is_view(node: Node) -> bool:
    """Whether a value shares the memory of the one that it is made of."""
    if not isinstance(node.target, torch._ops.OpOverload) or not isinstance(node.args[0], Node):
        return False
    schema = node.target._schema
    return not schema.is_mutable and any(each.alias_info is not None for each in schema.returns)


def _source(view: Node) -> Node:
    assert isinstance(view.args[0], Node)
    return view.args[0]


def use_explicit_padding(graph: Graph) -> None:
    """Maxima over whole windows alone: what ``ceil_mode`` adds at the end becomes padding with minus infinity.

    Inductor's integer form of a maximum forgets ``ceil_mode`` (torch 2.14), and gives a smaller tensor without a word.
    """
    for node in list(graph.nodes):
        if node.target is not aten.max_pool2d.default or not (len(node.args) > 5 and node.args[5]):
            continue
        image, kernel = node.args[0], node.args[1]
        strides, padding, dilation = (_pair(each) for each in node.args[2:5])
        strides = strides or _pair(kernel)
        missing = [
            (outside - 1) * stride + spread * (size - 1) + 1 - inside - 2 * around
            for outside, stride, spread, size, inside, around in zip(
                node.meta["val"].shape[-2:],
                strides,
                dilation,
                _pair(kernel),
                image.meta["val"].shape[-2:],
                padding,
                strict=True,
            )
        ]
        down, right = (max(0, int(each)) for each in missing)
        if down or right:
            with graph.inserting_before(node):
                padded = graph.call_function(
                    aten.pad.default, (image, [0, right, 0, down], "constant", -math.inf)
                )
            padded.meta = {**image.meta, "val": aten.pad.default(image.meta["val"], *padded.args[1:])}
            node.update_arg(0, padded)
        node.update_arg(5, False)


def _pair(value: Any) -> list[int]:
    """Two numbers where one may stand for both; nothing where there are none."""
    numbers = [value] if isinstance(value, int) else list(value)
    return numbers * 2 if len(numbers) == 1 else numbers


def use_no_mutation(graph: Graph) -> None:
    """The out-of-place form of every in-place call: a gradient needs the values that they overwrite.

    Raises:
        ModelError: an in-place call that has no other form, or that reaches a value by way of a view.
    """
    places = {node: place for place, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if target is aten.view.default:
            node.target = aten.reshape.default  # a view of channels-last tensors may not exist
        if not target._schema.is_mutable or target.namespace != "aten":
            continue
        name = target._schema.name.split("::")[1]
        packet = getattr(aten, name[:-1], None) if name.endswith("_") else None
        overload = getattr(packet, target._overloadname, None)
        changed = node.args[0]
        if overload is None or not isinstance(changed, Node):
            raise ModelError(f"{node.name!r} ({target}) changes its input in place and has no other form")
        node.target = overload
        if overload is aten.copy.default:  # which has no gradient
            with graph.inserting_before(node):
                copied = graph.call_function(aten.expand_as.default, (node.args[1], changed))
            copied.meta, places[copied] = dict(changed.meta), places[node]
            node.target, node.args, node.kwargs = aten.clone.default, (copied,), {}
        _write(graph, places, changed, node)


def _write(graph: Graph, places: dict[Node, int], changed: Node, value: Node) -> None:
    """From its place on a value stands for a tensor, and what shares memory with that is made anew.

    Raises:
        ModelError: it shares memory by a kind of view that has no inverse.
    """
    place = places[value]
    chain = [changed]
    while _is_view(chain[-1]):
        chain.append(_source(chain[-1]))

    def later(node: Node) -> list[Node]:
        return [user for user in node.users if places[user] > place]

    def old_views(node: Node) -> list[Node]:
        return [each for each in node.users if _is_view(each) and places[each] < place and each not in chain]

    def is_used(node: Node) -> bool:
        return bool(later(node)) or any(map(is_used, old_views(node)))

    def made(after: Node, target: Any, args: tuple[Any, ...], like: Node) -> Node:
        with graph.inserting_after(after):
            node = graph.call_function(target, args)
        node.meta, places[node] = dict(like.meta), place
        return node

    def renew(old: Node, new: Node) -> None:
        for view in filter(is_used, old_views(old)):
            renew(view, made(new, view.target, (new, *view.args[1:]), view))
        for user in later(old):
            user.replace_input_with(old, new)

    whole = max(number for number, each in enumerate(chain) if number == 0 or is_used(each))
    renew(changed, value)
    for view, source in itertools.pairwise(chain[: whole + 1]):
        if view.target not in SCATTERS:
            raise ModelError(
                f"{value.name!r} ({value.target}) changes a view in place whose source is used again: "
                f"{view.name!r} ({view.target})"
            )
        value = made(value, SCATTERS[view.target], (source, value, *view.args[1:]), source)
        renew(source, value)
