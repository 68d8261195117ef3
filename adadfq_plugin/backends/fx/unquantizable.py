"""Which parts of a model torch.ao cannot quantize rightly, found by trying.

torch.ao quantizes some calls that have no integer kernel, and some whose kernel computes something else. A trial
conversion on random images shows them: each node of the converted model runs on its own, and what raises, mixes
quantization parameters, or differs from the same call computed in floating point is left out.
"""

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.ao.quantization import QConfigMapping

from adadfq_plugin.backends.fx.calls import in_float
from adadfq_plugin.backends.fx.graphs import module_of, separate_calls
from adadfq_plugin.backends.fx.levels import has_fixed_levels
from adadfq_plugin.backends.fx.traceable import KEPT_ATTRIBUTES
from adadfq_plugin.backends.fx.trial import COPIES, JOINING, CallSite, numbered, trial
from adadfq_plugin.errors import UntraceableError
from adadfq_plugin.facts import SIZE

__all__ = ["leave_in_float", "unquantizable"]

_MAX_TRIALS = 20
PRELU = "torch.nn.functional.prelu"
_ARITHMETIC = (operator.add, operator.sub, operator.mul, torch.add, torch.sub, torch.mul)
_SHARING = (operator.add, operator.mul, torch.add, torch.mul)
"""What torch.ao quantizes with a number as well, and then at the levels of its one tensor."""


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
    (``torch.backends.quantized.engine``); parts that fail are left out, until nothing fails. Eight things fail, of
    which the first five are seen in the graph:

    - a call on an integer tensor (indices, masks), which torch.ao takes for a floating-point one;
    - a maximum that gives its places as well, and so no tensor to quantize;
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
    images = torch.randn(2, *traced.meta[SIZE], generator=torch.Generator().manual_seed(0))
    like = next((p for p in traced.parameters() if p.is_floating_point()), images)
    for _ in range(_MAX_TRIALS):
        found = trial(*_without(sites, traced, mapping), images.to(like))
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
        module = module_of(traced, node)
        if module is not None and _has_layers(module):
            sites.append(CallSite(node.op, name, None, "torch.ao does not look into it"))
        elif getattr(module, "return_indices", node.kwargs.get("return_indices", False)):
            place = index if module is None else None
            sites.append(CallSite(node.op, name, place, "gives places as well, which are no values"))
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
            node.target in JOINING
            and len({has_fixed_levels(traced, each) for each in node.all_input_nodes}) > 1
        ):
            reason = "joins a sigmoid or the like with other tensors, which would take its range"
            sites.append(CallSite(node.op, name, index, reason))
    return sites


def _has_layers(module: nn.Module) -> bool:
    """Whether a module that is called as one has layers in it, and not only its own parametrized weight."""
    return any(
        name != "parametrizations" and any(True for _ in child.parameters())
        for name, child in module.named_children()
    )


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
        if site.op == "call_module":  # and what is in it, which would be rounded and never lowered
            for name, _ in traced.get_submodule(site.target).named_modules(prefix=site.target):
                mapping.set_module_name(name, None)
    in_float_modules = {site.target for site in sites}
    # torch.ao fuses by the module: the BatchNorm or the ReLU behind the last call would be that of every call
    result.meta[COPIES] = separate_calls(
        result,
        lambda node, module: (
            str(node.target) not in in_float_modules and any(True for _ in module.parameters())
        ),
    )
    hidden = {site.place for site in sites}
    for node, target, index in numbered(graph):
        if node.op != "call_module" and {(node.op, target, None), (node.op, target, index)} & hidden:
            node.op, node.target, node.args = "call_function", in_float, (target, *node.args)
            node.meta["is_wrapped"] = True
    for node in list(graph.nodes):
        module = module_of(result, node)
        if isinstance(module, nn.PReLU) and node.target in in_float_modules:  # lowered whatever its qconfig
            with graph.inserting_before(node):
                weight = graph.get_attr(f"{node.target}.weight")
            node.op, node.target, node.args = "call_function", in_float, (PRELU, node.args[0], weight)
            node.meta["is_wrapped"] = True
    result.recompile()
    return result, mapping
