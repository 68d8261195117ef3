"""Arguments that are refused before any work."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from adadfq_plugin.config import Settings
from adadfq_plugin.contracts import Outcome, Task
from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.errors import BrokenPluginError, ModelError, SettingsError, first_line
from adadfq_plugin.game.pace import check_limit
from adadfq_plugin.teacher import refuse_nan

__all__ = ["checked_run", "outcome_check", "refuse_other_modules"]


def refuse_other_modules(model: Any) -> None:
    """Refuses what is no network that can be trained: no module, a wrapper of one, tensors without a history.

    Raises:
        ModelError: what it is, and what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{model!r} is no torch.nn.Module; timm's are made by timm.create_model(name)")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "the model is TorchScript, which is not traced again: pass the network it was made of"
        )
    if any(each.is_meta for each in (*model.parameters(), *model.buffers())):
        raise ModelError(
            "the model is on the device 'meta', without any values: load its weights first (to_empty, load_state_dict)"
        )
    compiled = "_orig_mod" in dict(model.named_children())
    if compiled or isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner = "_orig_mod" if compiled else "module"
        raise ModelError(f"{type(model).__name__} is a wrapper: pass the network in it, its .{inner}")
    if any(each.is_inference() for each in (*model.parameters(), *model.buffers())):
        raise ModelError(
            "the model was made in torch.inference_mode(), where nothing can be trained; make it outside of it"
        )


def checked_run(
    settings: Settings, minutes: float | None, seed: int, device: torch.device | str | None
) -> tuple[int, torch.device | None]:
    """The seed as Python's own number and a device that works here, of a run that can be.

    Raises:
        SettingsError: a time limit, a seed or a device that can't be used, or a limit that these settings don't heed.
    """
    if minutes is not None and not (isinstance(minutes, Real) and 0 < minutes < math.inf):
        raise SettingsError(f"minutes = {minutes!r} must be positive and finite")
    if torch.is_inference_mode_enabled():
        raise SettingsError("training needs gradients: call it outside of torch.inference_mode()")
    if not isinstance(seed, Integral) or not 0 <= seed < 2**64:
        raise SettingsError(f"seed = {seed!r} must be a number from 0 to 2**64 - 1")
    check_limit(settings, minutes)
    return int(seed), None if device is None else _device(device)


def outcome_check(name: str, task: Task) -> Callable[[Any], Outcome]:
    """What checks the outcome of a method that begins now, and returns it.

    It raises a :class:`BrokenPluginError` where there is no outcome, or too few samples, and where the method leaves
    another teacher than before, hooks, or weights that are not finite.

    Args:
        name: of the method.
        task: what it is given.
    """
    module, teacher = task.prepared.module, task.teacher.model

    def hooks() -> int:
        return sum(len(each._forward_hooks) + len(each._forward_pre_hooks) for each in module.modules())

    def sums() -> list[float]:
        return [each.detach().cpu().double().sum().item() for each in teacher.parameters()]

    before = hooks(), sums()

    def check(outcome: Any) -> Outcome:
        if not isinstance(outcome, Outcome):
            said = f"returned {type(outcome).__name__}, not adadfq_plugin.contracts.Outcome"
        elif not isinstance(outcome.samples, SyntheticDataset):
            said = f"returned samples of {type(outcome.samples).__name__}, not a SyntheticDataset"
        elif len(outcome.samples) < (task.settings.samples or 1):
            said = f"returned {len(outcome.samples)} samples, not {task.settings.samples or 1}"
        elif not all(isinstance(each, list) for each in (outcome.notes, outcome.warnings)):
            said = "returned notes or warnings that are no lists of sentences"
        elif hooks() > before[0]:
            said = "left hooks on the prepared model"
        elif sums() != before[1]:
            said = "changed the teacher"
        else:
            try:
                refuse_nan(module)
            except ModelError as error:
                raise BrokenPluginError(f"method {name!r} left weights that are none: {error}") from error
            return outcome
        raise BrokenPluginError(f"method {name!r} {said}")

    return check


def _device(device: torch.device | str) -> torch.device:
    """A device that works here."""
    try:
        where = torch.device(device)
        torch.zeros(1, device=where).item()  # 'meta' has no values
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {str(device)!r} can't be used: {first_line(error)}") from error
    return where
