"""Tracing with concrete values: the model runs once for real, and every torch call on the input is recorded.

`torch.fx`'s own tracer runs a model on placeholders that have no shape, so a model that looks at its shapes
(padding of TensorFlow's ``SAME`` kind, windowed attention) cannot be traced by it. Here the model runs on real
tensors: Python sees true numbers, and nothing has to be patched in the model's code. What does not depend on the
input is not recorded; it is computed once and stands in the graph as a constant.

Each recorded call is also made a second time, from the graph's own arguments, with another batch size (the *twin*).
A size that differs between the two is a size that depends on the batch, and stays an expression of the graph; any
other size is a constant. Python control flow that would take another path for another batch is refused.
"""

import contextlib
import functools
import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from adadfq_plugin.backends.fx.arguments import BatchInt, has_tensors, leaves, map_leaves, plain, tensors
from adadfq_plugin.backends.fx.calls import (
    READS_VALUES,
    Call,
    Refusal,
    as_call,
    bounds_nothing,
    create_beside,
    on_constant,
)
from adadfq_plugin.backends.fx.lift import lift

__all__ = ["ConcreteTrace"]


@dataclass
class _Tracked:
    node: fx.Node
    twin: Any
    version: int  # torch counts the in-place changes of a tensor and of all its views


class ConcreteTrace(TorchFunctionMode):
    """Record into ``graph`` what ``model`` does with one tensor.

    Args:
        model: The model, a private copy in evaluation mode. Its modules' ``forward`` are wrapped while it runs.

    Attributes:
        graph: The recorded graph.
        attributes: What the graph's ``call_module`` and ``get_attr`` targets are.
        path: Qualified name of the module that runs now, or in which the run has failed.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.path = ""
        self._modules = dict(model.named_modules())
        self._leaf_names = {name for name, module in self._modules.items() if _is_leaf(module)}
        self._tracked: WeakIdKeyDictionary = WeakIdKeyDictionary()
        named = [*model.named_parameters(), *model.named_buffers()]
        self._names: dict[int, str] = {id(tensor): name for name, tensor in named}
        # Kept alive, so that no other tensor gets an id that is in _names.
        self._kept: list[Tensor] = [tensor for _, tensor in named]
        self._constants = 0
        self._inside_leaf = False

    def run(self, value: Tensor, twin: Tensor) -> None:
        """Run the model on ``value``, with ``twin`` (another batch size) beside it, and complete the graph."""
        name = next(iter(inspect.signature(self.model.forward).parameters), "x")
        placeholder = self.graph.placeholder(name)
        self._track(value, placeholder, twin)
        self._input = value
        with self._wrapped_forwards(), torch.no_grad(), self:
            output = self.model(value)
        if not self._is_tracked((output,)):
            raise Refusal("the output does not depend on the input, as far as torch calls show")
        self.graph.output(self._to_nodes(output))
        for node in reversed(self.graph.nodes):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)

    # Modules.

    @contextlib.contextmanager
    def _wrapped_forwards(self) -> Iterator[None]:
        modules = self._modules
        own = {name: module.__dict__.get("forward") for name, module in modules.items()}
        for name, module in modules.items():
            module.forward = functools.partial(self._call_module, name, module, module.forward)
        try:
            yield
        finally:
            for name, module in modules.items():
                if own[name] is None:
                    del module.forward
                else:
                    module.forward = own[name]

    def _call_module(
        self, name: str, module: nn.Module, forward: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        if self._inside_leaf:
            return forward(*args, **kwargs)
        if name in self._leaf_names and self._is_tracked((args, kwargs)):
            if isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
                return args[0]
            self._inside_leaf, caller, self.path = True, self.path, name
            try:
                with torch._C.DisableTorchFunction():
                    self.attributes[name] = module
                    call = Call("call_module", name, args, kwargs)
                    result = self._record(call, functools.partial(forward, *args, **kwargs))
            finally:
                self._inside_leaf = False
            self.path = caller
            return result
        caller, self.path = self.path, name
        result = forward(*args, **kwargs)
        self.path = caller  # not in a finally: after a failure the path tells where it happened
        return result

    # Functions and methods.

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the call; record it when an argument depends on the input."""
        kwargs = kwargs or {}
        if not self._is_tracked((args, kwargs)):
            with torch.enable_grad():  # a constant computed from trainable parameters is trainable
                return func(*args, **kwargs)
        if func.__name__.rstrip("_") in ("clamp", "clip"):
            args, kwargs = self._with_numbers(args), self._with_numbers(kwargs)
            if bounds_nothing(*args, **kwargs):
                return args[0]
        if func.__name__ in READS_VALUES:
            raise Refusal(f"{func.__name__}() reads the values of a tensor that depends on the input")
        if not tensors((args, kwargs)):
            created = (self._input, func.__name__, *args)
            call = Call("call_function", create_beside, created, kwargs, wrapped=True)
        else:
            call = self._lifted(func, args, kwargs) or as_call(func, args, kwargs)
            if call.op == "call_method" and not self._is_tracked(tensors(call.args)):
                named = (call.args[0], call.target, *call.args[1:])
                call = Call("call_function", on_constant, named, call.kwargs, wrapped=True)
        return self._record(call, functools.partial(func, *args, **kwargs))

    def _with_numbers(self, value: Any) -> Any:
        """Bounds that the model keeps as tensors are numbers to torch.ao, which would quantize the tensors."""

        def number(leaf: Any) -> Any:
            constant = isinstance(leaf, Tensor) and leaf.numel() == 1 and leaf not in self._tracked
            return leaf.item() if constant else leaf

        return map_leaves(value, number)

    def arithmetic(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Apply ``function`` to numbers of which at least one is a `BatchInt`."""
        value, twin = function(*map(plain, args)), function(*map(self._to_twins, args))
        if type(value) is bool and value != twin:
            raise Refusal(f"the Python code takes another path for another batch size ({function.__name__})")
        if value == twin:
            return value
        if not isinstance(value, int):
            raise Refusal("a fraction of the batch size is used")
        node = self.graph.call_function(function, tuple(map(self._to_nodes, args)))
        return BatchInt.make(self, node, value, twin)

    def _lifted(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """Return a call of a standard module when the weights do not depend on the input, else None."""
        found = lift(func, args, kwargs, self._modules, self._names, self.path)
        if found is None or self._is_tracked(found.constants):
            return None
        name = found.name
        for suffix in range(1, 1000):
            present = self.attributes.get(name)
            free = present is None and name not in self._leaf_names  # a layer may be called yet
            if free:
                self.attributes[name] = found.build()
                # it is known by their ids, which must not become somebody else's
                self._kept.extend(each for each in found.constants.values() if isinstance(each, Tensor))
            if free or found.is_same(present):
                break
            name = f"{found.name}_{suffix}"
        return Call("call_module", name, (found.input,), {})

    # Recording.

    def _record(self, call: Call, run: Callable[[], Any]) -> Any:
        args, kwargs = self._to_nodes(call.args), self._to_nodes(call.kwargs)
        target = self.attributes[call.target] if call.op == "call_module" else call.target
        twin = _run(call.op, target, self._to_twins(call.args), self._to_twins(call.kwargs))
        result = run()

        def node() -> fx.Node:
            made = self.graph.create_node(call.op, call.target, args, kwargs)
            if call.wrapped:
                made.meta["is_wrapped"] = True  # the generated code marks it as a leaf for the next tracer
            return made

        if call.assigns:
            self._track(call.args[0], node(), twin)
        elif not has_tensors(result):
            return self._number(result, twin, node, str(call.target))
        elif not self._is_same(result, call):
            # An in-place call returns its argument, which from here on stands for the new node.
            self._track(result, node(), twin)
        return result

    def _number(self, value: Any, twin: Any, node: Callable[[], fx.Node], method: str) -> Any:
        """Return sizes as plain numbers, or as batch-dependent ones where the twin's differ."""
        if isinstance(value, torch.Size):
            if len(value) != len(twin):
                raise Refusal("the number of dimensions depends on the batch size")
            if value == twin:
                return value
            whole = node()
            sizes = [
                v
                if v == t
                else BatchInt.make(self, self.graph.call_function(operator.getitem, (whole, i)), v, t)
                for i, (v, t) in enumerate(zip(value, twin, strict=True))
            ]
            return torch.Size(sizes)
        if method == "__len__" and value != twin:
            raise Refusal("len() makes a constant of the batch size; take shape[0]")
        if type(value) is int and value != twin:
            return BatchInt.make(self, node(), value, twin)
        if isinstance(value, bool) and value != twin:
            raise Refusal("the Python code takes another path for another batch size")
        return value

    def _track(self, value: Any, node: fx.Node, twin: Any) -> None:
        if isinstance(value, Tensor):
            node.meta |= {"shape": value.shape, "dtype": value.dtype}
            self._tracked[value] = _Tracked(node, twin, value._version)
        elif isinstance(value, (tuple, list)):
            if len(value) != len(twin):
                raise Refusal("the number of results depends on the batch size")
            for i, (element, twin_element) in enumerate(zip(value, twin, strict=True)):
                if element is not None:
                    self._track(element, self.graph.call_function(operator.getitem, (node, i)), twin_element)

    def _is_tracked(self, value: Any) -> bool:
        return any(isinstance(leaf, BatchInt) or leaf in self._tracked for leaf in leaves(value))

    def _is_same(self, result: Any, call: Call) -> bool:
        """Whether the call has done nothing, like a conversion to the type or place that the tensor has already."""
        if not call.args or result is not call.args[0] or call.target == "contiguous":
            return False
        tracked = self._tracked.get(result)
        return tracked is not None and tracked.version == result._version

    def _to_nodes(self, value: Any) -> Any:
        return map_leaves(value, self._node)

    def _to_twins(self, value: Any) -> Any:
        return map_leaves(value, self._twin)

    def _twin(self, leaf: Any) -> Any:
        if isinstance(leaf, BatchInt):
            return leaf.twin
        if isinstance(leaf, Tensor):
            return self._tracked[leaf].twin if leaf in self._tracked else leaf
        return leaf

    def _node(self, leaf: Any) -> Any:
        if isinstance(leaf, BatchInt):
            return leaf.node
        if not isinstance(leaf, Tensor):
            return leaf
        tracked = self._tracked.get(leaf)
        if tracked is None:
            return self.graph.get_attr(self._constant(leaf))
        if tracked.version != leaf._version:
            raise Refusal(f"{tracked.node.name!r} is used after one of its views was changed in place")
        return tracked.node

    def _constant(self, value: Tensor) -> str:
        name = self._names.get(id(value))
        if name is None:
            name = f"{self.path.replace('.', '_')}_constant_{self._constants}".lstrip("_")
            self._constants += 1
            self._kept.append(value)
            self._names[id(value)] = name
            kept = value.detach().clone()
            is_parameter = kept.is_floating_point()  # torch's own tracer follows parameters only
            self.attributes[name] = nn.Parameter(kept, value.requires_grad) if is_parameter else kept
        self.attributes.setdefault(name, value)
        return name


def _is_leaf(module: nn.Module) -> bool:
    """Whether ``module`` is torch's own, and nothing that its class does not show changes what it does."""
    if isinstance(module, nn.Sequential | nn.AvgPool2d) or nn.utils.parametrize.is_parametrized(module):
        return False
    if module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__:
        return False
    return type(module).__module__.startswith(("torch.nn", "torch.ao.nn"))


def _run(op: str, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    inplace = op == "call_module" and getattr(target, "inplace", False)
    if not inplace:
        return target(*args, **kwargs)
    target.inplace = False
    try:
        return target(*args, **kwargs)
    finally:
        target.inplace = True
