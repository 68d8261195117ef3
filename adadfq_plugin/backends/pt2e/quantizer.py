"""The default Quantizer: which tensors of an exported graph take which levels."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY, SharedQuantizationSpec

from adadfq_plugin.backends.pt2e.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.pt2e.folding import CONVOLUTIONS, TRANSPOSED
from adadfq_plugin.backends.pt2e.graphs import aten, is_constant
from adadfq_plugin.config import Scheme
from adadfq_plugin.errors import SettingsError
from adadfq_plugin.ranges import levels_that_fit
from adadfq_plugin.streams import normed_sums

__all__ = ["SchemeQuantizer"]

ENGINES = ("auto", "x86", "onednn")
"""Engines whose kernels Inductor calls: oneDNN's, under either name."""
WEIGHTED = (*CONVOLUTIONS, *TRANSPOSED, aten.linear.default)
PRODUCTS = (aten.matmul.default, aten.bmm.default)
SUMS = (aten.add.Tensor, aten.mul.Tensor, aten.add_.Tensor, aten.mul_.Tensor)
AVERAGES = (
    aten.adaptive_avg_pool1d.default,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default,
    aten.mean.dim,
)
MAXIMA = (aten.max_pool2d.default,)
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
RESHAPES = (
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.permute.default,
    aten.transpose.int,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.dropout.default,
)
"""A tensor's values in another shape."""
MOVES = (
    *RESHAPES,
    *(
        aten.slice.Tensor,
        aten.select.int,
        aten.index_select.default,
        aten.gather.default,
        aten.narrow.default,
    ),
    *(aten.cat.default, aten.stack.default, aten.expand.default, aten.roll.default, aten.flip.default),
    *(
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
        aten.unbind.int,
        operator.getitem,
    ),
)
"""The values of tensors, or some of them, elsewhere."""


class SchemeQuantizer(Quantizer):  # type: ignore[misc]
    """Affine activations per tensor, symmetric weights per channel, at the widths of a scheme.

    Quantized is what goes into convolutions, linear layers, products, sums and poolings, and the logits. The
    sums of a stream that LayerNorm reads stay in float: no integer kernel adds them. One convolution of a sum is
    not rounded before it, for its kernel takes the other operand in.

    Args:
        scheme: widths; the input and the logits take ``boundary_bits``.

    Raises:
        SettingsError: an engine that Inductor doesn't use.
    """

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        if scheme.engine not in ENGINES:
            raise SettingsError(
                f"engine {scheme.engine!r} is not one of backend 'pt2e', whose models Inductor compiles for "
                f"oneDNN: {', '.join(ENGINES)}"
            )
        self.scheme = scheme
        self.activation = self._activation(scheme.activation_bits)
        self.boundary = self._activation(scheme.boundary_bits)
        self.narrowed = 0
        """Layers whose weights have fewer bits, for the CPU adds pairs of products in 16 bits."""

    @staticmethod
    def _activation(bits: int) -> QuantizationSpec:
        return QuantizationSpec(
            dtype=torch.uint8,
            observer_or_fake_quant_ctr=LearnedFakeQuantize,
            quant_min=0,
            quant_max=2**bits - 1,
            qscheme=torch.per_tensor_affine,
        )

    def _weight(self, axis: int, largest_activation: int) -> QuantizationSpec:
        levels = -(2 ** (self.scheme.weight_bits - 1)), 2 ** (self.scheme.weight_bits - 1) - 1
        lowest, highest = levels
        if not torch.cpu._is_vnni_supported():
            lowest, highest = levels_that_fit(*levels, largest_activation)
        self.narrowed += (lowest, highest) != levels
        return QuantizationSpec(
            dtype=torch.int8,
            # torchao passes the axis on to classes named "PerChannel" only
            observer_or_fake_quant_ctr=LearnedFakeQuantize.with_args(ch_axis=axis),
            quant_min=lowest,
            quant_max=highest,
            qscheme=torch.per_channel_symmetric,
            ch_axis=axis,
        )

    def annotate(self, model: GraphModule) -> GraphModule:
        """Marks every tensor that is to be quantized."""
        specs = dict(self._activations(model))
        for node in model.graph.nodes:
            if node.target in WEIGHTED and not _is_float(node.args[0]):
                continue
            if node.target in WEIGHTED and is_constant(node.args[1]):
                source = _source(node.args[0])
                levels = specs.get(source, self.activation)
                while isinstance(levels, SharedQuantizationSpec):
                    levels = specs[levels.edge_or_node]
                weight = self._weight(1 if node.target in TRANSPOSED else 0, levels.quant_max)
                # torchao reads the two by their order
                _annotation(node).input_qspec_map = {
                    node.args[0]: SharedQuantizationSpec(source),
                    node.args[1]: weight,
                }
        for node, spec in specs.items():
            _annotation(node).output_qspec = spec
        return model

    def _activations(self, model: GraphModule) -> Iterator[tuple[Node, Any]]:
        """The tensors that are quantized, each with its specification."""
        normed = _normed_sums(model)
        read: set[Node] = set()
        for node in model.graph.nodes:
            read.update(_source(each) for each in _operands(node, normed) if _is_float(each))
        outputs = [_source(each) for node in model.graph.nodes if node.op == "output" for each in _flat(node)]
        for node in reversed(model.graph.nodes):
            if node.target in MAXIMA and node in read:
                # levels go through a maximum as they are
                read.discard(node)
                read.add(_source(node.args[0]))
                yield node, SharedQuantizationSpec(_source(node.args[0]))
        for node in model.graph.nodes:
            if node in outputs:
                yield node, self.boundary
            elif node in read:
                yield node, self.boundary if node.op == "placeholder" else self.activation

    def validate(self, model: GraphModule) -> None:
        """Nothing is annotated that could not be converted."""


def _annotation(node: Node) -> QuantizationAnnotation:
    found = node.meta.setdefault(Q_ANNOTATION_KEY, QuantizationAnnotation(_annotated=True))
    assert isinstance(found, QuantizationAnnotation)
    return found


def _flat(node: Node) -> list[Node]:
    return [each for each in node.all_input_nodes if _is_float(each)]


def _is_float(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, torch.Tensor) and value.is_floating_point() and not is_constant(node)


def _pads_with_nothing(node: Node) -> bool:
    """Whether a tensor is padded for a maximum, by minus infinity, which no level stands for."""
    return node.target is aten.pad.default and node.args[2:] == ("constant", -math.inf)


def _source(node: Node) -> Node:
    """The tensor whose values these are, in another shape."""
    while node.target in RESHAPES or _pads_with_nothing(node):
        assert isinstance(node.args[0], Node)
        node = node.args[0]
    return node


def _normed_sums(model: GraphModule) -> set[Node]:
    """Sums that a LayerNorm reads, directly or after further sums."""
    return normed_sums(
        model.graph,
        is_sum=lambda node: node.target in SUMS,
        is_norm=lambda node: node.target in NORMS,
        moves=lambda node: node.target in MOVES,
    )


def _adding(node: Node) -> Node | None:
    """The convolution whose kernel adds the other operand itself, before it rounds; None where there is none."""
    if node.target not in (aten.add.Tensor, aten.add_.Tensor):
        return None
    for each in node.all_input_nodes:
        layer = each.all_input_nodes[0] if each.target is aten.batch_norm.default else each
        if layer.target in CONVOLUTIONS and len(each.users) == len(layer.users) == 1:
            return each
    return None


def _operands(node: Node, normed: set[Node]) -> list[Any]:
    """The activations that an integer form of the call would read."""
    if node.target in WEIGHTED:
        return [node.args[0]] if is_constant(node.args[1]) else []
    if node.target in PRODUCTS:
        return list(node.args)
    if node.target in SUMS and node not in normed and all(map(_is_float, node.args)):
        unrounded = _adding(node)
        return [each for each in node.args if each is not unrounded]
    if node.target in AVERAGES or node.target in MAXIMA:
        return [node.args[0]]
    return []
