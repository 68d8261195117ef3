"""Options made from the settings: each field is an option, its description the help, its default the default."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic import BaseModel, ConfigDict, Field

from adadfq_plugin.config import AdaDFQSettings, Scheme, build, from_toml, nearest
from adadfq_plugin.errors import SettingsError, UnknownNameError

__all__ = ["Command", "Network", "Plan", "Run", "fields_as_options", "option", "plan"]

CallableT = TypeVar("CallableT", bound=Callable[..., Any])
Size = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class Network(_Section):
    """Which network it is and what its images look like; the names are those of timm's scripts."""

    name: str = Field("", description="the network")
    checkpoint: str | None = Field(None, description="file with the weights, instead of a download")
    num_classes: Size | None = Field(None, description="number of classes; unset: the network's")
    model_kwargs: dict[str, Any] = Field({}, description="further arguments of the network: KEY=VALUE ...")
    img_size: Size | None = Field(
        None, description="height and width of the images; unset: timm's input_size"
    )
    input_size: tuple[Size, Size, Size] | None = Field(
        None, description="channels, height and width: 3 224 224; in place of --img-size"
    )
    mean: tuple[float, ...] | None = Field(
        None, description="mean of the normalisation, of pixels from 0 to 1; unset: timm's"
    )
    std: tuple[float, ...] | None = Field(
        None, description="deviation of the normalisation, likewise; unset: timm's"
    )
    crop_pct: Annotated[float, Field(gt=0, le=2)] | None = Field(
        None, description="centre crop of the labelled images; unset: timm's"
    )
    crop_mode: Literal["center", "squash", "border"] | None = Field(
        None, description="how the labelled images are cropped; unset: timm's"
    )
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] | None = Field(
        None, description="resampling of the labelled images; unset: timm's"
    )

    def model_post_init(self, context: Any) -> None:
        """Refuses two sizes."""
        sides = (self.input_size or ())[1:]
        if self.img_size and sides and sides != (self.img_size,) * 2:
            raise ValueError(
                f"img_size ({self.img_size}) and input_size {self.input_size} contradict each other"
            )

    @property
    def folder(self) -> str | None:
        """The FOLDER of ``local-dir:FOLDER``, in whatever case timm takes it; None for other names."""
        source, _, folder = self.name.partition(":")
        return folder if source.lower() == "local-dir" else None

    def told(self) -> dict[str, Any]:
        """What was given, as TOML and JSON hold it and ``--config`` reads it, from whatever folder."""
        values = self.model_dump(exclude_unset=True, exclude_none=True)
        if "checkpoint" in values:
            values["checkpoint"] = str(Path(values["checkpoint"]).absolute())
        if self.folder is not None:
            values["name"] = f"local-dir:{Path(self.folder).absolute()}"
        if "model_kwargs" in values:
            values["model_kwargs"] = [f"{name}={value!r}" for name, value in self.model_kwargs.items()]
        return values


class Run(_Section):
    """What is done with the network."""

    method: str = Field("adadfq", description="calibration method, see 'adadfq methods'")
    preset: str | None = Field(None, description="settings of the method by name, see 'adadfq methods'")
    minutes: Annotated[float, Field(gt=0)] | None = Field(
        None, description="time that the calibration may take"
    )
    backend: str = Field(
        "auto", description="toolkit that prepares and converts the network: fx, pt2e, or the first that can"
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of everything that is drawn at random"
    )
    device: str | None = Field(None, description="where to calibrate: cpu, cuda, cuda:1; unset: cpu")


class Plan(_Section):
    """A whole command, checked: settings file and options together."""

    network: Network
    run: Run
    scheme: Scheme
    settings: dict[str, Any]
    """Those that were given; the method has the others."""


class _Option(click.Option):
    """An option with the heading it stands under, and whether it takes all the values that follow."""

    def __init__(self, *args: Any, section: str, takes: re.Pattern[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section
        self.takes = takes


class Command(click.Command):
    """A command with its options under headings, some of which take several values, as timm's do."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Writes ``--mean 0.5 0.5 0.5`` as click reads it: an option for each value."""
        takers = {
            name: option.takes
            for option in self.params
            if isinstance(option, _Option) and option.takes
            for name in option.opts
        }
        words: list[str] = []
        current = ""
        for position, word in enumerate(args):
            before = args[position - 1] if position else ""
            if current and before != current and takers[current].fullmatch(word):
                words.append(current)
            elif before not in takers:
                current = word if word in takers else ""
            words.append(word)
        return super().parse_args(ctx, words)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and not isinstance(parameter, click.Argument):
                sections.setdefault(getattr(parameter, "section", "Options"), []).append(record)
        for section, records in sections.items():
            with formatter.section(section):
                formatter.write_dl(records)


def option(*names: str, section: str = "Options", **kwargs: Any) -> Callable[[CallableT], CallableT]:
    """``click.option`` under a heading."""
    return click.option(*names, cls=_Option, section=section, **kwargs)


def fields_as_options(
    kind: type[BaseModel], section: str, *, skip: Sequence[str] = (), short: Mapping[str, str] | None = None
) -> Callable[[CallableT], CallableT]:
    """Adds an option for each field of ``kind``; what isn't given stays out of the values.

    Args:
        kind: the settings.
        section: heading in the help.
        skip: fields that get no option.
        short: one-letter options by field.
    """

    def decorate(function: CallableT) -> CallableT:
        for name, field in reversed(kind.model_fields.items()):
            if name in skip:
                continue
            flag = f"--{name.replace('_', '-')}"
            shape = _shape(field.annotation)
            if shape.pop("switch", False):
                flag = f"{flag}/--no-{flag[2:]}"
            names = [flag, *([short[name]] if short and name in short else [])]
            default = field.get_default(call_default_factory=True)
            if isinstance(default, tuple):
                default = " ".join(map(str, default))
            told = "" if default in (None, {}) else f"  [default: {default}]"
            function = option(
                *names, name, section=section, default=None, help=f"{field.description}{told}", **shape
            )(function)
        return function

    return decorate


_NUMBER = re.compile(r"-?[\d.]+([eE][-+]?\d+)?")
_PAIR = re.compile(r"\w+=.*")


def _shape(hint: Any) -> dict[str, Any]:
    """What click has to know of a field's type; its bounds are left to pydantic."""
    origin = get_origin(hint)
    if origin is Annotated:
        return _shape(get_args(hint)[0])
    if origin in (Union, UnionType):
        (inner,) = (part for part in get_args(hint) if part is not type(None))
        return _shape(inner)
    if origin is Literal:
        return {"type": click.Choice([str(choice) for choice in get_args(hint)])}
    if origin is dict:
        return {"type": str, "multiple": True, "takes": _PAIR, "metavar": "KEY=VALUE ..."}
    if origin is tuple:
        inner, *others = get_args(hint)
        if others == [Ellipsis]:
            return {**_shape(inner), "multiple": True, "takes": _NUMBER, "metavar": "FLOAT ..."}
        return {**_shape(inner), "nargs": 1 + len(others)}
    if hint is bool:
        return {"switch": True, "type": bool}
    return {"type": hint}


SECTIONS: Mapping[str, type[BaseModel]] = {
    "network": Network,
    "run": Run,
    "scheme": Scheme,
    "settings": AdaDFQSettings,  # has the options of all our methods; a method itself says which are its own
}


def plan(values: Mapping[str, Any], config: Path | None) -> Plan:
    """The options over the settings file, checked as far as it can be done without the network.

    Args:
        values: the options by field; None or empty where not given.
        config: TOML file with any of the sections ``network``, ``run``, ``scheme``, ``settings``.

    Raises:
        UnknownNameError: a section or a setting that doesn't exist, with the nearest one.
        SettingsError: a value that can't be used, no network.
    """
    told: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    for section, table in (from_toml(config) if config else {}).items():
        if section not in told:
            raise UnknownNameError(f"{config} has a section [{section}]{nearest(section, list(told))}")
        if not isinstance(table, dict):
            raise SettingsError(f"{config}: {section} must be a section, [{section}]")
        told[section].update(table)
    of_file, told["settings"] = told["settings"], {}
    method_of_file = told["run"].get("method")
    if values.get("img_size") or values.get("input_size"):  # each says what the other says
        for name in ("img_size", "input_size"):
            told["network"].pop(name, None)
    for section, kind in SECTIONS.items():
        given = {name: values[name] for name in kind.model_fields if values.get(name) not in (None, (), "")}
        told[section].update(given)
    pairs = told["network"].get("model_kwargs", {})
    if not isinstance(pairs, dict):
        if not isinstance(pairs, list | tuple) or not all(isinstance(each, str) for each in pairs):
            raise SettingsError(f"{config}: model_kwargs = {pairs!r} is no table, nor texts KEY=VALUE")
        told["network"]["model_kwargs"] = dict(_pair(text) for text in pairs)
    network = build(Network, told["network"])
    if not network.name:
        raise SettingsError("which network? Give its NAME, or a --config that has it")
    run = build(Run, told["run"])
    preset = values.get("preset")
    if preset or method_of_file not in (None, run.method):  # given here, they come before what the file sets
        from adadfq_plugin import api  # the help loads no torch

        method = api.methods().get(run.method)
        known = method.presets.get(preset, {}) if preset else {}
        anothers = AdaDFQSettings.model_fields.keys() - method.settings.model_fields.keys()
        of_file = {name: value for name, value in of_file.items() if name not in {*known, *anothers}}
    settings = {**of_file, **told["settings"]}
    return Plan(network=network, run=run, scheme=build(Scheme, told["scheme"]), settings=settings)


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise SettingsError(f"--model-kwargs takes KEY=VALUE, not {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (SyntaxError, ValueError):  # a word without quotes, as timm takes it
        return key, value
