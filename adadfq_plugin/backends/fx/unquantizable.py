"""Which parts of a model torch.ao cannot quantize rightly, found by trying.

torch.ao quantizes some calls that have no integer kernel, and some whose kernel computes something else. A trial
conversion on random images shows them: each node of the converted model runs on its own, and what raises, mixes
quantization parameters, or differs from the same call computed in floating point is left out.
"""

import contextlib
import copy
import functools
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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
from adadfq_plugin.backends.fx.levels import has_fixed_levels
from adadfq_plugin.backends.fx.prepared import FXPrepared
from adadfq_plugin.backends.fx.traceable import INPUT_SIZE, KEPT_ATTRIBUTES
from adadfq_plugin.contracts import Phase
from adadfq_plugin.errors import UntraceableError, first_line

__all__ = ["CallSite", "leave_in_float", "numbered", "unquantizable"]

_MAX_TRIALS = 20
_APART = 1e-5  # between the logarithms of two step sizes
_MAX_WRONG = 0.01  # share of the results; right kernels are a level off at most, at ties

_JOINING = (torch.cat, torch.concat, torch.stack)
_ARITHMETIC = (operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul)
_SHARING = (operator.add, operator.mul, torch.add, torch.mul)
"""What torch.ao quantizes with a number as well, and then at the levels of its one tensor."""
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


def leave_in_float(
    traced: fx.GraphModule, mapping: QConfigMapping, known: Sequence[CallSite] = ()
) -> tuple[fx.GraphModule, QConfigMapping, list[CallSite]]:
    """Return what to prepare instead of ``traced`` and ``mapping``, so that the conversion runs and is right.

    The parts that `unquantizable` finds stay in floating point. A module gets no qconfig, by its name. For a function
    or a method that would not do: torch.ao lowers what stands between two quantized tensors whatever its qconfig. The
    call is hidden from torch.ao in a call of `adadfq_plugin.backends.fx.calls.in_float`.

    Args:
        traced: The result of `traceable`. It is not changed.
        mapping: The qconfigs. They are not changed.
        known: Parts that are to stay in floating point whatever the trial says.

    Returns:
        A model with the parameters and buffers of ``traced`` itself, a new mapping, and the parts.
    """
    sites = unquantizable(traced, mapping, known)
    return *_without(sites, traced, mapping), sites


def unquantizable(
    traced: fx.GraphModule, mapping: QConfigMapping, known: Sequence[CallSite] = ()
) -> list[CallSite]:
    """Return the parts of a model that torch.ao would quantize, but whose conversion fails or computes something else.

    The model is prepared, converted and run on a copy, on random images, with the quantized engine that is set
    (``torch.backends.quantized.engine``); parts that fail are left out, until nothing fails. Seven things fail:

    - a call on an integer tensor (indices, masks), which torch.ao takes for a floating-point one;
    - a sum or product that something is divided by: it is not to be zero, as a rounded one may be;
    - a sum or product of a tensor and a number: torch.ao fake-quantizes what goes in and what comes out at the same
      levels, however far apart the two ranges are, and the integer kernel computes the result without them;
    - a concatenation of a tensor whose range torch.ao fixes (a sigmoid's is [0, 1)) with others: all would take it;
    - a call without an integer kernel (bicubic interpolation): all calls of that function or method are left out;
    - a concatenation of tensors that don't share a quantizer, as the integer kernel wants them to: only that call is
      left out;
    - a call whose integer kernel gives wrong numbers (in oneDNN some grouped convolutions, and transposed ones with
      other numbers of channels in and out; interpolation of one place, from some layouts): that module is left out, or
      all calls of that function or method.

    Args:
        traced: The result of `traceable`. It is not changed.
        mapping: The qconfigs that the model will be prepared with. They are not changed.
        known: Parts that are left out from the start; they come first in the result.

    Returns:
        The parts, in the order in which they were found.

    Raises:
        UntraceableError: The conversion fails in a way that leaving out parts does not cure.
    """
    already = {site.place for site in known}
    wrong = [site for site in _calls_in_float(traced) if site.place not in already]
    sites = [*known, *wrong]
    images = torch.randn(2, *traced.meta[INPUT_SIZE], generator=torch.Generator().manual_seed(0))
    like = next((p for p in traced.parameters() if p.is_floating_point()), images)
    for _ in range(_MAX_TRIALS):
        found = _trial(*_without(sites, traced, mapping), images.to(like))
        if not found:
            return sites
        before = {site.place for site in sites}
        again = [site for site in found if site.place in before]
        if again:
            raise UntraceableError(
                f"{again[0].target} cannot be converted, nor left in floating point: {again[0].reason}"
            )
        sites += found
    raise UntraceableError(f"after {_MAX_TRIALS} trials something still cannot be converted: {sites[-1]}")


def _calls_in_float(traced: fx.GraphModule) -> list[CallSite]:
    """Return what can be seen without a trial: calls on integers, and results that would have the wrong levels."""
    tensors = {**dict(traced.named_parameters()), **dict(traced.named_buffers())}

    def is_integer(node: Any) -> bool:
        if not isinstance(node, fx.Node):
            return False
        dtype = tensors[str(node.target)].dtype if node.op == "get_attr" else node.meta.get("dtype")
        return dtype is not None and not (dtype.is_floating_point or dtype.is_complex)

    def is_tensor(node: Any) -> bool:
        return isinstance(node, fx.Node) and (node.op == "get_attr" or "dtype" in node.meta)

    sites: list[CallSite] = []
    for node, name, index in numbered(traced.graph):
        gives_tensor = node.op in ("call_function", "call_method") and "dtype" in node.meta
        if gives_tensor and any(map(is_integer, [node, *node.args])):
            sites.append(CallSite(node.op, name, index, "works on integers"))
        elif gives_tensor and node.target in _ARITHMETIC and any(_divides(user, node) for user in node.users):
            sites.append(
                CallSite(node.op, name, index, "gives a denominator, which may not be rounded to zero")
            )
        elif gives_tensor and node.target in _SHARING and sum(map(is_tensor, node.args)) == 1:
            reason = "of a tensor and a number, which would share the levels of the tensor"
            sites.append(CallSite(node.op, name, index, reason))
        elif (
            node.target in _JOINING
            and len({has_fixed_levels(traced, each) for each in node.all_input_nodes}) > 1
        ):
            reason = "joins a sigmoid or the like with other tensors, which would take its range"
            sites.append(CallSite(node.op, name, index, reason))
    return sites


def _divides(call: fx.Node, by: fx.Node) -> bool:
    return call.target is operator.truediv and call.args[1] is by


def _without(
    sites: list[CallSite], traced: fx.GraphModule, mapping: QConfigMapping
) -> tuple[fx.GraphModule, QConfigMapping]:
    mapping = copy.deepcopy(mapping)
    graph = fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    result = fx.GraphModule(traced, graph, type(traced).__name__)
    result.meta.update(traced.meta)
    for name in KEPT_ATTRIBUTES:
        if hasattr(traced, name):
            setattr(result, name, getattr(traced, name))
    for site in sites:
        if site.op == "call_module":
            mapping.set_module_name(site.target, None)
    hidden = {site.place for site in sites}
    for node, target, index in numbered(graph):
        if node.op != "call_module" and {(node.op, target, None), (node.op, target, index)} & hidden:
            node.op, node.target, node.args = "call_function", in_float, (target, *node.args)
            node.meta["is_wrapped"] = True
    result.recompile()
    return result, mapping


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


def _trial(traced: fx.GraphModule, mapping: QConfigMapping, images: Tensor) -> list[CallSite]:
    """Convert a copy of the model and return what fails in it, up to the first exception."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        prepared = prepare_qat_fx(copy.deepcopy(traced).train(), mapping, (images,))
        opened = FXPrepared(prepared, requantized=False)
        with opened.phase(Phase.OBSERVE):
            opened.module(images)
        opened.set_ranges("minmax")
        for place, step in enumerate(opened.steps()):  # other quantizers differ, whatever the images
            step.data += _APART * place
        trial = _Trial(cast(fx.GraphModule, opened.convert().eval()), opened.origins)
        with contextlib.suppress(_Stopped):
            trial.run_nodes(images)
    return trial.sites


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
        if n.target in _JOINING and not _shares_parameters(args[0] if args else kwargs["tensors"]):
            self._add(n, index, "joins tensors with different quantization parameters")
        try:
            result = super().run_node(n)
        except Exception as error:
            message = first_line(error).split(". This could")[0]
            self._add(n, None, f"{type(error).__name__}: {message}")
            raise _Stopped from error
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
    for kind in type(module).__mro__:  # the others are subclasses of the layers in float
        if kind.__module__.startswith("torch.nn.modules.") and kind is not nn.Module:
            return functools.partial(cast(Any, kind).forward, module)
    return None


def _linear(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return F.linear(x, weight, bias)


def _convolution(layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    function = F.conv1d if weight.ndim == 3 else F.conv2d
    return function(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


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
