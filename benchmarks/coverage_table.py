"""Rows of the coverage sweep: what they say, and the table docs/coverage.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from networks import BRANCH, SETTLED

TABLE = Path(__file__).resolve().parent.parent / "docs" / "coverage.md"
LEAST, MOST = 64, 512
"""Images of the comparison, at least and at most."""
SECONDS = 6.0
"""Time after which a comparison ends with the images it has."""
AGREES = 0.98
BACKENDS = ("fx", "pt2e")
Row = dict[str, Any]


def taken_by_auto(fx_row: Row | None, pt2e_row: Row | None) -> str | None:
    """The backend that ``auto`` takes the whole way: the second is tried where the first refuses to prepare."""
    if fx_row and (fx_row["passed"] or fx_row.get("traced")):
        return "fx" if fx_row["passed"] else None
    return "pt2e" if pt2e_row and pt2e_row["passed"] else None


def remark(row: Row) -> str:
    """Why a row is not what it should be, in one line."""
    if "reason" in row:
        return str(row["reason"])
    if row.get("as_initialised") is False:
        return "not finite as initialised"
    if "images" not in row:
        return "run as initialised only"
    if "compile_error" in row:
        return f"not compiled: {row['compile_error']}"
    if row["agreement"] >= AGREES:
        return ""
    nudged = f"step sizes changed by a millionth: {row['nudged_agreement']:.0%}, {row['nudged_error']:.2f}"
    if row["nudged_error"] > row["relative_error"] / 2:
        return f"random weights amplify rounding ({nudged})"
    return f"more than rounding, cause not found ({nudged})"


def _eager_error(row: Row) -> float:
    """Distance of the converted model's logits, run eagerly, from the fake-quantized ones."""
    return float(row["eager_error"] if "eager_error" in row else row["relative_error"])


def write_table(rows: dict[str, Row], path: Path) -> None:
    """Write the Markdown table."""
    done = [row for row in rows.values() if "passed" in row]
    done.sort(key=lambda row: (row["family"], row.get("model", ""), row["backend"]))
    kind = "model" if path != TABLE else "family"
    by_name: dict[str, dict[str, Row]] = {}
    for row in done:
        by_name.setdefault(row.get(kind, ""), {})[row["backend"]] = row
    total = len(by_name)
    auto = [taken_by_auto(each.get("fx"), each.get("pt2e")) for each in by_name.values()]
    lines = [
        f"# timm {'architectures' if kind == 'model' else 'families'} through quantization",
        "",
        "| backend | run | go the whole way | measured | agree on at least 98 %, integers | exact, run eagerly |",
        "|---|---|---|---|---|---|",
    ]
    for backend in BACKENDS:
        own = [row for row in done if row["backend"] == backend]
        measured = [row for row in own if "agreement" in row]
        integer = [row for row in measured if backend == "fx" or row.get("compiled")]
        eager = [row for row in measured if backend != "fx"]
        counts = (
            str(len(own)),
            str(sum(row["passed"] for row in own)),
            str(len(measured)),
            f"{sum(row['agreement'] >= AGREES for row in integer)} of {len(integer)}",
            f"{sum(_eager_error(row) == 0 for row in eager)} of {len(eager)}" if eager else "",
        )
        lines.append(f"| `{backend}` | " + " | ".join(counts) + " |")
    of_pt2e = [row for row in done if row["backend"] == "pt2e" and "agreement" in row]
    compiled = [row.get("compiled", False) for row in of_pt2e]
    taken = [each for each in auto if each]
    missing = {
        backend: [name for name, rows_of in by_name.items() if backend not in rows_of] for backend in BACKENDS
    }
    lines.append(f"| `auto` | {total} | {len(taken)} ({taken.count('pt2e')} by `pt2e`) | | | |")
    lines += [
        "",
        "The way, at W8A8: `adadfq_plugin.prepare`, `adadfq_plugin.calibrate` (random images, three training steps),",
        "`convert_fx` or `convert_pt2e`, and a run of the converted model that gives finite logits.",
        "One architecture for each family, the one with the fewest parameters, with images as small as it takes.",
        "Its weights are random: once as timm initialises them (zero gammas and untouched statistics included), and",
        "once settled, which is what the figures are of. There, BatchNorm has the statistics of",
        f"{SETTLED} random images, scales of residual branches below {BRANCH} have that value, and the classifier is",
        "changed so that each logit has mean 0 and deviation 1 over random images.",
        "",
        "`auto` was not run: it follows from both rows, and takes `pt2e` where `fx` refuses to prepare.",
        "*Exact* are converted models of `pt2e` that give the fake-quantized one's logits bit for bit when they are",
        f"run eagerly, which computes in float what they have quantized. The {sum(compiled)} rows that say",
        "*compiled* are of what Inductor makes of them, with its integer kernels; the others of the eager model.",
        "",
        "- Integer: share of the multiply-adds of convolutions, linear layers and matrix products that integer modules",
        "  do (`fx`), or whose operands are both dequantized, so that Inductor finds an integer kernel (`pt2e`).",
        f"- Agreement: top-1 of the converted model against the fake-quantized one, on {LEAST} to {MOST} random images",
        f"  with structure of all scales; as many as {SECONDS:.0f} s allow.",
        "- Converted: the distance of the converted logits from the fake-quantized ones, relative to what logits vary",
        "  by from image to image. Quantized: the same of the fake-quantized logits from the unquantized ones; in",
        "  brackets with the weights alone quantized. Rows without brackets are older: their ranges are from white",
        "  noise, and too narrow for the even surfaces of these images. Same answer: top-1 of those two against each",
        "  other. Random weights have no margins: their answers change where a trained network's would not.",
        f"- Where agreement is below {AGREES:.0%}, the fake-quantized model was run again with all step sizes changed",
        "  by a millionth, which is what single precision rounds off anyway; its agreement with itself and its",
        "  distance from itself stand in the last column.",
        "",
        "Written by `python benchmarks/coverage.py` and `python benchmarks/coverage.py --backend pt2e`. A row stays",
        "until its family is run again, so that rows are of different commits.",
        *(f"Not run under `{each}`: {', '.join(names)}." for each, names in missing.items() if names),
        "",
        "| family | backend | model | input | way | integer | images | agreement | converted | quantized "
        "| same answer | remark |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    columns = {
        "integer_share": ".0%",
        "images": "d",
        "agreement": ".1%",
        "relative_error": ".2f",
        "quantization_error": ".2f",
        "float_agreement": ".0%",
    }
    for row in done:
        side = "x".join(map(str, row["input_size"][1:])) if "input_size" in row else ""
        figures = [format(row[key], style) if key in row else "" for key, style in columns.items()]
        figures[-2] += f" ({row['weight_error']:.2f})" if "weight_error" in row else ""
        told = " ".join(remark(row).split()).replace("|", "\\|")
        way = "yes" if row["passed"] else f"no ({row.get('stage', 'limits')})"
        backend = row["backend"] + (", compiled" if row.get("compiled") else "")
        cells = [row["family"], backend, row.get("model", ""), side, way, *figures, told]
        lines.append("| " + " | ".join(cells) + " |")
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def shown(row: Row) -> str:
    """A row in one line of the terminal."""
    keys = (
        "images",
        "agreement",
        "relative_error",
        "quantization_error",
        "weight_error",
        "float_agreement",
        "integer_share",
    )
    figures = [f"{key} {row[key]:.3g}" for key in keys if key in row]
    return ", ".join([*figures, f"{row.get('stages', {})}", remark(row)])
