"""Rows of figures: their file, their tables in docs/results.md, their plot."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import rulers

HERE = Path(__file__).resolve().parent
ROWS = HERE / "accuracy.json"
PAGE = HERE.parent / "docs" / "results.md"
MARKS = "<!-- accuracy -->\n", "<!-- end -->"
Row = dict[str, Any]
"""``cell`` (what was run) and what came out of it."""
COLUMNS = (
    "bits | backend | method | seeds | images | top-1, mean (each) | spread | drop | divergence | agreement, least "
    "| logit error, largest | first half | seconds | MiB | threads | commit"
)
CEILINGS = ("real", "mse-real", "real_images")
LEAST_LIMITS = 3
"""Lengths of a run that make a curve."""
NOTES = {
    "real": "`real` and `mse-real` are no methods: they see REAL images, and say what can be reached with these. They "
    f"are measured on other images than they see: of CIFAR-10 on the first {rulers.FIRST}, of ImageNet on 436.",
    "pt2e": "Converted networks of `pt2e` were run eagerly, which computes in float what they have quantized: their "
    "agreement says that the conversion kept the network, and nothing of Inductor's integer kernels.",
    "papers": "In the papers' protocol only weights and ReLU outputs are quantized, no network is converted, and the "
    "fake-quantized one is measured: these figures can't be compared with the deployable ones.",
}


def key(cell: dict[str, Any]) -> str:
    """One text for what was run."""
    return json.dumps(cell, sort_keys=True)


def read(file: Path, *merged: Path) -> dict[str, Row]:
    """The rows of a file, which need not be there yet, and of others by their keys; those of later files win."""
    files = [*([file] if file.exists() else []), *merged]
    return {key(row["cell"]): row for each in files for row in json.loads(each.read_text())}


def save(rows: dict[str, Row], file: Path) -> None:
    """Writes the file whole or not at all."""
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps([rows[each] for each in sorted(rows)], indent=1) + "\n")
    partial.replace(file)


def accuracy(row: Row) -> float:
    """Top-1 in percent of the converted network, or of the fake-quantized one where none was converted."""
    return 100 * float(row["fake"] if row["converted"] is None else row["converted"])


def changes(cell: dict[str, Any]) -> str:
    """What was asked for beside the method: ``, feature_weight=0 in 1.5 min``."""
    settings = "".join(f", {name}={json.dumps(value)}" for name, value in cell["settings"].items())
    time = f" in {cell['minutes']:g} min" if cell["minutes"] else ""
    return settings + time + (f" on {cell['device']}" if cell["device"] != "cpu" else "")


def method(cell: dict[str, Any]) -> str:
    """The method as tables and plot name it, with what was asked for beside it."""
    return str(cell["method"]) + (" (REAL images)" if cell["method"] in CEILINGS else "") + changes(cell)


def tables(rows: dict[str, Row]) -> str:
    """A table a protocol and network; a line for what differs by the seed alone."""
    parts, seen = [], dict.fromkeys(NOTES, False)
    ordered = sorted(rows.values(), key=lambda row: (*_table(row), *_line(row), row["cell"]["seed"]))
    for (protocol, network), of_network in groupby(ordered, key=_table):
        lines = [f"| {COLUMNS} |", "|" + "---|" * (COLUMNS.count("|") + 1)]
        floats = set()
        for _, group in groupby(of_network, key=_line):
            cells = list(group)
            floats |= {f"{100 * row['float']:.2f} on {row['images']}" for row in cells}
            seen["real"] |= cells[0]["cell"]["method"] in CEILINGS
            seen["pt2e"] |= cells[0]["cell"]["backend"] == "pt2e"
            lines.append("| " + " | ".join(_figures(cells)) + " |")
        seen["papers"] |= protocol == "papers"
        title = f"**{network}**, {protocol} protocol; float: {' images, '.join(sorted(floats))} images"
        parts += [title, "\n".join(lines)]
    return "\n\n".join([*parts, *(text for name, text in NOTES.items() if seen[name])])


def _table(row: Row) -> tuple[str, str]:
    return row["cell"]["protocol"], row["cell"]["network"]


def _line(row: Row) -> tuple[Any, ...]:
    cell = row["cell"]
    return cell["scheme"], cell["backend"], cell["method"], changes(cell), row["images"]


def _figures(cells: Sequence[Row]) -> list[str]:
    cell, top1 = cells[0]["cell"], [accuracy(row) for row in cells]
    mean = statistics.mean(top1)

    def known(name: str) -> list[Any]:
        return [row[name] for row in cells if row.get(name) is not None]

    agreements, errors, first, peaks = map(known, ("agreement", "logit_error", "first", "peak_mib"))
    divergences = known("divergence")
    return [
        cell["scheme"].upper(),
        cell["backend"],
        method(cell),
        str(len(cells)),
        str(cells[0]["images"]),
        f"{mean:.2f} ({', '.join(f'{value:.2f}' for value in top1)})",
        f"{max(top1) - min(top1):.2f}" if len(top1) > 1 else "",
        f"{100 * cells[0]['float'] - mean:.2f}",
        f"{statistics.mean(divergences):.3f}" if divergences else "",
        f"{100 * min(agreements):.2f} %" if agreements else "",
        f"{max(errors):.4f}" if errors else "",
        f"{100 * statistics.mean(first):.2f}" if first else "",
        f"{statistics.mean(known('seconds')):.0f}",
        f"{max(peaks):.0f}" if peaks else "",
        ", ".join(sorted({str(each) for each in known("threads")})),
        ", ".join(sorted(set(known("commit")))),
    ]


def between(marks: tuple[str, str], text: str) -> None:
    """Writes a text between its marks in docs/results.md."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(marks[0])
    _, _, after = rest.partition(marks[1])
    PAGE.write_text(f"{before}{marks[0]}{text}\n{marks[1]}{after}", encoding="utf-8")


def plot(rows: dict[str, Row], file: Path) -> bool:
    """Top-1 against time, a panel for what was run with several limits; False where nothing was.

    A line goes through the means over the seeds, a dot is a seed; at the end of a line there was no limit.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels: dict[str, dict[str, dict[float, list[Row]]]] = {}
    for row in rows.values():
        cell = row["cell"]
        panel = f"{cell['network']}, {cell['scheme'].upper()}, {cell['backend']}, {cell['protocol']} protocol"
        limits = panels.setdefault(panel, {}).setdefault(method({**cell, "minutes": None}), {})
        limits.setdefault(cell["minutes"] or float("inf"), []).append(row)
    several = {
        panel: {name: limits for name, limits in sorted(curves.items()) if len(limits) >= LEAST_LIMITS}
        for panel, curves in sorted(panels.items())
    }
    drawn = {panel: curves for panel, curves in several.items() if curves}
    if not drawn:
        return False
    figure = Figure(figsize=(7, 4 * len(drawn)), layout="constrained")
    for axes, (panel, curves) in zip(
        figure.subplots(len(drawn), squeeze=False)[:, 0], drawn.items(), strict=True
    ):
        for name, limits in curves.items():
            seeds = [(row["seconds"] / 60, accuracy(row)) for cells in limits.values() for row in cells]
            means = sorted(
                (statistics.mean(row["seconds"] / 60 for row in cells), statistics.mean(map(accuracy, cells)))
                for cells in limits.values()
            )
            (line,) = axes.plot(*zip(*means, strict=True), label=name)
            axes.plot(*zip(*seeds, strict=True), linestyle="", marker=".", color=line.get_color())
        axes.set(title=panel, xlabel="minutes (prepare and calibrate)", ylabel="top-1, %")
        axes.set_xscale("log", base=2, subs=[])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with mpl.rc_context({"svg.hashsalt": "adadfq"}):
        figure.savefig(file, metadata={"Date": None})
    return True
