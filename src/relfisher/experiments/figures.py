"""Figure 5: training cost against iterations and against time, one line a method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from relfisher.experiments.study import Outcome
from relfisher.experiments.tables import AVERAGED, averaged

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

__all__ = ["STYLE", "Look", "figure5", "save"]

SMOOTHED_FRACTION = 0.02
LABEL_GAP = 0.055
FLOOR = 1e-8
BASELINE_WIDTH = 1.6
STYLE: dict[RcKeyType, object] = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    # Otherwise equal figures differ as SVG files.
    "svg.hashsalt": "relfisher",
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn: hue for the network (colour-blind safe), dashes for SGD, weight for what matters."""

    colour: str
    dashes: str = "-"
    width: float = BASELINE_WIDTH


LOOKS = {
    "PLAIN+SGD": Look("#8a8a8a", "--"),
    "PLAIN+ADAM": Look("#8a8a8a"),
    "BNA+SGD": Look("#0072b2", "--"),
    "BNA+ADAM": Look("#0072b2"),
    "BNB+SGD": Look("#009e73", "--"),
    "BNB+ADAM": Look("#009e73"),
    "PLAIN+RNGD": Look("#e69f00", width=2.6),
    "PLAIN+RNGD-TR": Look("#d1345b", width=2.6),
}


@dataclass(frozen=True)
class _Line:
    """A method's mean curve over seeds, at the end of every ten iterations."""

    method: str
    iterations: NDArray[np.float64]
    seconds: NDArray[np.float64]
    cost: NDArray[np.float64]
    smooth: NDArray[np.float64]

    @property
    def look(self) -> Look:
        return LOOKS[self.method]


def figure5(outcome: Outcome, title: str) -> Figure:
    """Draws the study as the paper's figure 5, with a second panel against wall-clock time.

    Args:
        outcome: A finished study of the methods in `LOOKS`; one without a run that converged is left out.
        title: What was trained on what.

    Returns:
        The figure.
    """
    lines = [line for method in outcome.study.grids if (line := _line(outcome, method)) is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2), dpi=150)
        left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.5})
        for line in lines:
            _draw(left, line, line.iterations)
            _draw(right, line, line.seconds)
        for axes in (left, right):
            axes.set_yscale("log")
            axes.margins(x=0)
            axes.set_xlim(left=0)
        left.set(xlabel="iteration", ylabel="training cost")
        right.set(xlabel="training time (seconds)")
        right.tick_params(labelleft=True)
        if lines:
            _fit(left, lines)
            _label_ends(left, lines)
            for line in lines:
                right.plot(line.seconds[-1], line.smooth[-1], "o", color=line.look.colour, markersize=5, clip_on=False)
        figure.suptitle(title, x=0.07, y=0.985, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.07, 0.012, _caption(outcome), fontsize=9, color="#555555")
        figure.subplots_adjust(left=0.07, right=0.985, top=0.9, bottom=0.17)
    return figure


def save(figure: Figure, directory: Path, name: str = "figure5") -> list[Path]:
    """Writes a figure as PNG and SVG.

    Args:
        figure: The figure.
        directory: Where to.
        name: The files' name, without the suffix.

    Returns:
        The files.
    """
    FigureCanvasAgg(figure)
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    with mpl.rc_context(STYLE):
        figure.savefig(paths[0])
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _line(outcome: Outcome, method: str) -> _Line | None:
    records = outcome.compared(method)
    if not records:
        return None
    cost = np.mean([averaged(record.cost) for record in records], axis=0)
    ends = np.minimum(AVERAGED * np.arange(1, len(cost) + 1), len(records[0].cost))
    seconds = np.mean([record.seconds[ends - 1] for record in records], axis=0)
    return _Line(method, ends.astype(float), seconds, np.maximum(cost, FLOOR), np.maximum(_smooth(cost), FLOOR))


def _smooth(cost: NDArray[np.float64]) -> NDArray[np.float64]:
    """A centred moving average; its window shrinks at both ends, so that start and end stay where they are."""
    half = np.full(len(cost), max(1, round(SMOOTHED_FRACTION * len(cost) / 2)))
    position = np.arange(len(cost))
    half = np.minimum(half, np.maximum(position, 1))
    begins, ends = np.maximum(position - half, 0), np.minimum(position + half + 1, len(cost))
    sums = np.concatenate([[0.0], np.cumsum(cost)])
    smooth: NDArray[np.float64] = (sums[ends] - sums[begins]) / (ends - begins)
    return smooth


def _draw(axes: Axes, line: _Line, x: NDArray[np.float64]) -> None:
    look = line.look
    axes.plot(x, line.cost, color=look.colour, alpha=0.16, linewidth=0.6, rasterized=True)
    axes.plot(x, line.smooth, color=look.colour, linestyle=look.dashes, linewidth=look.width, label=line.method)


def _fit(axes: Axes, lines: list[_Line]) -> None:
    """Limits the cost axis to the smooth curves; single points of ten mini-batches may go beyond."""
    lowest = min(line.smooth.min() for line in lines)
    highest = max(line.smooth[len(line.smooth) // 50 :].max() for line in lines)
    axes.set_ylim(lowest / 1.8, highest * 1.6)


def _label_ends(axes: Axes, lines: list[_Line]) -> None:
    """Names each line at its right end; names that would overlap are moved apart."""
    to_axes = axes.transScale.transform
    low, high = (to_axes((1, limit))[1] for limit in axes.get_ylim())
    ends = {line.method: (to_axes((1, line.smooth[-1]))[1] - low) / (high - low) for line in lines}
    places = _spread(ends)
    for line in lines:
        place, look = places[line.method], line.look
        leader = ([1.0, 1.05], [ends[line.method], place])
        axes.plot(
            *leader, transform=axes.transAxes, color=look.colour, linewidth=1, linestyle=look.dashes, clip_on=False
        )
        weight = "bold" if look.width > BASELINE_WIDTH else "normal"
        axes.text(1.06, place, line.method, transform=axes.transAxes, va="center", color=look.colour, weight=weight)


def _spread(heights: dict[str, float]) -> dict[str, float]:
    """Moves labels up, from the lowest on, and then down from the top, until all keep `LABEL_GAP`."""
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


def _caption(outcome: Outcome) -> str:
    seeds = outcome.study.seeds
    return (
        f"Thin: mini-batch cost averaged over every {AVERAGED} iterations. Thick: its moving average over "
        f"{SMOOTHED_FRACTION:.0%} of the iterations. {'One seed' if seeds == 1 else f'Mean of {seeds} seeds'}; "
        "each method at the best learning rate of its grid."
    )
