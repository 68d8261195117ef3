"""The long commands, step by step: load, quantize, measure, write."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adadfq_plugin import api, zoo
from adadfq_plugin.cli.options import Network, Plan
from adadfq_plugin.cli.progress import Bars
from adadfq_plugin.config import Settings, build, to_toml
from adadfq_plugin.contracts import Backend
from adadfq_plugin.dataset import SyntheticDataset, facts_from_json
from adadfq_plugin.demo import demo_model
from adadfq_plugin.errors import DataError, ModelError, OutputError, SettingsError
from adadfq_plugin.facts import Facts, find_facts
from adadfq_plugin.files import atomic_folder, check_folder
from adadfq_plugin.labelled import ValidationLoader
from adadfq_plugin.refusals import checked_run
from adadfq_plugin.report import Accuracy, Latency, Report, environment, measure_latency, write
from adadfq_plugin.report.render import megabytes, percent
from adadfq_plugin.teacher import refuse_nan

__all__ = ["Images", "evaluate", "load", "quantize", "summary", "synthesize"]

MODEL = "quantized"
"""Name of the file with the converted model, without its suffix."""
SAMPLES_FILE = "samples.safetensors"
SETTINGS_FILE = "settings.toml"
REPORT_FILE = "report.json"
DEMO = "demo:"
Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Images:
    """Where the labelled images are and how they are read."""

    folder: str
    class_map: str | None
    workers: int
    batch_size: int = 32

    def loader(self, facts: Facts, crop_mode: str) -> ValidationLoader:
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
    given = network.model_dump(exclude={"name", "checkpoint", "crop_mode", "model_kwargs"}, exclude_none=True)
    if (channels := (network.model_kwargs or {}).get("in_chans")) is not None:
        given["in_chans"] = channels
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
    refuse_nan(model, buffers=True)
    facts = zoo.facts(model, given)
    find_facts(model, input_size=facts.input_size)  # refuses a size that the network doesn't take
    if network.checkpoint:  # timm's record is of weights that nobody asked for
        guess = f"guess: timm's of {network.name}; the checkpoint tells nothing"
        sources = {name: guess if source == "timm" else source for name, source in facts.sources.items()}
        facts = replace(facts, sources=sources)
    if facts.guessed:
        warnings.warn(f"{facts.guessed}; options of the same names tell", UserWarning, stacklevel=2)
    return model, facts, network.crop_mode or zoo.crop_mode(model)


def quantize(plan: Plan, output: Path, images: Images | None, *, force: bool, bars: Bars) -> Report:
    """The whole of ``adadfq quantize``: everything is in ``output`` when it returns, or nothing.

    Args:
        plan: what to do.
        output: folder for the results.
        images: labelled images to measure with.
        force: replace an output folder that holds something.
        bars: where progress goes.
    """
    settings = api.method_settings(api.methods().get(plan.run.method), plan.settings, plan.run.preset)
    checked_run(settings, plan.run.minutes, plan.run.seed, plan.run.device)
    if plan.run.backend != api.AUTO:
        api.backends().get(plan.run.backend)
    replaced = REPORT_FILE if force else None
    check_folder(output, replace=replaced)
    _refuse_inputs_in(output, plan, images)
    written = _settings(plan, settings)
    bars("load", 0, 1, {})
    model, facts, crop_mode = load(plan.network)
    loader = None if images is None else images.loader(facts, crop_mode)
    bars("load", 1, 1, {})
    # The float figure comes first: it reads every image, so that a broken one doesn't cost the whole run.
    top1 = {} if loader is None else {"float": _top1(model, loader, "float", bars)}
    result = api.quantize(model, **_arguments(plan, facts, bars))
    assert result.quantized is not None  # calibrate alone leaves these out
    assert result.integer_macs is not None
    converted, backend = result.quantized, api.backends().get(result.backend)
    model_file = f"{MODEL}{backend.suffix}"
    samples = _signed(result.samples, plan, facts)
    if loader is not None:
        top1["fake-quantized"] = _top1(result.prepared, loader, "fake-quantized", bars)
        top1["converted"] = _top1(converted, loader, "converted", bars)
    accuracy = None
    if images is not None and loader is not None:
        accuracy = Accuracy(top1, loader.count, _printable(images.folder), loader.classes)
    example = samples.images(0, 1)
    told = [facts.guessed] if facts.guessed else []
    told += result.warnings
    latency = _latency(model, converted, example, bars)
    bars("write", 0, 1, {})
    with atomic_folder(output, replace=replaced) as folder:
        told += _save(backend, converted, example, folder / model_file, output)
        samples.save(folder / SAMPLES_FILE)
        (folder / SETTINGS_FILE).write_text(written, encoding="utf-8")
        report = Report(
            name=plan.network.name,
            network=plan.network.told(),
            method=plan.run.method,
            backend=result.backend,
            scheme=plan.scheme.model_dump(),
            settings=result.settings.model_dump(),
            seed=plan.run.seed,
            minutes=plan.run.minutes,
            samples=samples,
            history=result.history,
            seconds=result.seconds,
            agreement=result.agreement,
            fidelity=result.fidelity,
            integer_share=result.integer_macs / result.macs,
            sqnr_db=result.sqnr_db,
            information=result.information,
            boundaries=_boundaries(result.settings),
            notes=result.notes,
            warnings=told,
            accuracy=accuracy,
            sizes={"float": _float_bytes(model), "converted": (folder / model_file).stat().st_size},
            latency=latency,
            crop_mode=crop_mode,
            environment=environment(plan.run.device),
        )
        write(report, folder)
    bars("write", 1, 1, {})
    return report


def synthesize(plan: Plan, output: Path, count: int, *, force: bool, bars: Bars) -> SyntheticDataset:
    """The whole of ``adadfq synthesize``: ``output`` is complete when it returns, or wasn't touched."""
    api.method_settings(api.methods().get(plan.run.method), plan.settings, plan.run.preset)
    _refuse_file(output, force)
    SyntheticDataset.check_path(output, replace=force)
    _refuse_inputs_in(output, plan, None)
    bars("load", 0, 1, {})
    model, facts, _ = load(plan.network)
    bars("load", 1, 1, {})
    SyntheticDataset.check_path(output, replace=force, channels=facts.input_size[0])
    samples = _signed(api.synthesize(model, count, **_arguments(plan, facts, bars)), plan, facts)
    _refuse_file(output, force)  # it may have appeared meanwhile
    samples.save(output, replace=force)
    return samples


def _refuse_file(output: Path, force: bool) -> None:
    if output.is_file() and not force:
        raise OutputError(f"{output} exists (--force replaces it)")


def evaluate(plan: Plan, images: Images, bars: Bars) -> Accuracy:
    """Top-1 of a network by name, or of the converted one in a folder that ``adadfq quantize`` wrote."""
    folder = Path(plan.network.name)
    model: Logits
    told = sorted(plan.network.model_fields_set - {"name"})
    # a folder that isn't ours may have the name of a network, of which more is told
    if folder.is_dir() and (not told or (folder / REPORT_FILE).is_file()):
        if told:
            raise SettingsError(
                f"{folder} is what 'adadfq quantize' wrote; it knows --{told[0].replace('_', '-')}"
            )
        network, (model, facts, crop_mode) = "converted", _converted(folder)
    else:
        network, (model, facts, crop_mode) = "float", load(plan.network)
    loader = images.loader(facts, crop_mode)
    top1 = _top1(model, loader, network, bars)
    return Accuracy({network: top1}, loader.count, images.folder, loader.classes)


def _converted(folder: Path) -> tuple[Logits, Facts, str]:
    try:
        values = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        facts, name, crop_mode = facts_from_json(values["facts"]), values["backend"], str(values["crop_mode"])
        seen = {"crop_pct": facts.crop_pct, "crop_mode": crop_mode, "interpolation": facts.interpolation}
        build(Network, seen)
    except (OSError, ValueError, KeyError, TypeError, ModelError, SettingsError) as error:
        raise DataError(f"{folder} is no folder that 'adadfq quantize' wrote: {error}") from error
    # The method, not the module: a frozen TorchScript module has no train mode that evaluate could put back.
    backend = api.backends().get(name)
    return backend.load(folder / f"{MODEL}{backend.suffix}").forward, facts, crop_mode


def _top1(model: Logits, loader: ValidationLoader, network: str, bars: Bars) -> float:
    def progress(done: int) -> None:
        bars(f"top-1 of {network}", done, loader.count, {})

    return api.evaluate(model, loader, progress=progress).top1


def _latency(model: nn.Module, converted: nn.Module, example: Tensor, bars: Bars) -> Latency:
    bars("time", 0, 1, {})
    latency = measure_latency({"float": model, "converted": converted}, example)
    bars("time", 1, 1, {})
    return latency


def _save(backend: Backend, converted: nn.Module, example: Tensor, path: Path, output: Path) -> list[str]:
    """Writes the converted network, reads it back, and warns if it isn't the same."""
    try:
        backend.save(converted, example, path)
    except RuntimeError as error:  # what torch's file writer raises when the disk is full
        raise OutputError(f"can't write {output / path.name}: {error}") from error
    with torch.no_grad():
        wanted, found = converted(example), backend.load(path)(example)
    if torch.allclose(found, wanted, rtol=0, atol=0, equal_nan=True):
        return []
    worst = float((found - wanted).abs().max() / wanted.std())
    return [f"read back from its file, the network's logits are off by {worst:.1e} of their deviation"]


def _float_bytes(model: nn.Module) -> int:
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    return stream.tell()


def _refuse_inputs_in(output: Path, plan: Plan, images: Images | None) -> None:
    """Refuses to put the results in the place of what they are made from."""
    inputs = {
        "--checkpoint": plan.network.checkpoint,
        "--val": None if images is None else images.folder,
        "--class-map": None if images is None else images.class_map,
        "the network": plan.network.folder,
    }
    for what, path in inputs.items():
        if path is not None and Path(path).resolve().is_relative_to(output.resolve()):
            raise OutputError(f"{output} holds {path} ({what}), which would be replaced; name another folder")


def _settings(plan: Plan, settings: Settings) -> str:
    """What ``--config`` takes to do the same again; the preset has become settings."""
    text = to_toml(
        {
            "network": plan.network.told(),
            "run": plan.run.model_dump(exclude={"preset"}, exclude_none=True),
            "scheme": plan.scheme,
            "settings": settings,
        }
    )
    if (printable := _printable(text)) != text:
        culprit = next(line for line in printable.splitlines() if "�" in line)
        raise SettingsError(f"{culprit}: no UTF-8, which settings.toml is written in; rename it")
    return text


def _printable(text: str) -> str:
    """A path of bytes that are no text, as text."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _boundaries(settings: Settings) -> tuple[float, float] | None:
    low, high = getattr(settings, "lambda_l", None), getattr(settings, "lambda_u", None)
    return None if low is None or high is None else (low, high)


def _arguments(plan: Plan, facts: Facts, bars: Bars) -> dict[str, Any]:
    return {
        "scheme": plan.scheme,
        **plan.run.model_dump(),
        "settings": plan.settings,
        "input_size": facts.input_size,
        "num_classes": facts.num_classes,
        "mean": facts.mean,
        "std": facts.std,
        "progress": bars,
    }


def _signed(samples: SyntheticDataset, plan: Plan, facts: Facts) -> SyntheticDataset:
    """The set with what this command knows beyond the API: the network, and who told which fact."""
    samples.facts = facts
    samples.provenance |= {
        "network": plan.network.told(),
        "scheme": plan.scheme.model_dump(),
        "versions": environment()["versions"],
    }
    return samples


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
    lines += [f"warning: {line}" for line in report.warnings]
    lines.append(f"written to {output}: {', '.join(sorted(file.name for file in output.iterdir()))}")
    return "\n".join(lines)
