"""Arguments and results of torch calls, nested as they come, and the sizes among them that depend on the batch."""

import operator
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from adadfq_plugin.backends.fx.calls import Refusal

__all__ = ["BatchInt", "has_tensors", "leaves", "map_leaves", "plain", "tensors"]


class _Arithmetic(Protocol):
    """What records calculations with batch-dependent numbers."""

    def arithmetic(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Apply ``function`` to numbers of which at least one is a `BatchInt`."""


class BatchInt(int):
    """A size that depends on the batch: its value in this run, its value in the twin run, and its node."""

    trace: _Arithmetic
    node: fx.Node
    twin: int

    @classmethod
    def make(cls, trace: _Arithmetic, node: fx.Node, value: int, twin: int) -> "BatchInt":
        """Return ``value`` as a batch-dependent number of ``trace``."""
        self = cls(value)
        self.trace, self.node, self.twin = trace, node, twin
        return self

    def __int__(self) -> int:
        raise Refusal("int() makes a constant of the batch size")

    def __float__(self) -> float:
        raise Refusal("float() makes a constant of the batch size")


def _arithmetic(function: Callable[..., Any], reflected: bool) -> Callable[..., Any]:
    def method(self: BatchInt, *others: Any) -> Any:
        args = (*others, self) if reflected else (self, *others)
        if not all(isinstance(other, (int, float)) for other in others):
            return NotImplemented
        return self.trace.arithmetic(function, args)

    return method


for _name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "pow"):
    setattr(BatchInt, f"__{_name}__", _arithmetic(getattr(operator, _name), reflected=False))
    setattr(BatchInt, f"__r{_name}__", _arithmetic(getattr(operator, _name), reflected=True))
for _name in ("neg", "eq", "ne", "lt", "le", "gt", "ge"):
    setattr(BatchInt, f"__{_name}__", _arithmetic(getattr(operator, _name), reflected=False))
BatchInt.__bool__ = _arithmetic(bool, reflected=False)  # type: ignore[method-assign]
BatchInt.__hash__ = int.__hash__  # type: ignore[method-assign]  # a class with its own __eq__ has none


def plain(value: Any) -> Any:
    """Return a batch-dependent number as the plain one of this run, and anything else as it is."""
    return int.__index__(value) if isinstance(value, BatchInt) else value


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors in nested arguments."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def has_tensors(value: Any) -> bool:
    """Whether a result is a tensor, or holds any."""
    if isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        return any(has_tensors(element) for element in value)
    return isinstance(value, Tensor)


def leaves(value: Any) -> Iterator[Any]:
    """Yield the tensors and batch-dependent numbers in nested arguments."""
    if isinstance(value, (Tensor, BatchInt)):
        yield value
    elif isinstance(value, (tuple, list)):
        for element in value:
            yield from leaves(element)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from leaves((value.start, value.stop, value.step))


def map_leaves(value: Any, function: Callable[[Any], Any]) -> Any:
    """Return nested arguments with ``function`` applied to their leaves."""
    if isinstance(value, list):
        return [map_leaves(element, function) for element in value]
    if isinstance(value, tuple):
        return tuple(map_leaves(element, function) for element in value)
    if isinstance(value, dict):
        return {key: map_leaves(element, function) for key, element in value.items()}
    if isinstance(value, slice):
        return slice(*(map_leaves(each, function) for each in (value.start, value.stop, value.step)))
    return function(value)
