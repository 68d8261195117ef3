"""A trial conversion: which calls of a converted model fail, or compute something else than in floating point."""

import contextlib
import copy
import functools
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import OpOverloadPacket
from torch.ao.nn import quantized as nnq
from torch.ao.nn.intrinsic import quantized as nniq
from torch.ao.quantization import QConfigMapping
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.fx.node import _get_qualified_name

from adadfq_plugin.backends.fx.calls import in_float
from adadfq_plugin.backends.fx.kernels import using_engine
from adadfq_plugin.backends.fx.prepared import FXPrepared
from adadfq_plugin.contracts import Phase
from adadfq_plugin.errors import first_line
from adadfq_plugin.hooks import any_algorithm

__all__ = ["COPIES", "JOINING", "CallSite", "numbered", "trial"]

COPIES = "adadfq_copies"
"""Key of ``meta`` for what module each copy was made of, by name; each call has a module of its own."""

JOINING = (torch.cat, torch.concat, torch.stack)

_APART = 1e-5  # between the logarithms of two step sizes
_MAX_WRONG = 0.01  # share of the results; right kernels are a level off at most, at ties
_ALIASES: dict[Any, Any] = {torch.add: operator.add, torch.mul: operator.mul, operator.matmul: torch.matmul}
_WITH_RELU = (torch.ops.quantized.add_relu, torch.ops.quantized.mul_relu)
_LOWERED: dict[Any, Any] = {
    **dict.fromkeys((torch.ops.quantized.add, torch.ops.quantized.add_relu), operator.add),
    **dict.fromkeys((torch.ops.quantized.mul, torch.ops.quantized.mul_relu), operator.mul),
    torch.ops.quantized.matmul: torch.matmul,
    **{
        getattr(torch.ops.quantized, function.__name__): function
        for function in (F.hardswish, F.leaky_relu, F.elu, F.layer_norm, F.instance_norm)
    },
}


@dataclass(frozen=True)
class CallSite:
    """A part of a model that has to stay in floating point.

    Attributes:
        op: ``"call_module"``, ``"call_function"`` or ``"call_method"``, as in `torch.fx`.
        target: Qualified name of the module or the function, or the method's name with a dot before it.
        index: Which of the calls of the function it is, counted along the graph; None means every one.
        reason: What happened in the trial, in one line.
    """

    op: str
    target: str
    index: int | None
    reason: str

    @property
    def place(self) -> tuple[str, str, int | None]:
        """What it is apart from the reason."""
        return self.op, self.target, self.index


def numbered(graph: fx.Graph) -> Iterator[tuple[fx.Node, str, int]]:
    """Yield each node with the name of what it calls and which of the calls of that name it is."""
    calls: dict[str, int] = defaultdict(int)
    for node in graph.nodes:
        name = _name(node)
        yield node, name, calls[name]
        calls[name] += 1


def _name(node: fx.Node) -> str:
    """Return what a node calls, by a name that hiding it in `in_float` does not change."""
    if node.target is in_float:
        return str(node.args[0])
    if node.op == "call_function":
        called = _LOWERED.get(node.target, node.target)
        return _get_qualified_name(_ALIASES.get(called, called))
    return f".{node.target}" if node.op == "call_method" else str(node.target)


def trial(traced: fx.GraphModule, mapping: QConfigMapping, images: Tensor) -> list[CallSite]:
    """Convert a copy of the model for each engine that it may run on; return what fails, up to the first exception."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_qat_fx(copy.deepcopy(traced).train(), mapping, (images,))
        opened = FXPrepared(prepared, requantized=False)
        with opened.phase(Phase.OBSERVE):
            opened.module(images)
        opened.set_ranges("minmax")
        for place, step in enumerate(opened.steps()):  # other quantizers differ, whatever the images
            step.data += _APART * place
        copies = traced.meta.get(COPIES, {})
        origins = {**copies, **{name: copies.get(of, of) for name, of in opened.origins.items()}}
        sites: dict[tuple[str, str, int | None], CallSite] = {}
        for engine in sorted(opened.engines & set(torch.backends.quantized.supported_engines)):
            opened.engine = engine
            run = _Trial(cast(fx.GraphModule, opened.convert().eval()), origins)
            with using_engine(engine), any_algorithm(), contextlib.suppress(_Stopped):
                run.run_nodes(images.cpu())
            sites = {**{site.place: site for site in run.sites}, **sites}
    return list(sites.values())


class _Stopped(Exception):
    """The trial cannot go on behind a call that has raised."""


class _Trial(fx.Interpreter):
    """Run a converted model node by node and collect what fails.

    Args:
        module: The converted model.
        origins: What its copies of modules are copies of, by name.
    """

    def __init__(self, module: fx.GraphModule, origins: dict[str, str]) -> None:
        super().__init__(module)
        self._origins = origins
        self.sites: list[CallSite] = []
        self._places = {node: index for node, _, index in numbered(module.graph)}

    def run_nodes(self, images: Tensor) -> None:
        """Run all nodes. `fx.Interpreter.run` would start the thread of a progress bar."""
        self.args_iter = iter([images])
        for node in self.graph.nodes:
            self.env[node] = self.run_node(node)
            for unused in self.user_to_last_uses.get(node, []):
                del self.env[unused]

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; see the class."""
        index = self._places[n]
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target in JOINING and not _shares_parameters(args[0] if args else kwargs["tensors"]):
            self._add(n, index, "joins tensors with different quantization parameters")
        try:
            result = super().run_node(n)
        except Exception as error:
            message = first_line(error).split(". This could")[0]
            self._add(n, None, f"{type(error).__name__}: {message}")
            raise _Stopped from error
        # tuples of tensors (chunk, split) hold the levels of their input, and aren't compared
        if n.op.startswith("call") and isinstance(result, Tensor) and result.is_quantized:
            exact = self._exact(n, args, kwargs)
            wrong = 0.0 if exact is None else _wrong_results(result, exact)
            if wrong > _MAX_WRONG:
                self._add(n, None, f"the integer kernel is wrong: {wrong:.0%} of the results are levels off")
        return result

    def _exact(self, node: fx.Node, args: Any, kwargs: Any) -> Tensor | None:
        """Return what an integer call computes, on the dequantized numbers; None where that isn't known."""
        args, kwargs = fx.node.map_aggregate((args, kwargs), _dequantized)
        called: Any = node.target
        with_relu = False
        if node.op == "call_module":
            module = self.module.get_submodule(str(node.target))
            called, with_relu = _float_layer(module), type(module).__module__.startswith(nniq.__name__)
        elif node.op == "call_method":
            called = getattr(Tensor, str(node.target))
        elif node.target in _LOWERED:
            called, with_relu = _LOWERED[node.target], node.target in _WITH_RELU
            args = args if kwargs else args[:2]  # the scale and the zero point of the result come last
            kwargs = {name: value for name, value in kwargs.items() if not name.startswith("output_")}
        if called is None or called is torch.quantize_per_tensor or isinstance(called, OpOverloadPacket):
            return None
        exact: Tensor = called(*args, **kwargs)
        return exact.relu() if with_relu else exact

    def _add(self, node: fx.Node, index: int | None, reason: str) -> None:
        name = _name(node)
        target = self._origins.get(name, name) if node.op == "call_module" else name
        found = CallSite(node.op, target, index, reason)
        if found.place not in {site.place for site in self.sites}:
            self.sites.append(found)


def _shares_parameters(tensors: Any) -> bool:
    quantized = [tensor for tensor in tensors if tensor.is_quantized]
    return len({(tensor.q_scale(), tensor.q_zero_point()) for tensor in quantized}) <= 1


def _dequantized(value: Any) -> Any:
    return value.dequantize() if isinstance(value, Tensor) and value.is_quantized else value


def _wrong_results(result: Tensor, exact: Tensor) -> float:
    """Return the share of the integers that are more than a level from the exact results."""
    levels = torch.quantize_per_tensor(exact, result.q_scale(), result.q_zero_point(), result.dtype)
    return float(((levels.int_repr().int() - result.int_repr().int()).abs() > 1).float().mean())


def _float_layer(module: nn.Module) -> Callable[..., Tensor] | None:
    """Return what a module computes, on floating-point numbers; None where that isn't known."""
    for kind, layer in _LAYERS.items():
        if isinstance(module, kind):
            integer = cast(Any, module)
            return functools.partial(layer, integer, integer.weight().dequantize(), integer.bias())
    if isinstance(module, nnq.PReLU):  # on some CPUs its kernel is wrong
        return functools.partial(F.prelu, weight=module.weight.dequantize())
    for kind in type(module).__mro__:  # the others are subclasses of the layers in float
        if kind.__module__.startswith("torch.nn.modules.") and kind is not nn.Module:
            return functools.partial(cast(Any, kind).forward, module)
    return None


def _linear(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _convolution(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    function, padding = F.conv1d if weight.ndim == 3 else F.conv2d, layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, [by for by in reversed(padding) for _ in (0, 1)], layer.padding_mode), 0
    return function(x, weight, bias, layer.stride, padding, layer.dilation, layer.groups)


def _transposed(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    function = F.conv_transpose1d if weight.ndim == 3 else F.conv_transpose2d
    return function(
        x, weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    )


_LAYERS: dict[type[nn.Module], Callable[[Any, Tensor, Tensor | None, Tensor], Tensor]] = {
    nnq.Linear: _linear,
    **dict.fromkeys((nnq.ConvTranspose1d, nnq.ConvTranspose2d), _transposed),
    **dict.fromkeys((nnq.Conv1d, nnq.Conv2d), _convolution),
}
"""What an integer layer with packed weights computes, on the dequantized numbers."""
