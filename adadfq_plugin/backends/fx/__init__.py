"""torch.ao's FX mode: the only package that imports torch.ao."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO
from zipfile import ZIP_DEFLATED, BadZipFile, ZipFile

import torch
from torch import Tensor, nn
from torch.ao.nn import quantized as nnq
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.fx import GraphModule

from adadfq_plugin.backends.fx.fake_quantize import LearnedFakeQuantize
from adadfq_plugin.backends.fx.folding import fold_transposed
from adadfq_plugin.backends.fx.graphs import prepared_attributes
from adadfq_plugin.backends.fx.kernels import best_engine, has_vnni, using_engine
from adadfq_plugin.backends.fx.macs import integer_macs
from adadfq_plugin.backends.fx.prepared import ENGINE, IN_FLOAT, FXPrepared, copies_note
from adadfq_plugin.backends.fx.qconfig import qconfig_mapping
from adadfq_plugin.backends.fx.streams import REASON, normed_streams
from adadfq_plugin.backends.fx.traceable import traceable
from adadfq_plugin.backends.fx.trial import COPIES, CallSite
from adadfq_plugin.backends.fx.unquantizable import leave_in_float
from adadfq_plugin.config import Scheme
from adadfq_plugin.errors import DataError, ModelError, SettingsError, first_line
from adadfq_plugin.facts import SIZE

__all__ = [
    "FXBackend",
    "FXPrepared",
    "LearnedFakeQuantize",
    "best_engine",
    "has_vnni",
    "qconfig_mapping",
    "traceable",
    "using_engine",
]


FUNCTIONAL = (nnq.FloatFunctional, nnq.FXFloatFunctional)


def _is_converted(model: nn.Module) -> bool:
    # a float network may have torch.ao's functional modules in it
    names = {type(module).__module__ for module in model.modules() if not isinstance(module, FUNCTIONAL)}
    return any(".nn.quantized" in name or ".intrinsic.quantized" in name for name in names)


def _is_torchao(module: nn.Module) -> bool:
    return any(base.__module__.startswith("torchao.") for base in type(module).__mro__)


def _compress(source: IO[bytes], target: Path) -> None:
    """Deflates an archive, as torch.jit does for its code alone: zero points take 8 bytes a channel, mostly zeros."""
    with ZipFile(source) as old, ZipFile(target, "w", ZIP_DEFLATED) as new:
        for item in old.infolist():
            new.writestr(item, old.read(item), ZIP_DEFLATED)


def _engine_of(path: Path) -> str:
    """The engine that a saved model was prepared for, whose kernels its weights fit; else the best of this machine."""
    with ZipFile(path) as archive:
        notes = [name for name in archive.namelist() if name.endswith(f"/extra/{ENGINE}")]
        engine = archive.read(notes[0]).decode() if notes else ""
    return engine if engine in torch.backends.quantized.supported_engines else best_engine()


def _sentences(sites: Sequence[CallSite]) -> Iterator[str]:
    """What stays in float and why, one sentence for all of a kind."""
    kinds: dict[tuple[str, str], int] = {}
    for site in sites:
        what = "calls" if site.reason == REASON else site.target
        kinds[what, site.reason] = kinds.get((what, site.reason), 0) + 1
    for (what, reason), count in kinds.items():
        yield f"{count} {what} stay in float: {reason}" if count > 1 else f"{what} stays in float: {reason}"


class FXBackend:
    """``prepare_qat_fx`` / ``prepare_fx`` and ``convert_fx``."""

    name = "fx"
    summary = "torch.ao FX graph mode: prepare_qat_fx, prepare_fx, convert_fx"
    suffix = ".pt"

    def recognises(self, model: nn.Module) -> bool:
        """Whether ``model`` is of torch.ao's FX mode, prepared or already converted."""
        return prepared_attributes(model) is not None or _is_converted(model)

    def prepare(self, model: nn.Module, input_size: tuple[int, int, int], scheme: Scheme) -> nn.Module:
        """``prepare_qat_fx`` on an exact, traceable copy of a float model.

        Raises:
            ModelError: the model can't be traced, or torch.ao can't prepare it, with the reason.
            SettingsError: the engine is not built into this PyTorch.
        """
        engine = best_engine() if scheme.engine == "auto" else scheme.engine
        example = (torch.zeros(2, *input_size),)
        with using_engine(engine):
            traced = traceable(model, input_size)
            fold_transposed(traced)
            try:
                traced, mapping, sites = leave_in_float(
                    traced, qconfig_mapping(scheme), normed_streams(traced)
                )
                prepared: GraphModule = prepare_qat_fx(traced.train(), mapping, example)
            except (ModelError, SettingsError):
                raise
            except Exception as error:  # whatever torch.ao raises
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise ModelError(f"torch.ao can't prepare {type(model).__name__}: {first}") from error
        for name in ("pretrained_cfg", "num_classes"):
            if hasattr(model, name):
                setattr(prepared, name, copy.deepcopy(getattr(model, name)))
        prepared.meta[SIZE] = tuple(input_size)
        prepared.meta[ENGINE] = engine
        prepared.meta[IN_FLOAT] = [*_sentences(sites), *copies_note(traced, traced.meta[COPIES])]
        return prepared

    def open(self, prepared: nn.Module) -> FXPrepared:
        """A private copy of a prepared model.

        Raises:
            ModelError: not prepared, or converted already, or quantizing nothing.
        """
        if _is_converted(prepared):
            raise ModelError(
                "the model is already converted: its weights are integers; calibrate what prepare_qat_fx "
                "returned, before convert_fx"
            )
        if not isinstance(prepared, GraphModule) or prepared_attributes(prepared) is None:
            raise ModelError(
                f"{type(prepared).__name__} is not prepared: call prepare_qat_fx (or adadfq_plugin.prepare) first"
            )
        mixed = [name for name, each in prepared.named_modules() if _is_torchao(each)]
        if mixed:
            raise ModelError(
                f"the model mixes two toolkits: {mixed[0]!r} is a quantizer of torchao, the graph is torch.ao's; "
                "build the QConfig from torch.ao's observers and fake quantizers alone"
            )
        return FXPrepared(prepared)

    def integer_macs(self, converted: nn.Module, example: Tensor) -> int:
        """Multiply-adds of one image in torch.ao's integer layers and products."""
        assert isinstance(converted, GraphModule)
        return integer_macs(converted, example)

    def save(self, converted: nn.Module, example: Tensor, path: Path) -> None:
        """TorchScript, its archive compressed: ``torch.jit.load`` runs it without this package."""
        engine = getattr(converted, "meta", {}).get(ENGINE, torch.backends.quantized.engine)
        # freezing packs the weights once more, for the engine of the moment
        with warnings.catch_warnings(), torch.no_grad(), using_engine(engine):
            warnings.simplefilter("ignore")  # torch.jit announces its retirement at every call
            script = torch.jit.freeze(torch.jit.trace(converted.eval(), example, check_trace=False))
            stream = io.BytesIO()  # torch's own writer ends the process where a disk is full
            torch.jit.save(script, stream, _extra_files={ENGINE: engine})
            _compress(stream, path)

    def load(self, path: Path) -> nn.Module:
        """What ``save`` wrote, for the kernels of the engine that it was prepared for.

        Raises:
            DataError: the file is missing or is no TorchScript archive.
        """
        try:
            with warnings.catch_warnings(), using_engine(_engine_of(path)):
                warnings.simplefilter("ignore")
                loaded: nn.Module = torch.jit.load(str(path))
        except (RuntimeError, ValueError, OSError, BadZipFile) as error:
            raise DataError(f"{path} is no converted model: {first_line(error)}") from error
        return loaded
