"""Sphinx's settings; writes the pages that are made from the code before each build."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from sphinx.application import Sphinx

from adadfq_plugin import config, errors

_PACKAGE = metadata.metadata("adadfq_plugin")

project = _PACKAGE["Name"]
author = _PACKAGE["Author"]
copyright = author
release = _PACKAGE["Version"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = project
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

_KINDS: tuple[type[BaseModel], ...] = (
    config.Scheme,
    config.Settings,
    config.GeneratorSettings,
    config.AdaDFQSettings,
)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in row)} |" for row in lines) + "\n"


def _bounds(hint: Any, outer: tuple[Any, ...] = ()) -> str:
    """What values a field takes, in words, from its annotation."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *extras = get_args(hint)
        return _bounds(inner, tuple(part for extra in extras for part in getattr(extra, "metadata", [extra])))
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(hint))
    if origin in (Union, UnionType):
        parts = [part for part in get_args(hint) if part is not type(None)]
        return ", or ".join(_bounds(part, outer) for part in parts) + ", or unset"
    if origin is tuple:
        return f"any number of: {_bounds(get_args(hint)[0])}"
    limits = [
        f"{sign} {getattr(part, name)}"
        for part in outer
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(part, name, None) is not None
    ]
    return ", ".join([str(getattr(hint, "__name__", hint)), *limits])


def _settings() -> str:
    """One table a settings class, of the fields that it adds to those it inherits."""
    parts = []
    for kind in _KINDS:
        parents = [base for base in kind.__mro__[1:] if base in _KINDS]
        inherited = {name for base in parents for name in base.model_fields}
        rows = []
        for name, field in kind.model_fields.items():
            if name in inherited:
                continue
            default = "unset" if field.default is None else f"`{field.default}`"
            values = _bounds(field.annotation, tuple(field.metadata))
            rows.append((f"`{name}`", default, values, field.description or ""))
        also = f" Also takes what `{parents[0].__name__}` has." if parents else ""
        summary = (kind.__doc__ or "").splitlines()[0]
        head = ("setting", "default", "values", "what it is")
        parts += [f"## {kind.__name__}\n", f"{summary}{also}\n", _table(head, rows)]
    parts.append("## Methods and presets\n")
    for point in sorted(metadata.entry_points(group="adadfq_plugin.methods"), key=lambda point: point.name):
        if point.dist is None or point.dist.name != project:
            continue
        method = point.load()
        parts += [f"### {method.name}\n", f"{method.summary}. Settings: `{method.settings.__name__}`.\n"]
        if method.presets:
            changed = [
                (
                    f"`{name}`",
                    ", ".join(f"`{key} = {value}`" for key, value in changes.items()) or "the defaults",
                )
                for name, changes in method.presets.items()
            ]
            parts.append(_table(("preset", "what it changes"), changed))
    return "\n".join(parts)


def _exit_codes() -> str:
    """The exit codes, from the error classes."""
    found: list[type[errors.AdaDFQError]] = [errors.AdaDFQError]
    for kind in found:
        found.extend(kind.__subclasses__())
    rows = [
        (str(kind.exit_code), f"`{kind.__name__}`", (kind.__doc__ or "").splitlines()[0])
        for kind in sorted(found, key=lambda kind: kind.exit_code)
    ]
    return _table(("exit code", "error", "what it means"), rows)


def _commands() -> str:
    """The help text of every command."""
    cli = importlib.import_module("adadfq_plugin.cli")
    group = next(value for value in vars(cli).values() if isinstance(value, click.Group))
    parts = []
    with click.Context(group, info_name="adadfq", terminal_width=100, max_content_width=100) as context:
        parts += ["## adadfq\n", f"```text\n{group.get_help(context)}\n```\n"]
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            if command is None:
                raise LookupError(name)
            with click.Context(command, info_name=name, parent=context) as inner:
                parts += [f"## adadfq {name}\n", f"```text\n{command.get_help(inner)}\n```\n"]
    return "\n".join(parts)


def _write_generated(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "_generated"
    folder.mkdir(exist_ok=True)
    for name, make in (("settings", _settings), ("exit_codes", _exit_codes), ("commands", _commands)):
        (folder / f"{name}.md").write_text(make(), encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", _write_generated)
