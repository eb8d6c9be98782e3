"""Figures of training curves: cost against iterations and against time, with one line per method."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from relfisher.studies.runs import Record

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

__all__ = [
    "AVERAGED",
    "FLOOR",
    "SMOOTHED_FRACTION",
    "STYLE",
    "Line",
    "Look",
    "accuracy_range",
    "averaged",
    "encode",
    "frame",
    "label_ends",
    "line",
    "panels",
]

SMOOTHED_FRACTION = 0.02
LABEL_GAP = 0.055
FLOOR = 1e-10
BASELINE_WIDTH = 1.6
AVERAGED = 10
LEFT, RIGHT = 0.085, 0.985
STYLE: dict[RcKeyType, object] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    # Without this, equal figures differ as SVG files.
    "svg.hashsalt": "relfisher",
}


@dataclass(frozen=True)
class Look:
    """The style of a method: hue for the network (color-blind safe), dashes for SGD, line width for emphasis."""

    color: str
    dashes: str = "-"
    width: float = BASELINE_WIDTH


@dataclass(frozen=True)
class Line:
    """A method's mean curve over seeds, sampled at the end of each group of iterations."""

    method: str
    look: Look
    iterations: NDArray[np.float64]
    seconds: NDArray[np.float64]
    cost: NDArray[np.float64]
    smooth: NDArray[np.float64]


def averaged(values: NDArray[np.floating], group: int = AVERAGED) -> NDArray[np.float64]:
    """Average a curve over every `group` iterations; the last group may be shorter.

    Args:
        values: one value per iteration.
        group: the number of iterations per point.

    Returns:
        The averages, in order.
    """
    starts = np.arange(0, len(values), group)
    counts = np.diff(np.append(starts, len(values)))
    sums: NDArray[np.float64] = np.add.reduceat(values.astype(float), starts)
    return sums / counts


def panels(
    lines: list[Line],
    title: str,
    caption: str,
    target: float | None = None,
    accuracies: Mapping[str, NDArray[np.float64]] | None = None,
) -> Figure:
    """Draw curves against iterations and, next to it, against wall-clock time.

    Args:
        lines: the curves of the methods.
        title: the title, which says what was trained on which data.
        caption: the explanation of the lines.
        target: a cost to mark.
        accuracies: the validation accuracy after each epoch, by method, for a third panel.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        count, margin = (3, 0.055) if accuracies else (2, LEFT)
        figure = Figure(figsize=(6 * count, 5.2), dpi=150)
        left, right, *third = figure.subplots(1, count, gridspec_kw={"wspace": 0.95 if accuracies else 0.75})
        right.sharey(left)
        for one in lines:
            _draw(left, one, one.iterations)
            _draw(right, one, one.seconds)
        for axes in (left, right):
            axes.set_yscale("log")
            axes.margins(x=0)
            axes.set_xlim(left=0)
        left.set(xlabel="iteration", ylabel="training cost")
        right.set(xlabel="training time (seconds)")
        right.tick_params(labelleft=True)
        if lines:
            _fit(left, lines)
            label_ends(left, {one.method: one.look for one in lines}, {one.method: one.smooth[-1] for one in lines})
            top = left.get_ylim()[1]
            for one in lines:
                height = min(one.smooth[-1], top)
                right.plot(one.seconds[-1], height, "o", color=one.look.color, markersize=5, clip_on=False)
            if target is not None:
                for axes in (left, right):
                    axes.axhline(target, color="#555555", linewidth=1, linestyle=":")
        if accuracies:
            _draw_accuracies(third[0], {one.method: one.look for one in lines}, accuracies)
        frame(figure, title, caption, left=margin, right=0.86 if accuracies else RIGHT)
    return figure


def frame(figure: Figure, title: str, caption: str, *, left: float = LEFT, right: float = RIGHT) -> None:
    """Write a title above the panels of a figure and a caption below them, and make room for both.

    Args:
        figure: the figure.
        title: the title.
        caption: the caption.
        left: where the panels begin, as a share of the width.
        right: where they end.
    """
    figure.suptitle(title, x=left - 0.015, y=0.985, ha="left", fontsize=13, fontweight="bold")
    figure.text(left - 0.015, 0.012, caption, fontsize=9, color="#555555")
    figure.subplots_adjust(left=left, right=right, top=0.9, bottom=0.17)


def line(method: str, look: Look, records: Sequence[Record], group: int = AVERAGED) -> Line:
    """Average the curves of a method's runs, up to the length of the shortest.

    Args:
        method: the name of the method.
        look: its style.
        records: one record per seed.
        group: the number of iterations per point.

    Returns:
        The curve.
    """
    count = min(len(record.cost) for record in records)
    cost = np.mean([averaged(record.cost[:count], group) for record in records], axis=0)
    ends = np.minimum(group * np.arange(1, len(cost) + 1), count)
    seconds = np.mean([record.seconds[ends - 1] for record in records], axis=0)
    return Line(method, look, ends.astype(float), seconds, np.maximum(cost, FLOOR), np.maximum(_smooth(cost), FLOOR))


def label_ends(axes: Axes, looks: Mapping[str, Look], values: Mapping[str, float]) -> None:
    """Write each method's name at the right end of its line; names that would overlap are moved apart.

    Args:
        axes: the axes, whose range is set; a line that ends outside of it is labelled at its border.
        looks: the style of each method.
        values: the last value of each method's line.
    """
    to_axes = axes.transScale.transform
    low, high = (to_axes((1, limit))[1] for limit in axes.get_ylim())
    heights = {method: (to_axes((1, value))[1] - low) / (high - low) for method, value in values.items()}
    ends = {method: min(1.0, max(0.0, height)) for method, height in heights.items()}
    places = _spread(ends)
    for method, place in places.items():
        look = looks[method]
        leader = ([1.0, 1.05], [ends[method], place])
        axes.plot(
            *leader, transform=axes.transAxes, color=look.color, linewidth=1, linestyle=look.dashes, clip_on=False
        )
        weight = "bold" if look.width > BASELINE_WIDTH else "normal"
        axes.text(1.06, place, method, transform=axes.transAxes, va="center", color=look.color, weight=weight)


def encode(figure: Figure) -> dict[str, bytes]:
    """Return a figure as PNG and as SVG.

    Args:
        figure: the figure.

    Returns:
        The contents of the two files, by their suffixes.
    """
    FigureCanvasAgg(figure)
    png, svg = io.BytesIO(), io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.savefig(png, format="png")
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return {"png": png.getvalue(), "svg": svg.getvalue()}


def _smooth(cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the centered moving average; its window shrinks at both ends, so that the ends keep their values."""
    half = np.full(len(cost), max(1, round(SMOOTHED_FRACTION * len(cost) / 2)))
    position = np.arange(len(cost))
    half = np.minimum(half, np.maximum(position, 1))
    begins, ends = np.maximum(position - half, 0), np.minimum(position + half + 1, len(cost))
    sums = np.concatenate([[0.0], np.cumsum(cost)])
    smooth: NDArray[np.float64] = (sums[ends] - sums[begins]) / (ends - begins)
    return smooth


def _draw(axes: Axes, line: Line, x: NDArray[np.float64]) -> None:
    look = line.look
    axes.plot(x, line.cost, color=look.color, alpha=0.16, linewidth=0.6, rasterized=True)
    axes.plot(x, line.smooth, color=look.color, linestyle=look.dashes, linewidth=look.width, label=line.method)


def _draw_accuracies(axes: Axes, looks: Mapping[str, Look], accuracies: Mapping[str, NDArray[np.float64]]) -> None:
    """Draw validation accuracy against epochs, from what most methods reach in the first ones."""
    for method, curve in accuracies.items():
        look = looks[method]
        epochs = np.arange(1, len(curve) + 1)
        axes.plot(epochs, 100 * curve, color=look.color, linestyle=look.dashes, linewidth=look.width)
    low, high = accuracy_range(list(accuracies.values()))
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", ylim=(100 * low, 100 * high))
    axes.margins(x=0)
    label_ends(axes, looks, {method: 100 * curve[-1] for method, curve in accuracies.items()})


def accuracy_range(curves: Sequence[NDArray[np.float64]]) -> tuple[float, float]:
    """Return the range of an axis: from somewhat below what most curves reach early to above the best of all."""
    top = max(float(curve.max()) for curve in curves)
    early = float(np.median([curve[: max(1, len(curve) // 10)].max() for curve in curves]))
    span = max(top - early, 1e-6)
    return early - span / 4, top + span / 16


def _fit(axes: Axes, lines: list[Line]) -> None:
    """Set the range of the cost axis from the smooth curves; lines that blow up leave the range."""
    lowest = min(line.smooth.min() for line in lines)
    highest = max(line.smooth[len(line.smooth) // 50] for line in lines)
    axes.set_ylim(lowest / 1.8, highest * 1.6)


def _spread(heights: dict[str, float]) -> dict[str, float]:
    """Move labels up from the lowest on, then down from the top, until all are at least `LABEL_GAP` apart."""
    order = sorted(heights, key=lambda method: heights[method])
    places: dict[str, float] = {}
    floor = 0.0
    for method in order:
        places[method] = max(heights[method], floor)
        floor = places[method] + LABEL_GAP
    ceiling = 1.0
    for method in reversed(order):
        places[method] = min(places[method], ceiling)
        ceiling = places[method] - LABEL_GAP
    return places
