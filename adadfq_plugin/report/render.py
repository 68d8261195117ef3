"""The report in words: Markdown, JSON, and one HTML file with the pictures in it."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup

from adadfq_plugin.files import atomic_file
from adadfq_plugin.report.facts import Report
from adadfq_plugin.report.figures import information_plot, loss_curves, sample_grid

__all__ = ["write"]


def write(report: Report, folder: str | Path) -> None:
    """Writes ``report.md``, ``report.json`` and ``report.html`` (one file, opens anywhere).

    Args:
        report: the facts.
        folder: where to; made if it isn't there.

    Raises:
        OutputError: the folder can't be written.
    """
    folder = Path(folder)
    values = report.as_dict()
    environment = _environment()
    summary, details = (
        environment.get_template(f"{part}.md.j2").render(values, decibels=decibels(report.sqnr_db))
        for part in ("summary", "details")
    )
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    page = environment.get_template("report.html.j2").render(
        title=f"{report.name} {report.bits}".strip(),
        summary=Markup(markdown.render(summary)),
        details=Markup(markdown.render(details)),
        figures=_figures(report, values),
    )
    for name, text in (
        ("report.md", f"{summary}\n{details}"),
        ("report.json", json.dumps(values, indent=1, allow_nan=False) + "\n"),
        ("report.html", page),
    ):
        with atomic_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _figures(report: Report, values: dict[str, Any]) -> list[dict[str, str]]:
    figures = []
    if report.information is not None and len(report.information):
        caption = (
            "Where the samples lie. Low H': float and fake-quantized network disagree; high: they agree."
        )
        if values["shares"] is not None:
            shares = {name: percent(share) for name, share in values["shares"].items()}
            caption += (
                f" {shares['below']} lie below the lower boundary, {shares['between']} between the two, "
                f"{shares['above']} above the upper one."
            )
        figures.append(
            ("Information of the samples", caption, information_plot(report.information, report.boundaries))
        )
    if len(report.samples):
        caption = f"Evenly spaced over the {len(report.samples)} of the set, none chosen."
        figures.append(("Samples", caption, sample_grid(report.samples)))
    curves = loss_curves(report.history)
    if curves is not None:
        figures.append(
            ("Losses", "By phase, over its steps. Grey: each recorded value; blue: running mean.", curves)
        )
    return [
        {"title": title, "caption": caption, "image": base64.b64encode(png).decode("ascii")}
        for title, caption, png in figures
    ]


def percent(fraction: float) -> str:
    """A fraction as a percentage.

    Example:
        >>> percent(0.8781)
        '87.8 %'
    """
    return f"{100 * fraction:.1f} %"


def duration(seconds: float) -> str:
    """A time that people read at a glance.

    Example:
        >>> duration(7.25), duration(75.0)
        ('7.2 s', '1 min 15 s')
    """
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def decibels(ratio: float | None) -> str:
    """A ratio as people read it, also where JSON has no number for it.

    Example:
        >>> decibels(12.345), decibels(float("inf")), decibels(None)
        ('12.3 dB', 'inf dB', 'not measured')
    """
    return "not measured" if ratio is None else f"{ratio:.1f} dB"


def megabytes(count: int) -> str:
    """A file size in units of 10**6 bytes.

    Example:
        >>> megabytes(18_600_000)
        '18.60 MB'
    """
    return f"{count / 1e6:.2f} MB"


def code(value: Any) -> str:
    """A value as a Markdown code span.

    Example:
        >>> code("a`b"), code(None)
        ("`a'b`", '`unset`')
    """
    text = "unset" if value is None else str(value)
    return "`" + text.replace("`", "'").replace("\n", " ") + "`"


def cell(value: Any) -> str:
    """A value as a code span in a Markdown table."""
    return code(value).replace("|", "\\|")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("adadfq_plugin.report", ""),
        autoescape=select_autoescape(enabled_extensions=("html", "html.j2")),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, duration=duration, megabytes=megabytes, code=code, cell=cell)
    return environment
