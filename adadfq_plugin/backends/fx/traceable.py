"""An exact, FX-friendly rewrite of a model for one input size.

`torch.ao.quantization.quantize_fx` traces the model that it is given, and its tracer takes neither Python control
flow on shapes nor, for quantization, subclasses of the standard layers. `traceable` gives it a model that it takes:
a `torch.fx.GraphModule` of standard `torch.nn` modules and torch functions that computes the same.
"""

import copy
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from adadfq_plugin.backends.fx.calls import Refusal
from adadfq_plugin.backends.fx.concrete import ConcreteTrace
from adadfq_plugin.backends.fx.padding import fold_padding
from adadfq_plugin.errors import UntraceableError
from adadfq_plugin.facts import SIZE

__all__ = ["KEPT_ATTRIBUTES", "traceable"]


KEPT_ATTRIBUTES = ("pretrained_cfg", "default_cfg", "num_classes", "num_features")
"""Attributes of a timm model that `traceable` keeps where there are any."""

_NEUTRAL: dict[Any, int] = {operator.add: 0, operator.mul: 1}
_BATCHES = (2, 3)
_TOLERANCE = 1e-3  # of the largest output; the rewrite is exact but for the order of sums
_WAY_OUT = "Rewrite or replace this module, or quantize the model through torch.export (PT2E)."


def traceable(model: nn.Module, input_size: tuple[int, ...] | int, *, check: bool = True) -> fx.GraphModule:
    r"""Return an exact rewrite of a model that `prepare_qat_fx` can trace, for one input size.

    The model runs once, and what it does with its input becomes the graph. Python control flow takes the path that it
    takes for this input size; the batch size stays free. What does not depend on the input (relative position biases,
    standardised weights) is computed once. Functional calls on a module's own weights become standard modules under
    the module's name, zero padding goes into the convolution where it is symmetric, dropout, in-place changes
    and sums with zero go away. Parameters and buffers keep their names and values, except those that such a constant
    was computed from.

    The result is in the model's training mode as a whole, and BatchNorm learns its statistics in training mode.
    Its ``meta["adadfq_input_size"]`` is the input size, and timm's ``pretrained_cfg``, ``default_cfg``,
    ``num_classes`` and ``num_features`` are kept.

    Args:
        model: A model that takes one tensor of shape (N, \*input_size). It is not changed: the result owns copies.
        input_size: Channels, height and width, or the side length of a square image with three channels.
        check: Compare the outputs of model and result, in evaluation mode, on random inputs of two batch sizes,
            and trace the result as torch.ao does.

    Returns:
        The rewritten model.

    Raises:
        UntraceableError: The computation depends on values of the input or on the batch size in a way that no graph
            can express, or the check has failed. The message names the module.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 10))
        >>> traced = traceable(model, 8)
        >>> traced(torch.zeros(5, 3, 8, 8)).shape
        torch.Size([5, 10])
        >>> traced.meta["adadfq_input_size"]
        (3, 8, 8)
    """
    size = (3, input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    private = copy.deepcopy(model).eval()
    # Before the trace, as the rewrite changes modules of the private copy. Other values than those of the trace.
    samples = [_random_input(private, size, batch) + 0.5 for batch in _BATCHES if check]
    with torch.no_grad():
        expected = [private(images.clone()) for images in samples]
    value, twin = (_random_input(private, size, batch) for batch in _BATCHES)
    trace = ConcreteTrace(private)
    try:
        trace.run(value, twin)
    except Exception as error:
        raise UntraceableError(_explain(private, trace.path, size, error)) from error
    _drop_neutral(trace.graph)
    fold_padding(trace.graph, trace.attributes)
    _separate_nested_targets(trace.graph, trace.attributes)
    for attribute in trace.attributes.values():
        if getattr(attribute, "inplace", False) is True:
            attribute.inplace = False  # the graph names each value, so nothing has to be overwritten
    traced = fx.GraphModule(trace.attributes, trace.graph, type(model).__name__)
    traced.meta[SIZE] = size
    for name in KEPT_ATTRIBUTES:
        if hasattr(model, name):
            setattr(traced, name, copy.deepcopy(getattr(model, name)))
    if check:
        _check(traced, samples, expected)
    return traced.train(model.training)


def _random_input(model: nn.Module, size: tuple[int, ...], batch: int) -> Tensor:
    """Return standard normal images in the model's floating-point type and on its device."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *size, generator=generator).to(like)


def _explain(model: nn.Module, path: str, size: tuple[int, ...], error: Exception) -> str:
    where = f"module {path!r} ({type(model.get_submodule(path)).__name__})" if path else type(model).__name__
    reason = str(error) if isinstance(error, Refusal) else f"{type(error).__name__}: {error}"
    return f"{where} cannot be traced for inputs of size {size}: {reason}. {_WAY_OUT}"


def _drop_neutral(graph: fx.Graph) -> None:
    """Remove sums with the number zero and products with one: the first step of a sum in a loop."""
    for node in list(graph.nodes):
        numbers = [each for each in node.args if type(each) in (int, float)]
        if node.target not in _NEUTRAL or numbers != [_NEUTRAL[node.target]]:
            continue
        (source,) = node.all_input_nodes
        if "dtype" in node.meta and source.meta.get("dtype") == node.meta["dtype"]:
            node.replace_all_uses_with(source)
            graph.erase_node(node)


def _separate_nested_targets(graph: fx.Graph, attributes: dict[str, Any]) -> None:
    """Rename modules that lie inside another module of the graph, as an activation does in timm's BatchNormAct2d.

    Fusion replaces the outer module, and what lay in it would be gone.
    """
    modules = {node.target for node in graph.nodes if node.op == "call_module"}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        parts = node.target.split(".")
        for depth in range(1, len(parts)):
            if ".".join(parts[:depth]) in modules:
                separate = ".".join([*parts[: depth - 1], "_".join(parts[depth - 1 :])])
                attributes[separate] = attributes[node.target]
                node.target = separate
                break


def _check(traced: fx.GraphModule, samples: list[Tensor], expected: list[Any]) -> None:
    """Compare the outputs, and trace once more as torch.ao does.

    Raises:
        UntraceableError: The outputs differ by more than rounding, or torch.ao's tracer does not take the result.
    """
    from torch.ao.quantization.fx.tracer import QuantizationTracer

    name = type(traced).__name__
    traced.eval()
    for images, outputs in zip(samples, expected, strict=True):
        with torch.no_grad():
            actual = _tensors(traced(images))
        for want, got in zip(_tensors(outputs), actual, strict=True):
            scale = want.abs().amax().clamp(min=1e-6)
            error = float((want - got).abs().amax() / scale) if want.shape == got.shape else float("inf")
            if not error < _TOLERANCE:
                raise UntraceableError(
                    f"{name} is not what its trace computes (batch size {len(images)}, relative error {error:.2g}): "
                    f"some computation escapes torch's function calls or changes its inputs. {_WAY_OUT}"
                )
    try:
        QuantizationTracer([], []).trace(traced)
    except Exception as error:
        raise UntraceableError(
            f"torch.ao's tracer does not take the rewritten {name}: {type(error).__name__}: {error}. "
            f"{_WAY_OUT}"
        ) from error


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    values = output if isinstance(output, (tuple, list)) else ()
    return [tensor for value in values for tensor in _tensors(value)]
