"""Torch calls in the form in which they stand in a graph: what toolkits look for, without side effects."""

import functools
import importlib
import inspect
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

__all__ = [
    "READS_VALUES",
    "Call",
    "Refusal",
    "as_call",
    "bounds_nothing",
    "create_beside",
    "in_float",
    "on_constant",
    "with_argument",
    "with_item",
]


class Refusal(Exception):
    """A call that cannot stand in a graph; `ConcreteTrace.path` is where it was made."""


@dataclass(frozen=True)
class Call:
    """One node to be: ``op`` and ``target`` as in `torch.fx`, arguments still as values.

    Attributes:
        assigns: The call stands for an assignment: its first argument is the new value from here on.
        wrapped: The next tracer must take the call as it is.
    """

    op: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    assigns: bool = False
    wrapped: bool = False


def with_item(tensor: Tensor, index: Any, value: Any) -> Tensor:
    """Return a copy of ``tensor`` where ``tensor[index]`` is ``value``: item assignment without a side effect."""
    copy = tensor.clone()
    copy[index] = value
    return copy


def create_beside(tensor: Tensor, function: str, *args: Any, **kwargs: Any) -> Tensor:
    """Return ``torch.<function>(*args, **kwargs)`` on the device of ``tensor``: a constant but for its batch size."""
    created: Tensor = getattr(torch, function)(*args, **{**kwargs, "device": tensor.device})
    return created


def on_constant(constant: Tensor, method: str, *args: Any, **kwargs: Any) -> Tensor:
    """Return ``constant.<method>(*args, **kwargs)``, where torch's own tracer would see no input but a batch size."""
    result: Tensor = getattr(constant, method)(*args, **kwargs)
    return result


def in_float(name: str, *args: Any, **kwargs: Any) -> Any:
    """Make the call that ``name`` stands for, out of the sight of torch.ao, which then leaves it in floating point.

    Args:
        name: A function's qualified name, or a method's name with a dot before it.
        args: The call's positional arguments.
        kwargs: The call's keyword arguments.
    """
    module, _, attribute = name.rpartition(".")
    if not module:
        return getattr(args[0], attribute)(*args[1:], **kwargs)
    return getattr(importlib.import_module(module), attribute)(*args, **kwargs)


# Methods whose result depends on the values of the tensor, not only on its shape, type or place.
READS_VALUES = frozenset(
    {
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__complex__",
        "__contains__",
        "__array__",
        "__format__",
    }
    | {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "nonzero", "masked_select", "unique"}
)

# The operators that quantization toolkits look for, instead of the methods that Python turns them into.
_OPERATORS: dict[str, Callable[..., Any]] = {
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "matmul", "neg", "pow")},
    **{f"__{name}__": getattr(operator, name) for name in ("add", "sub", "mul", "matmul", "floordiv", "mod")},
    **{
        name: getattr(operator, name)
        for name in ("__getitem__", "__invert__", "__and__", "__or__", "__xor__")
    },
    **{
        f"__{name}__": getattr(operator, name)
        for name in ("eq", "ne", "lt", "le", "gt", "ge", "pow", "truediv")
    },
    "div": operator.truediv,
    "__div__": operator.truediv,
}
_REFLECTED: dict[str, Callable[..., Any]] = {
    **{
        f"__r{name}__": getattr(operator, name)
        for name in ("add", "sub", "mul", "matmul", "floordiv", "mod", "pow")
    },
    "__rtruediv__": operator.truediv,
    "__rdiv__": operator.truediv,
}


def as_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Return the graph's form of a call: operators instead of methods, and no in-place changes."""
    name = func.__name__
    if name == "__get__":
        return Call("call_function", getattr, (args[0], func.__self__.__name__), {})
    if kwargs.get("out") is not None:
        raise Refusal(f"{name}(out=...) writes into a given tensor")
    if name == "__setitem__":
        return Call("call_function", with_item, args, kwargs, assigns=True, wrapped=True)
    is_method = getattr(func, "__qualname__", "").split(".")[0] in ("Tensor", "TensorBase")
    if name.startswith("__i") and name.endswith("__") and name != "__invert__":
        name = f"__{name[3:]}"
    elif name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
        homes = (torch.Tensor,) if is_method else (torch, F)
        plain = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
        if plain is None:
            raise Refusal(f"{name}_() has no form that leaves its argument alone")
        func = func if is_method else plain
    if kwargs and func in (torch.add, torch.mul, torch.matmul):
        # torch.ao lowers these without their keywords, be it alpha or other; their methods it leaves alone
        kwargs = dict(kwargs)
        args = args or (kwargs.pop("input"),)
        is_method = isinstance(args[0], Tensor)
    if (name == "mean" and _is_global_average(*args, **kwargs)) or (
        name == "avg_pool2d" and _covers_all(*args, **kwargs)
    ):
        return Call("call_function", F.adaptive_avg_pool2d, (args[0], 1), {})
    if not is_method:
        return Call("call_function", func, *with_argument(func, args, kwargs, "inplace", False))
    if name == "view" and not any(isinstance(each, torch.dtype) for each in (*args, *kwargs.values())):
        name = "reshape"  # an integer convolution lays its channels last, where most views can't be
    if not kwargs and name in _OPERATORS and len(args) <= 2:
        return Call("call_function", _OPERATORS[name], args, {})
    if not kwargs and name in _REFLECTED:
        return Call("call_function", _REFLECTED[name], args[::-1], {})
    return Call("call_method", name, args, kwargs)


def _is_global_average(input: Tensor, dim: Any = None, keepdim: bool = False, **others: Any) -> bool:
    """Whether a mean is a global pooling, whose integer kernel is exact; the one of ``mean`` adds in floating point."""
    dims = sorted(each % input.ndim for each in dim) if isinstance(dim, (tuple, list)) else []
    return input.ndim == 4 and dims == [2, 3] and keepdim and not others


def _covers_all(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> bool:
    """Whether an average pooling is a global one."""
    kernel, sides = (tuple(_pair(each)) for each in (kernel_size, padding))
    return kernel == tuple(input.shape[2:]) and not any(sides) and divisor_override is None


def bounds_nothing(_input: Tensor, min: Any = None, max: Any = None, **_out: Any) -> bool:
    """Whether ``clamp`` with these bounds leaves every number as it is."""
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        return False
    return min in (None, -math.inf) and max in (None, math.inf)


@functools.cache
def _signature(func: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(func)
    except (TypeError, ValueError):
        return None


def with_argument(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call with one of them set, where the function has one of that name."""
    if name in kwargs:
        return args, {**kwargs, name: value}
    signature = _signature(func)
    if signature is None or name not in signature.parameters:
        return args, kwargs
    bound = signature.bind(*args, **kwargs)
    bound.arguments[name] = value
    return bound.args, bound.kwargs
