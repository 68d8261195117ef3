"""What a network is given, gives and calls while it runs, written down: recorders that end with their block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "Arguments",
    "Call",
    "argument",
    "capture_calls",
    "capture_draws",
    "capture_inputs",
    "capture_outputs",
    "short_name",
]


@contextmanager
def capture_inputs(
    modules: Mapping[str, nn.Module] | Iterable[tuple[str, nn.Module]],
) -> Iterator[dict[str, Tensor]]:
    """Record the first input of each module whenever it runs.

    The tensors stay in their graph, so a loss of them reaches the images. The first input is the first
    positional argument, or the first keyword argument where there is none. A module that runs twice leaves
    its latest input.

    Args:
        modules: Modules by name, as a mapping or as pairs, for instance ``model.named_modules()``.

    Yields:
        A dictionary from names to inputs, empty until a module runs. It keeps its contents after the block.

    Raises:
        TypeError: A value is not a module, or a module runs with a first input that is not a tensor.

    Example:
        >>> import torch
        >>> layer = torch.nn.ReLU()
        >>> with capture_inputs({"act": layer}) as inputs:
        ...     _ = layer(torch.tensor([-1.0, 2.0]))
        >>> inputs
        {'act': tensor([-1.,  2.])}
        >>> len(layer._forward_pre_hooks)
        0
    """
    pairs = list(modules.items() if isinstance(modules, Mapping) else modules)
    inputs: dict[str, Tensor] = {}
    with ExitStack() as handles:
        for name, module in pairs:
            if not isinstance(module, nn.Module):
                raise TypeError(f"modules[{name!r}] must be a torch.nn.Module; got {type(module).__name__}")
            handle = module.register_forward_pre_hook(partial(_record, inputs, name), with_kwargs=True)
            handles.callback(handle.remove)
        yield inputs


def _record(
    inputs: dict[str, Tensor], name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    first = next(iter((*args, *kwargs.values())), None)
    if not isinstance(first, Tensor):
        raise TypeError(f"the first input of {name!r} must be a tensor; got {type(first).__name__}")
    inputs[name] = first


@contextmanager
def capture_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Record the output of each module whenever it runs; the tensors stay in their graph.

    A module that runs twice leaves its latest output.

    Args:
        modules: Modules by name; what they return must be a tensor.

    Yields:
        A dictionary from names to outputs, empty until a module runs. It keeps its contents after the block.

    Example:
        >>> import torch
        >>> layer = torch.nn.ReLU()
        >>> with capture_outputs({"act": layer}) as outputs:
        ...     _ = layer(torch.tensor([-1.0, 2.0]))
        >>> outputs
        {'act': tensor([0., 2.])}
        >>> len(layer._forward_hooks)
        0
    """
    outputs: dict[str, Tensor] = {}

    def record(name: str, _module: nn.Module, _args: Any, output: Tensor) -> None:
        outputs[name] = output

    with ExitStack() as handles:
        for name, module in modules.items():
            handles.callback(module.register_forward_hook(partial(record, name)).remove)
        yield outputs


def short_name(function: Callable[..., Any]) -> str:
    """The name of a function of torch; ATen's operators have theirs in front of a dot."""
    return str(getattr(function, "__name__", "")).partition(".")[0]


def argument(
    args: Sequence[Any], kwargs: Mapping[str, Any], place: int, name: str, default: Any = None
) -> Any:
    """An argument of a call, however it was passed."""
    return args[place] if len(args) > place else kwargs.get(name, default)


class Arguments:
    """What a function of torch was called with."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """An argument, however it was passed."""
        return argument(self.args, self.kwargs, place, name, default)


@dataclass(frozen=True)
class Call(Arguments):
    """One call of a function of torch: its short name, its arguments and the tensor that it returned."""

    name: str
    args: tuple[Any, ...]
    output: Tensor
    kwargs: Mapping[str, Any] = field(default_factory=dict)


class _Recorder(TorchFunctionMode):
    """Notes the calls of some functions."""

    def __init__(self, names: Collection[str], calls: list[Call]) -> None:
        super().__init__()
        self.names, self.calls = names, calls

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        name = short_name(func)
        if name in self.names and isinstance(output, Tensor):
            self.calls.append(Call(name, args, output, kwargs or {}))
        return output


@contextmanager
def capture_calls(module: nn.Module, names: Collection[str]) -> Iterator[list[Call]]:
    """Record what a module's forward pass calls, whether it is written in modules, functions or ATen's operators.

    The tensors stay in their graph. Each forward pass of ``module`` starts the record anew.

    Args:
        module: The module whose calls count.
        names: Short names of functions of torch, such as ``"layer_norm"``.

    Yields:
        The calls of the latest forward pass, in their order; it keeps its contents after the block.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.ReLU(), torch.nn.LayerNorm(2))
        >>> with capture_calls(net, {"layer_norm"}) as calls:
        ...     _ = torch.layer_norm(net(torch.ones(1, 2)), [2])
        >>> [call.name for call in calls]
        ['layer_norm', 'layer_norm']
    """
    calls: list[Call] = []
    running: list[_Recorder] = []

    def start(*_: Any) -> None:
        calls.clear()
        running.append(_Recorder(names, calls))
        running[-1].__enter__()  # type: ignore[no-untyped-call]

    def stop(*_: Any) -> None:
        running.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def stop_all() -> None:  # torch calls no hook after Ctrl-C
        while running:
            stop()

    with ExitStack() as handles:
        handles.callback(stop_all)
        handles.callback(module.register_forward_pre_hook(start).remove)
        handles.callback(module.register_forward_hook(stop, always_call=True).remove)
        yield calls


class _DrawWatch(TorchDispatchMode):
    """Notes the operators that draw random numbers."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = names

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # attention could drop some of its weights, and has the tag whether it does or not
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in str(func):
            self.names.append(short_name(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def capture_draws() -> Iterator[list[str]]:
    """Record the operators that draw random numbers from torch's generators, whatever calls them.

    Yields:
        Their short names, in order; the list keeps its contents after the block.

    Example:
        >>> import torch
        >>> with capture_draws() as names, torch.random.fork_rng(devices=[]):
        ...     _ = torch.zeros(2).bernoulli_() + torch.nn.Dropout().eval()(torch.ones(2))
        >>> names
        ['bernoulli_']
    """
    names: list[str] = []
    with _DrawWatch(names):
        yield names
