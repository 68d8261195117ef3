"""torchao's PT2E mode: the only package that imports torchao."""

from __future__ import annotations

import copy
import importlib
import io
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

try:
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e
except ImportError as error:
    raise ImportError("backend 'pt2e' needs torchao: pip install 'adadfq_plugin[pt2e]'") from error

from adadfq_plugin.backends.pt2e.fake_quantize import LearnedFakeQuantize, belongs_to
from adadfq_plugin.backends.pt2e.folding import BATCH_NORM, CONVOLUTIONS, absorb_eps, separate_layers
from adadfq_plugin.backends.pt2e.graphs import (
    is_exported,
    plain_copy,
    use_eval_mode,
    use_explicit_padding,
    use_no_mutation,
)
from adadfq_plugin.backends.pt2e.macs import integer_macs
from adadfq_plugin.backends.pt2e.prepared import ATTRIBUTES, NARROWED, PT2EPrepared, input_size
from adadfq_plugin.backends.pt2e.quantizer import SchemeQuantizer
from adadfq_plugin.config import Scheme
from adadfq_plugin.errors import DataError, ModelError, first_line
from adadfq_plugin.facts import SIZE

__all__ = ["LearnedFakeQuantize", "PT2EBackend", "PT2EPrepared", "SchemeQuantizer", "compiled"]


TOLERANCE = 1e-3
"""Relative difference of logits up to which a rewrite is the same network."""


def _is_converted(model: GraphModule) -> bool:
    return any(
        isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "quantized_decomposed"
        for node in model.graph.nodes
    )


def _export(model: nn.Module, example: Tensor) -> GraphModule:
    """The graph for batches of any size, where the model allows it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exported: Any = torch.export.export(model, (example,), dynamic_shapes=({0: Dim.AUTO},))
        graph: GraphModule = exported.module()
    return graph


class _Compiled(nn.Module):
    """A network that Inductor compiles at the first call, its weights frozen."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self._run: Any = torch.compile(network)

    def forward(self, images: Tensor) -> Any:
        # torch.compile(options=...) sets it too late for the passes that look for integer layers
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return self._run(images)


def compiled(converted: nn.Module) -> nn.Module:
    """A converted model as Inductor compiles it, with the integer kernels of this CPU; for inference alone.

    Nothing else makes integers of a converted model, which computes in float what it has quantized. torchao's passes
    are registered for the whole process, as by the import of its own quantizer for x86.

    Args:
        converted: what ``convert_pt2e`` or :meth:`PT2EBackend.load` returned.
    """
    importlib.import_module("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    return _Compiled(converted)


class PT2EBackend:
    """``prepare_qat_pt2e`` / ``prepare_pt2e`` and ``convert_pt2e``."""

    name = "pt2e"
    summary = "torchao PT2E: torch.export, prepare_qat_pt2e, prepare_pt2e, convert_pt2e"
    suffix = ".pt2"

    def recognises(self, model: nn.Module) -> bool:
        """Whether ``model`` is a graph of torch.export, prepared or already converted."""
        return is_exported(model)

    def prepare(self, model: nn.Module, input_size: tuple[int, int, int], scheme: Scheme) -> nn.Module:
        """``prepare_qat_pt2e`` on an export of a copy of a float model.

        Raises:
            ModelError: torch.export or torchao can't follow the model, with the reason.
        """
        quantizer = SchemeQuantizer(scheme)
        toolkit = "torch.export"
        try:
            private = copy.deepcopy(model).eval()
            example = torch.zeros(2, *input_size).to(next(private.parameters(), torch.zeros(0)))
            graph = plain_copy(_export(private, example))
            use_eval_mode(graph)
            use_no_mutation(graph.graph)
            use_explicit_padding(graph.graph)
            separate_layers(graph)
            absorb_eps(graph)
            _refuse_batch_statistics(graph)
            _check(private, graph, example)
            notes, toolkit = dict(graph.meta), "torchao"
            prepared: GraphModule = prepare_qat_pt2e(graph, quantizer)
        except ModelError:
            raise
        except Exception as error:  # whatever the toolkits raise
            raise ModelError(f"{toolkit} can't follow {type(model).__name__}: {first_line(error)}") from error
        for name in ("pretrained_cfg", "num_classes"):
            if hasattr(model, name):
                setattr(prepared, name, copy.deepcopy(getattr(model, name)))
        prepared.meta.update(notes)
        prepared.meta[SIZE] = tuple(input_size)
        prepared.meta[NARROWED] = quantizer.narrowed
        return prepared

    def open(self, prepared: nn.Module) -> PT2EPrepared:
        """A private copy of a prepared model.

        Raises:
            ModelError: not prepared, or converted already, or quantizing nothing, or exported for one batch size.
        """
        if not isinstance(prepared, GraphModule) or not is_exported(prepared):
            raise ModelError(
                f"{type(prepared).__name__} is not prepared: call torch.export.export and prepare_qat_pt2e (or "
                "adadfq_plugin.prepare) first"
            )
        if _is_converted(prepared):
            raise ModelError(
                "the model is already converted: its weights are integers; calibrate what prepare_qat_pt2e "
                "returned, before convert_pt2e"
            )
        foreign = [
            name for name, each in prepared.named_modules() if belongs_to(each, "torch.ao.quantization")
        ]
        if foreign:
            raise ModelError(
                f"the model mixes two toolkits: {foreign[0]!r} is a quantizer of torch.ao, the graph is torchao's; "
                "build the Quantizer from torchao's observers and fake quantizers alone"
            )
        if ATTRIBUTES not in prepared.meta:
            raise ModelError(
                "the model is exported, but not prepared: call prepare_qat_pt2e(model, quantizer) first"
            )
        input_size(prepared)
        return PT2EPrepared(prepared)

    def integer_macs(self, converted: nn.Module, example: Tensor) -> int:
        """Multiply-adds of one image whose operands are integers once Inductor has compiled the model."""
        assert isinstance(converted, GraphModule)
        return integer_macs(converted, example)

    def save(self, converted: nn.Module, example: Tensor, path: Path) -> None:
        """An exported program: ``torch.export.load`` runs it without this package."""
        if not isinstance(converted, GraphModule):
            raise ModelError(f"{type(converted).__name__} is not what convert_pt2e returned")
        graph = plain_copy(converted)
        several = example if len(example) > 1 else example.repeat(2, *[1] * (example.ndim - 1))
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program: Any = torch.export.export(graph, (several,), dynamic_shapes=({0: Dim.AUTO},))
            program.example_inputs = None  # images have no place in the file, nor have paths of this machine
            for node in program.graph.nodes:
                for key in ("stack_trace", "from_node", "nn_module_stack"):
                    node.meta.pop(key, None)
            stream = io.BytesIO()  # torch's own writer ends the process where a disk is full
            torch.export.save(program, stream)
            path.write_bytes(stream.getbuffer())

    def load(self, path: Path) -> nn.Module:
        """What ``save`` wrote.

        Raises:
            DataError: the file is missing or is no exported program.
        """
        try:
            with warnings.catch_warnings(), path.open("rb") as file:
                warnings.simplefilter("ignore")
                loaded: nn.Module = torch.export.load(file).module()
        except Exception as error:  # whatever torch's readers raise
            raise DataError(f"{path} is no converted model: {first_line(error)}") from error
        return loaded


def _refuse_batch_statistics(graph: GraphModule) -> None:
    """Refuses what torchao would take for BatchNorm with statistics of its own, and break."""
    for norm in graph.graph.nodes:
        if norm.target is BATCH_NORM and norm.args[4] is None and norm.args[0].target in CONVOLUTIONS:
            raise ModelError(
                f"a BatchNorm behind the convolution {norm.args[0].name!r} keeps no running statistics, so that an "
                "image's answer depends on its batch: such a network can't be quantized"
            )


def _check(model: nn.Module, graph: GraphModule, like: Tensor) -> None:
    """Compares the rewritten graph with the model on random images.

    Raises:
        ModelError: they differ by more than rounding.
    """
    images = torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
    with torch.no_grad():
        expected, found = model(images.clone()), graph(images)
    if isinstance(expected, Tensor):
        error = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
        if not error < TOLERANCE:
            raise ModelError(
                f"the export of {type(model).__name__} is not what the model computes: relative error {error:.2g}"
            )
