"""Temporary changes that always come back: after the block, after an exception in it, and nested."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
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
    "fork_rng",
    "kept_buffers",
    "module_modes",
    "plain_tensors",
    "short_name",
    "unfrozen",
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
        >>> with capture_draws() as names, fork_rng(0):
        ...     _ = torch.zeros(2).bernoulli_() + torch.nn.Dropout().eval()(torch.ones(2))
        >>> names
        ['bernoulli_']
    """
    names: list[str] = []
    with _DrawWatch(names):
        yield names


@contextmanager
def module_modes(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a module and all its submodules into train or eval mode; give each its own flag back afterwards.

    ``module.train(training)`` does the first, so a module that overrides ``train`` (a frozen BatchNorm, say)
    is asked. The flags are put back one by one, so a mixture of modes survives. A graph of ``torch.export``
    refuses to change its mode, which is part of the graph; it stays as it is.

    Args:
        module: The root of the tree.
        training: True for train mode, False for eval mode.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
        >>> with module_modes(net, training=False):
        ...     [m.training for m in net.modules()]
        [False, False, False]
        >>> [m.training for m in net.modules()]
        [True, True, False]
    """
    flags = [(submodule, submodule.training) for submodule in module.modules()]
    try:
        try:
            module.train(training)
        except NotImplementedError:
            if not isinstance(module, GraphModule):
                raise
        yield
    finally:
        for submodule, flag in flags:
            submodule.training = flag


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Give a module its buffers back after it was run: some count how often, or keep what they have seen.

    Args:
        module: The root of the tree.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> norm = torch.nn.BatchNorm1d(2)
        >>> with kept_buffers(norm):
        ...     _ = norm(torch.randn(4, 2))
        >>> norm.num_batches_tracked.item(), norm.running_mean.tolist()
        (0, [0.0, 0.0])
    """
    plain = [each for each in module.modules() if not isinstance(each, torch.jit.ScriptModule)]
    before = [(each._buffers, dict(each._buffers)) for each in plain]
    values = {buffer: buffer.clone() for _, own in before for buffer in own.values() if buffer is not None}
    try:
        yield
    finally:
        for own, kept in before:
            own.update(kept)
        with torch.no_grad():
            for buffer, value in values.items():
                if not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Tensors are of float32 and on the CPU unless something else is said, and stay what they are.

    Whatever ``torch.set_default_device``, ``torch.set_default_dtype`` and ``torch.autocast`` were told.

    Example:
        >>> import torch
        >>> with torch.device("meta"), torch.autocast("cpu"), plain_tensors():
        ...     (torch.zeros(1, 1) @ torch.zeros(1, 1)).device, torch.is_autocast_enabled("cpu")
        (device(type='cpu'), False)
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def unfrozen(model: nn.Module) -> Iterator[None]:
    """Every parameter asks for gradients where none does, as in a network that was frozen for inference.

    Parameters that were frozen one by one stay so. The flags of before come back.

    Args:
        model: The network.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 2).requires_grad_(False)
        >>> with unfrozen(layer):
        ...     layer.weight.requires_grad
        True
        >>> layer.weight.requires_grad
        False
    """
    parameters = [each for each in model.parameters() if each.is_floating_point()]
    if any(each.requires_grad for each in parameters):
        parameters = []
    try:
        for each in parameters:
            each.requires_grad_(True)
        yield
    finally:
        for each in parameters:
            each.requires_grad_(False)


@contextmanager
def fork_rng(seed: int, *devices: torch.device | str) -> Iterator[None]:
    """Draw from freshly seeded global generators; leave the caller's random streams as if nothing was drawn.

    Seeded, and restored afterwards, are torch's CPU generator, those of ``devices`` that are accelerators,
    :mod:`random` and ``numpy.random``. Generators of other accelerators are not touched.

    Args:
        seed: Any integer in [0, 2**64); NumPy gets its lower 32 bits.
        *devices: Devices whose generators take part beside the CPU's: ``"cuda"``, ``"cuda:1"``, ``"mps"``.

    Yields:
        Nothing.

    Raises:
        ValueError: The seed is out of range.

    Example:
        >>> import torch
        >>> before = torch.get_rng_state()
        >>> with fork_rng(0):
        ...     first = torch.rand(3)
        >>> with fork_rng(0):
        ...     second = torch.rand(3)
        >>> torch.equal(first, second), torch.equal(before, torch.get_rng_state())
        (True, True)
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64); got {seed}")
    generators = [torch.default_generator]
    for device in map(torch.device, devices):
        if device.type == "cuda":
            # Asked for in any case: this starts CUDA, and before that there are no generators.
            current = torch.cuda.current_device()
            generators.append(
                torch.cuda.default_generators[current if device.index is None else device.index]
            )
        elif device.type == "mps":
            generators.append(torch.mps._get_default_mps_generator())
    torch_states = [generator.get_state() for generator in generators]
    random_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        # Not torch.manual_seed, which would reseed every accelerator in the process.
        for generator in generators:
            generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        for generator, state in zip(generators, torch_states, strict=True):
            generator.set_state(state)
        random.setstate(random_state)
        np.random.set_state(numpy_state)
