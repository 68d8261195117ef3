"""The long commands, step by step: load, quantize, measure, write."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adadfq_plugin import api, zoo
from adadfq_plugin.cli.options import Network, Plan
from adadfq_plugin.cli.progress import Bars
from adadfq_plugin.config import Settings, build, nearest, to_toml
from adadfq_plugin.contracts import Backend, Method
from adadfq_plugin.dataset import SyntheticDataset, facts_from_json
from adadfq_plugin.demo import demo_model
from adadfq_plugin.errors import DataError, OutputError, SettingsError, UnknownNameError
from adadfq_plugin.files import atomic_folder, check_folder
from adadfq_plugin.report import Accuracy, Latency, Report, environment, measure_latency, write
from adadfq_plugin.report.render import megabytes, percent
from adadfq_plugin.teacher import Facts

__all__ = ["MODEL_FILE", "Images", "check_method", "evaluate", "load", "quantize", "summary", "synthesize"]

MODEL_FILE = "quantized.pt"
SAMPLES_FILE = "samples.safetensors"
SETTINGS_FILE = "settings.toml"
REPORT_FILE = "report.json"
DEMO = "demo:"


@dataclass(frozen=True)
class Images:
    """Where the labelled images are and how they are read."""

    folder: str
    class_map: str | None
    workers: int
    batch_size: int = 32

    def loader(self, facts: Facts, crop_mode: str) -> zoo.ValidationLoader:
        """Batches for a network with these facts."""
        return zoo.validation_loader(
            self.folder,
            facts,
            batch_size=self.batch_size,
            class_map=self.class_map,
            crop_mode=crop_mode,
            workers=self.workers,
        )


def load(network: Network) -> tuple[nn.Module, Facts, str]:
    """The network, what is known of its images, and how timm crops them."""
    given = network.model_dump(exclude={"name", "checkpoint", "model_kwargs"}, exclude_none=True)
    if network.name.startswith(DEMO):
        clash = sorted({"checkpoint", "model_kwargs", "num_classes"} & network.model_fields_set)
        if clash:
            raise SettingsError(f"{network.name} comes as it is, without --{clash[0].replace('_', '-')}")
        model = demo_model(network.name.removeprefix(DEMO))
    else:
        model = zoo.load_model(
            network.name,
            checkpoint=network.checkpoint,
            num_classes=network.num_classes,
            model_kwargs=network.model_kwargs,
        )
    return model, zoo.facts(model, given), network.crop_mode or zoo.crop_mode(model)


def check_method(plan: Plan) -> Method:
    """The method of the plan, if there is one and the preset and the settings are its own."""
    method = api.methods().get(plan.run.method)
    preset = plan.run.preset
    if preset is not None and preset not in method.presets:
        names = sorted(method.presets)
        raise UnknownNameError(
            f"method {method.name!r} has no preset {preset!r}{nearest(preset, names)} "
            f"(it has: {', '.join(names) or 'none'})"
        )
    build(method.settings, {**method.presets.get(preset or "", {}), **plan.settings})
    return method


def quantize(plan: Plan, output: Path, images: Images | None, *, force: bool, bars: Bars) -> Report:
    """The whole of ``adadfq quantize``: everything is in ``output`` when it returns, or nothing.

    Args:
        plan: what to do.
        output: folder for the results.
        images: labelled images to measure with.
        force: replace an output folder that holds something.
        bars: where progress goes.
    """
    check_method(plan)
    backend = api.backends().get(plan.run.backend)
    check_folder(output, replace=force)
    bars("load", 0, 1, {})
    model, facts, crop_mode = load(plan.network)
    loader = None if images is None else images.loader(facts, crop_mode)
    bars("load", 1, 1, {})
    # The float figure comes first: it reads every image, so that a broken one doesn't cost the whole run.
    top1 = {} if loader is None else {"float": _top1(model, loader, "float", bars)}
    result = api.quantize(
        model,
        scheme=plan.scheme,
        minutes=plan.run.minutes,
        backend=plan.run.backend,
        **_common(plan, facts, bars),
    )
    if result.quantized is None:
        raise SettingsError(f"backend {plan.run.backend!r} can't convert what it prepared")
    converted = result.quantized
    if loader is not None:
        top1["fake-quantized"] = _top1(result.prepared.eval(), loader, "fake-quantized", bars)
        top1["converted"] = _top1(converted, loader, "converted", bars)
    accuracy = None if images is None or loader is None else Accuracy(top1, loader.count, images.folder)
    example = result.samples.images(0, 1)
    latency = _latency(model, converted, example, bars)
    bars("write", 0, 1, {})
    with atomic_folder(output, replace=force) as folder:
        _save(backend, converted, example, folder / MODEL_FILE, output)
        result.samples.save(folder / SAMPLES_FILE)
        (folder / SETTINGS_FILE).write_text(_settings(plan, result.settings), encoding="utf-8")
        report = Report(
            name=plan.network.name,
            method=plan.run.method,
            backend=plan.run.backend,
            scheme=plan.scheme.model_dump(),
            settings=result.settings.model_dump(),
            seed=plan.run.seed,
            samples=result.samples,
            history=result.history,
            seconds=result.seconds,
            agreement=result.agreement,
            sqnr_db=result.sqnr_db,
            information=result.information,
            boundaries=_boundaries(result.settings),
            notes=result.notes,
            warnings=result.warnings,
            accuracy=accuracy,
            sizes={"float": _float_bytes(model), "converted": (folder / MODEL_FILE).stat().st_size},
            latency=latency,
            crop_mode=crop_mode,
            environment=environment(),
        )
        write(report, folder)
    bars("write", 1, 1, {})
    return report


def synthesize(plan: Plan, output: Path, count: int, *, force: bool, bars: Bars) -> SyntheticDataset:
    """The whole of ``adadfq synthesize``: ``output`` is complete when it returns, or wasn't touched."""
    check_method(plan)
    if output.is_file() and not force:
        raise OutputError(f"{output} exists (--force replaces it)")
    SyntheticDataset.check_path(output, replace=force)
    bars("load", 0, 1, {})
    model, facts, _ = load(plan.network)
    bars("load", 1, 1, {})
    samples = api.synthesize(model, count, **_common(plan, facts, bars))
    samples.save(output, replace=force)
    return samples


def evaluate(plan: Plan, images: Images, bars: Bars) -> Accuracy:
    """Top-1 of a network by name, or of the converted one in a folder that ``adadfq quantize`` wrote."""
    folder = Path(plan.network.name)
    if folder.is_dir():
        told = sorted(plan.network.model_fields_set - {"name"})
        if told:
            raise SettingsError(
                f"{folder} is what 'adadfq quantize' wrote; it knows --{told[0].replace('_', '-')}"
            )
        network, (model, facts, crop_mode) = "converted", _converted(folder)
    else:
        network, (model, facts, crop_mode) = "float", load(plan.network)
    loader = images.loader(facts, crop_mode)
    return Accuracy({network: _top1(model, loader, network, bars)}, loader.count, images.folder)


def _converted(folder: Path) -> tuple[nn.Module, Facts, str]:
    try:
        values = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        facts, backend = facts_from_json(values["facts"]), values["backend"]
        crop_mode = values["crop_mode"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is no folder that 'adadfq quantize' wrote: {error}") from error
    return api.backends().get(backend).load(str(folder / MODEL_FILE)), facts, crop_mode


def _top1(model: nn.Module, loader: zoo.ValidationLoader, network: str, bars: Bars) -> float:
    def progress(phase: str, step: int, total: int, figures: Mapping[str, float]) -> None:
        bars(f"{phase} {network}", step, total, figures)

    return float(api.evaluate(model, loader, progress=progress).top1)


def _latency(model: nn.Module, converted: nn.Module, example: Tensor, bars: Bars) -> Latency:
    bars("time", 0, 1, {})
    latency = measure_latency({"float": model, "converted": converted}, example)
    bars("time", 1, 1, {})
    return latency


def _save(backend: Backend, converted: nn.Module, example: Tensor, path: Path, output: Path) -> None:
    try:
        backend.save(converted, example, str(path))
    except RuntimeError as error:  # what torch's file writer raises when the disk is full
        raise OutputError(f"can't write {output / path.name}: {error}") from error


def _float_bytes(model: nn.Module) -> int:
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return stream.tell()


def _settings(plan: Plan, settings: Settings) -> str:
    """What ``--config`` takes to do the same again: preset and minutes have become settings."""
    return to_toml(
        {
            "network": plan.network.model_dump(exclude_unset=True),
            "run": plan.run.model_dump(exclude={"preset", "minutes"}, exclude_none=True),
            "scheme": plan.scheme,
            "settings": settings,
        }
    )


def _boundaries(settings: Settings) -> tuple[float, float] | None:
    low, high = getattr(settings, "lambda_l", None), getattr(settings, "lambda_u", None)
    return None if low is None or high is None else (low, high)


def _common(plan: Plan, facts: Facts, bars: Bars) -> dict[str, Any]:
    return {
        "method": plan.run.method,
        "settings": plan.settings,
        "preset": plan.run.preset,
        "input_size": facts.input_size,
        "num_classes": facts.num_classes,
        "mean": facts.mean,
        "std": facts.std,
        "seed": plan.run.seed,
        "device": plan.run.device,
        "progress": bars,
    }


def summary(report: Report, output: Path) -> str:
    """A few lines for the terminal: the figures, and where the rest is."""
    values = report.as_dict()
    lines = [f"{report.name} {report.bits} by {report.method}, seed {report.seed}"]
    if values["accuracy"] is not None:
        top1 = ", ".join(
            f"{network} {percent(value)}" for network, value in values["accuracy"]["top1"].items()
        )
        lines.append(f"top-1 on {values['accuracy']['count']} images: {top1}")
    else:
        agreement = (
            "" if report.agreement is None else f"; on synthetic images {percent(report.agreement)} agree"
        )
        lines.append(f"accuracy: not measured (--val FOLDER){agreement}")
    before, after = report.sizes["float"], report.sizes["converted"]
    lines.append(f"size: float {megabytes(before)}, converted {megabytes(after)} ({after / before:.2f})")
    if report.latency is not None:
        times = report.latency.milliseconds
        lines.append(
            f"one image, {report.latency.threads} threads: float {times['float']:.1f} ms, converted "
            f"{times['converted']:.1f} ms ({times['float'] / times['converted']:.2f} times as fast)"
        )
    lines.append(f"written to {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")
    return "\n".join(lines)
