"""Methods and backends by name: what is registered, with which settings, and which backend takes a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from adadfq_plugin.config import Scheme, Settings, build, nearest
from adadfq_plugin.contracts import Backend, Method
from adadfq_plugin.errors import BrokenPluginError, ModelError, SettingsError, UnknownNameError, first_line
from adadfq_plugin.facts import SIZE_SOURCE, Facts
from adadfq_plugin.hooks import unfrozen
from adadfq_plugin.registry import Registry

__all__ = [
    "AUTO",
    "NOTES",
    "backend_of",
    "backends",
    "method_settings",
    "methods",
    "prepare_with",
]

AUTO = "auto"
"""The backend that takes the model: of a float one the first of ``PREFERRED``, then of any others."""
PREFERRED = ("fx", "pt2e")
NOTES = "adadfq_notes"
"""Key of a prepared model's ``meta`` for sentences about how it was prepared."""


def _asked_of(protocol: Any) -> str:
    """The names that a protocol asks for: its attributes, then its methods."""
    methods = [name for name in vars(protocol) if not name.startswith("_")]
    return ", ".join([*protocol.__annotations__, *methods])


def _method(value: object) -> Method:
    made = value() if isinstance(value, type) else value
    if not isinstance(made, Method):
        raise TypeError(f"{value!r} has not all of {_asked_of(Method)}")
    if not isinstance(made.presets, Mapping) or not all(
        isinstance(each, Mapping) for each in made.presets.values()
    ):
        raise TypeError(f"presets of {value!r} are not changes by name, by name: {made.presets!r}")
    if not isinstance(made.settings, type) or not issubclass(made.settings, Settings):
        raise TypeError(
            f"settings of {value!r} are no class of adadfq_plugin.config.Settings: {made.settings!r}"
        )
    return made


def _backend(value: object) -> Backend:
    made = value() if isinstance(value, type) else value
    if not isinstance(made, Backend):
        raise TypeError(f"{value!r} has not all of {_asked_of(Backend)}")
    return made


_METHODS: Registry[Method] = Registry("adadfq_plugin.methods", "method", validate=_method)
_BACKENDS: Registry[Backend] = Registry("adadfq_plugin.backends", "backend", validate=_backend)


def methods() -> Registry[Method]:
    """The registered calibration methods, ours and third parties' alike."""
    return _METHODS


def backends() -> Registry[Backend]:
    """The registered toolkits."""
    return _BACKENDS


def method_settings(
    method: Method, settings: Settings | Mapping[str, Any] | None, preset: str | None
) -> Settings:
    """The settings that a method will run with: defaults, changed by the preset, changed by the settings.

    Args:
        method: a registered method.
        settings: settings of the method's own class, or changes by name.
        preset: name of one of the method's presets.

    Raises:
        UnknownNameError: a preset or setting that the method doesn't have.
        SettingsError: values that can't be used.
    """
    if isinstance(settings, Settings):
        if preset is not None:
            raise SettingsError("pass settings as a mapping of changes when a preset is given too")
        if not isinstance(settings, method.settings):
            raise SettingsError(
                f"method {method.name!r} takes {method.settings.__name__}, not {type(settings).__name__}"
            )
        return settings
    if not isinstance(settings, Mapping | None):
        raise SettingsError(
            f"settings = {settings!r} are not changes by name, nor {method.settings.__name__}"
        )
    values: dict[str, Any] = {}
    if preset is not None:
        if preset not in method.presets:
            names = tuple(method.presets)
            raise UnknownNameError(
                f"method {method.name!r} has no preset {preset!r}{nearest(preset, names)} "
                f"(it has: {', '.join(names) or 'none'})"
            )
        values.update(method.presets[preset])
    values.update(settings or {})
    return build(method.settings, values, f"method {method.name!r}")


def _in_turn() -> tuple[str, ...]:
    """The backends' names, in the order in which they are asked."""
    return (*PREFERRED, *(each for each in _BACKENDS.names() if each not in PREFERRED))


def backend_of(model: nn.Module, name: str | None) -> Backend:
    """The backend of that name; None or ``auto``: the one that recognises the model."""
    if name not in (None, AUTO):
        return _BACKENDS.get(name)
    failed = ""
    for candidate in _in_turn():
        try:
            backend = _BACKENDS.get(candidate)
            if backend.recognises(model):
                return backend
        except Exception as error:  # strangers may fail in any way
            failed += f"; {candidate!r} could not be asked: {first_line(error)}"
    raise ModelError(
        f"{type(model).__name__} is not prepared: call prepare_qat_fx, prepare_qat_pt2e (or adadfq_plugin.prepare) "
        f"first; known backends: {', '.join(_BACKENDS.names())}{failed}"
    )


def prepare_with(
    model: nn.Module, facts: Facts, scheme: Scheme, name: str | None
) -> tuple[nn.Module, Backend]:
    """A prepared copy and the backend that made it; ``auto`` (or None) notes which one that is and why.

    A network that was frozen as a whole, as for inference, is trained like any other.
    """
    with unfrozen(model):
        prepared, toolkit = _prepare(model, facts.input_size, scheme, name)
    if isinstance(meta := getattr(prepared, "meta", None), dict):
        meta[SIZE_SOURCE] = facts.sources["input_size"]
    return prepared, toolkit


def _prepare(
    model: nn.Module, input_size: tuple[int, int, int], scheme: Scheme, name: str | None
) -> tuple[nn.Module, Backend]:
    if name is not None and name != AUTO:
        return (toolkit := _BACKENDS.get(name)).prepare(model, input_size, scheme), toolkit
    refusals: dict[str, str] = {}
    for candidate in _in_turn():
        try:
            toolkit = _BACKENDS.get(candidate)
            prepared = toolkit.prepare(model, input_size, scheme)
            toolkit.open(prepared)
        except SettingsError as error:
            if not refusals:
                raise
            refusals[candidate] = str(error)
        except (ModelError, BrokenPluginError) as error:
            refusals[candidate] = str(error)
        except Exception as error:
            if candidate in PREFERRED:
                raise
            refusals[candidate] = f"{type(error).__name__}: {first_line(error)}"
        else:
            why = "; ".join(f"{other} can't: {reason}" for other, reason in refusals.items())
            note = f"backend 'auto' took {candidate!r}: {why or 'it comes first, and takes the model'}"
            if isinstance(getattr(prepared, "meta", None), dict):
                cast(Any, prepared).meta[NOTES] = [note]
            return prepared, toolkit
    reasons = "; ".join(f"{other}: {reason}" for other, reason in refusals.items())
    raise ModelError(f"no backend takes {type(model).__name__}: {reasons}")
