"""What users call; methods and backends are reached by name alone."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adadfq_plugin import comparison
from adadfq_plugin.choice import (
    AUTO,
    NOTES,
    backend_of,
    backends,
    method_settings,
    methods,
    prepare_with,
)
from adadfq_plugin.config import Scheme, Settings, scheme_of
from adadfq_plugin.contracts import Progress, Task
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.errors import BrokenPluginError, ModelError, SettingsError, first_line
from adadfq_plugin.facts import device_of, find_facts
from adadfq_plugin.functional import top1_accuracy
from adadfq_plugin.hooks import any_algorithm, fork_rng, kept_buffers, module_modes, plain_tensors
from adadfq_plugin.refusals import checked_run, outcome_check, refuse_other_modules
from adadfq_plugin.results import Evaluation, Result
from adadfq_plugin.teacher import make_teacher, refuse_nan

__all__ = [
    "AUTO",
    "Evaluation",
    "Result",
    "backends",
    "calibrate",
    "evaluate",
    "method_settings",
    "methods",
    "prepare",
    "quantize",
    "synthesize",
]


def _callers_level() -> int:
    """How many frames up from the caller the first one is that is not of this package: whom a warning is for."""
    own = (str(Path(__file__).parent), contextlib.__file__)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(own):
        level, frame = level + 1, frame.f_back
    return level


def _silent(_phase: str, _step: int, _total: int, _figures: Mapping[str, float]) -> None:
    """Progress for callers who want none."""


@plain_tensors()
def prepare(
    model: nn.Module,
    input_size: Any = None,
    *,
    scheme: Scheme | Mapping[str, Any] | None = None,
    backend: str | None = "fx",
) -> nn.Module:
    """A prepared copy of a float model, rewritten exactly where the toolkit can't follow it.

    Args:
        model: any float network that maps images to logits; it is not touched.
        input_size: side, (height, width) or (channels, height, width); None: what timm left, or a trial.
        scheme: bit widths and engine.
        backend: name of the toolkit, whose convert is the one to call afterwards; ``auto``: the first that takes the
            model, ``fx`` before ``pt2e``.

    Returns:
        a model for :func:`calibrate` and the toolkit's own convert.

    Raises:
        ModelError: a model that can't be prepared, with the reason.
    """
    refuse_other_modules(model)
    with fork_rng(0, device_of(model)):  # toolkits initialise the modules that they build, to no effect
        refuse_nan(model, buffers=True)
        facts = find_facts(model, input_size=input_size)
        return prepare_with(model, facts, scheme_of(scheme), backend)[0]


@plain_tensors()
def calibrate(
    prepared: nn.Module,
    *,
    teacher: nn.Module | None = None,
    example_inputs: Any = None,
    input_size: Any = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    method: str = "adadfq",
    settings: Settings | Mapping[str, Any] | None = None,
    preset: str | None = None,
    minutes: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Calibrates a prepared model in place, without data.

    Afterwards the toolkit's own convert gives the network that was calibrated. When anything fails, or is
    interrupted, the prepared model is bit for bit what it was.

    Args:
        prepared: what ``prepare_qat_fx``, ``prepare_fx``, ``prepare_qat_pt2e`` or ``prepare_pt2e`` returned;
            without ``qat`` it is observed, not trained.
        teacher: the float network P; None: an unquantized copy of ``prepared``.
        example_inputs: as given to prepare; tells the input size.
        input_size: side, (height, width) or (channels, height, width).
        num_classes: checked against the model.
        mean: normalisation of the images, in units of pixel value / 255.
        std: likewise.
        method: name of a registered method.
        settings: the method's settings, or changes to its defaults.
        preset: named settings of the method.
        minutes: time limit; None: a fixed number of steps, repeatable bit for bit on a CPU.
        seed: source of all randomness; the global random state is left alone.
        device: where to run; None: where ``prepared`` is.
        backend: name of the toolkit; None or ``auto``: the one that recognises the model.
        progress: called after every step, on CUDA once the next one has begun.

    Raises:
        ModelError: a model that can't be calibrated, with the culprit and the way out.
        SettingsError: settings that can't be used.
        UnknownNameError: a name that nothing goes by.
    """
    chosen = methods().get(method)
    made = method_settings(chosen, settings, preset)
    networks = (prepared,) if teacher is None else (prepared, teacher)
    for model in networks:
        refuse_other_modules(model)
    seed, asked = checked_run(made, minutes, seed, device)
    where = asked or device_of(prepared)
    with fork_rng(seed, where, *map(device_of, networks)), torch.enable_grad():
        toolkit = backend_of(prepared, backend)
        if teacher is prepared:
            raise ModelError("teacher= is the prepared model itself: pass the float network, or leave it out")
        opened = toolkit.open(prepared)
        refuse_nan(opened.module)
        source = teacher if teacher is not None else opened.float_model()
        facts = find_facts(
            source,
            relatives=(prepared, opened.module),
            example_inputs=example_inputs,
            input_size=input_size,
            num_classes=num_classes,
            mean=mean,
            std=std,
        )
        told: list[str] = []

        def tell(sentence: str, advice: str = "") -> None:
            if sentence:
                told.append(sentence)
                warnings.warn(f"adadfq_plugin: {sentence}{advice}", UserWarning, stacklevel=_callers_level())

        tell(facts.guessed, "; pass them by keyword")
        if opened.trainable and not opened.weights():
            tell(
                "no weight of the prepared model requires a gradient, so that none is rounded anew or trained",
                "; call requires_grad_() on it where they may be",
            )
        frozen = make_teacher(source, facts, device=where)
        layout = _layout(opened.module)
        if frozen.channels_last:
            opened.module.to(memory_format=torch.channels_last)
        opened.module.to(where)
        comparison.refuse_random(frozen)
        comparison.refuse_inconvertible(frozen, opened)
        tell(comparison.not_the_teacher(frozen, opened, own=teacher is None))
        task = Task(frozen, opened, made, seed, where, progress or _silent, minutes)
        checked = outcome_check(method, task)
        with fork_rng(seed, where):  # the method's own draws, whatever was drawn before
            outcome = checked(chosen.calibrate(task))
        for sentence in outcome.warnings:
            tell(sentence)
        try:
            figures, unfaithful = comparison.figures(frozen, opened, outcome.samples, where)
        except Exception as error:  # it could be converted before
            raise BrokenPluginError(
                f"what method {method!r} left can't be converted: {first_line(error)}"
            ) from error
        tell(unfaithful)  # where warnings are errors, before anything of the user's is written
        opened.module.to(device_of(prepared)).to(memory_format=layout)
        opened.commit()
    return Result(
        method=method,
        backend=toolkit.name,
        settings=made,
        seed=seed,
        facts=facts,
        samples=outcome.samples,
        history=outcome.history,
        notes=[*getattr(prepared, "meta", {}).get(NOTES, ()), *opened.notes, *outcome.notes],
        warnings=told,
        seconds=outcome.seconds,
        macs=frozen.macs,
        prepared=prepared,
        **figures,
    )


@plain_tensors()
def quantize(
    model: nn.Module,
    *,
    scheme: Scheme | Mapping[str, Any] | None = None,
    method: str = "adadfq",
    settings: Settings | Mapping[str, Any] | None = None,
    preset: str | None = None,
    minutes: float | None = None,
    input_size: Any = None,
    num_classes: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    backend: str | None = AUTO,
    progress: Progress | None = None,
) -> Result:
    """From a float model to a converted integer network: prepare, calibrate, convert.

    Args:
        model: any float network that maps images to logits; it is not touched.
        scheme: bit widths and engine.
        backend: name of the toolkit; ``auto``: the first that takes the model, ``fx`` before ``pt2e``.
        method, settings, preset, minutes, input_size, num_classes, mean, std, seed, device, progress: as for
            :func:`calibrate`.

    Returns:
        the result, with ``quantized`` set.

    Raises:
        ModelError: a model that can't be prepared or calibrated.
        SettingsError: settings that can't be used.
    """
    refuse_other_modules(model)
    widths = scheme_of(scheme)
    made = method_settings(methods().get(method), settings, preset)  # refuse before any work
    seed, _ = checked_run(made, minutes, seed, device)
    with fork_rng(seed, device_of(model)):
        refuse_nan(model, buffers=True)
        facts = find_facts(model, input_size=input_size, num_classes=num_classes, mean=mean, std=std)
        prepared, toolkit = prepare_with(model, facts, widths, backend)
        result = calibrate(
            prepared,
            teacher=model,
            input_size=input_size,
            num_classes=num_classes,
            mean=mean,
            std=std,
            method=method,
            settings=settings,
            preset=preset,
            minutes=minutes,
            seed=seed,
            device=device,
            backend=toolkit.name,
            progress=progress,
        )
        converted = toolkit.open(result.prepared).convert()
        with any_algorithm():
            integer = toolkit.integer_macs(converted, torch.zeros(2, *facts.input_size))
    return replace(result, scheme=widths, integer_macs=integer, quantized=converted)


def _layout(model: nn.Module) -> torch.memory_format:
    """How a model lies in memory; one whose kernels have one place alone lies both ways."""
    kernels = (each for each in model.parameters() if each.dim() == 4 and not each.is_contiguous())
    last = any(each.is_contiguous(memory_format=torch.channels_last) for each in kernels)
    return torch.channels_last if last else torch.contiguous_format


def synthesize(model: nn.Module, count: int, **arguments: Any) -> SyntheticDataset:
    """``count`` samples, the newest of a run, for tools that calibrate by themselves.

    Args:
        model: the float network.
        count: number of images.
        **arguments: as for :func:`quantize`; the samples are adapted to the bit widths of ``scheme``.

    Raises:
        SettingsError: fewer than one sample, or settings that can't be used.
    """
    if not isinstance(count, Integral) or count < 1:
        raise SettingsError(f"count = {count!r} must be a number of images, at least 1")
    settings = arguments.pop("settings", None)
    if isinstance(settings, Settings):
        settings = settings.model_copy(update={"samples": int(count)})
    elif isinstance(settings, Mapping | None):  # anything else is refused with the other arguments
        settings = {**(settings or {}), "samples": int(count)}
    return quantize(model, settings=settings, **arguments).samples


def evaluate(
    model: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Top-1 accuracy over labelled images.

    Args:
        model: float, prepared or converted; evaluated in eval mode, and left as it was, whatever observes in it.
        batches: images (N, channels, H, W), normalised, with labels (N,), the numbers of classes.
        device: where the images go; None: where the model is.
        progress: called with the number of images so far.

    Raises:
        SettingsError: no images, or labels that are no numbers of classes.
    """
    right = count = 0
    has_mode = isinstance(model, nn.Module) and hasattr(model, "training")  # frozen TorchScript has none
    modes = module_modes(cast(nn.Module, model), False) if has_mode else nullcontext()
    buffers = kept_buffers(model) if isinstance(model, nn.Module) else nullcontext()
    where = device or (device_of(model) if isinstance(model, nn.Module) else "cpu")
    with torch.no_grad(), modes, buffers:
        for images, labels in batches:
            logits = model(images.to(where)).cpu()
            try:
                share = top1_accuracy(logits, labels.cpu())
            except ValueError as error:
                raise SettingsError(
                    f"labels of shape {tuple(labels.shape)} ({labels.dtype}) for logits of shape "
                    f"{tuple(logits.shape)}: {error}; they are to be the numbers of the classes, from 0"
                ) from error
            right += round(share * len(labels))
            count += len(labels)
            if progress is not None:
                progress(count)
    if count == 0:
        raise SettingsError("no images to evaluate on")
    return Evaluation(right / count, count)
