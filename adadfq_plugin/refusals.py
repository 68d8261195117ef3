"""Arguments that are refused before any work."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn

from adadfq_plugin.config import Settings
from adadfq_plugin.errors import ModelError, SettingsError, first_line
from adadfq_plugin.game.pace import check_limit

__all__ = ["checked_run", "refuse_other_modules"]


def refuse_other_modules(model: Any) -> None:
    """Refuses what is no network that can be trained: no module, a wrapper of one, tensors without a history.

    Raises:
        ModelError: what it is, and what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{model!r} is no torch.nn.Module; timm's are made by timm.create_model(name)")
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


def _device(device: torch.device | str) -> torch.device:
    """A device that works here."""
    try:
        where = torch.device(device)
        torch.zeros(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {str(device)!r} can't be used: {first_line(error)}") from error
    return where
