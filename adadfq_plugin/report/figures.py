"""The pictures of a report, as PNG; drawn without pyplot, so that nothing global changes."""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from adadfq_plugin.dataset import SyntheticDataset
from adadfq_plugin.history import History

__all__ = ["information_plot", "loss_curves", "sample_grid"]

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#c8571b", "#8a8f98"
_MAX_POINTS = 1000

Array = NDArray[np.float64]


def sample_grid(samples: SyntheticDataset, *, rows: int = 6, columns: int = 10, cell: int = 96) -> bytes:
    """Samples evenly spaced over the set, none chosen, as one PNG.

    Args:
        samples: the set.
        rows: of the grid, at most.
        columns: of the grid.
        cell: side of an image in pixels at most; larger images are scaled down.
    """
    count = min(rows * columns, len(samples))
    indices = torch.linspace(0, len(samples) - 1, count).round().long().tolist() if count else []
    channels, height, width = samples.facts.input_size
    scale = min(1.0, cell / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    sheet = Image.new(
        "RGB", ((size[0] + 2) * columns - 2, (size[1] + 2) * max(1, -(-count // columns)) - 2), "white"
    )
    for position, index in enumerate(indices):
        pixels = samples.pixels[index] if channels == 3 else samples.pixels[index, :1].expand(3, -1, -1)
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        if image.size != size:
            image = image.resize(size, Image.Resampling.BOX)
        sheet.paste(image, ((size[0] + 2) * (position % columns), (size[1] + 2) * (position // columns)))
    stream = io.BytesIO()
    sheet.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def loss_curves(history: History, *, columns: int = 3) -> bytes | None:
    """Every figure that the run recorded over its steps, a panel each; None if there is none.

    The line is the mean over a fiftieth of the phase; the values themselves lie behind it.
    """
    panels = [(phase, name) for phase in history.phases() for name in history.figures(phase)]
    panels = [panel for panel in panels if len(history.column(*panel)[0]) > 1]
    if not panels:
        return None
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.6 * columns, 2.3 * rows), layout="constrained")
    for position, (phase, name) in enumerate(panels):
        steps, values = (np.asarray(column, dtype=float) for column in history.column(phase, name))
        axes = figure.add_subplot(rows, columns, position + 1)
        axes.plot(_thin(steps), _thin(values), color=_GREY, linewidth=0.6, alpha=0.6)
        axes.plot(_thin(steps), _thin(_running_mean(values)), color=_BLUE, linewidth=1.4)
        axes.set_title(f"{phase}: {name}", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.grid(visible=True, linewidth=0.3)
    return _png(figure)


def information_plot(information: Tensor, boundaries: tuple[float, float] | None) -> bytes:
    """Where the samples lie: histogram of H' over the sample by sample view, with the two boundaries.

    Args:
        information: normalised disagreement information H' of each sample (N,).
        boundaries: lambda_l and lambda_u, for the methods that have them.
    """
    values = information[torch.isfinite(information)].double().numpy()
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    upper.hist(values, bins=40, range=_span(values), color=_BLUE)
    upper.set_ylabel("samples", fontsize=9)
    lower.scatter(values, np.arange(len(values)), s=3, color=_BLUE, alpha=0.5, linewidths=0)
    lower.set_ylabel("sample", fontsize=9)
    lower.set_xlabel("normalised disagreement information H' (low: P and Q disagree)", fontsize=9)
    for axes in (upper, lower):
        for name, value in zip(("$\\lambda_l$", "$\\lambda_u$"), boundaries or (), strict=False):
            axes.axvline(value, color=_ORANGE, linewidth=1.4, label=f"{name} = {value:g}")
        axes.tick_params(labelsize=8)
    if boundaries is not None:
        upper.axvspan(*boundaries, color=_ORANGE, alpha=0.08, zorder=0)
        upper.legend(fontsize=8)
    return _png(figure)


def _span(values: Array) -> tuple[float, float]:
    return (min(0.0, float(values.min())), max(1.0, float(values.max()))) if len(values) else (0.0, 1.0)


def _running_mean(values: Array) -> Array:
    width = max(1, len(values) // 50)
    sums = np.cumsum(np.concatenate([[0.0], np.nan_to_num(values)]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    means: Array = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _thin(values: Array) -> Array:
    return values[:: max(1, len(values) // _MAX_POINTS)]


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    FigureCanvasAgg(figure)  # the canvas that savefig goes to
    figure.savefig(stream, format="png")
    return stream.getvalue()
