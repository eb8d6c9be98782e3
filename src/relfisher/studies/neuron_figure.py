"""Figure 4: training cost against epochs, with a panel for each pair and size, and a line and band for each method."""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from relfisher.studies.figures import STYLE, Look
from relfisher.studies.neuron import GRID, Curves, NeuronOutcome, lowest
from relfisher.studies.panels import Panel

__all__ = ["LN10", "figure4", "scientific"]

LN10 = math.log(10)
# If a curve falls below this, the axis is compressed, so that all curves can be told apart.
DEEP = -30.0
LINEAR = 4.0
# Data with a lowest cost above this (its logarithm) are considered not separable: their cost has a minimum.
MINIMUM = math.log(1e-3)
SMALLEST_EXCESS = 1e-10
LOOKS = {
    "GD": Look("#8a8a8a", "--"),
    "WhiteGD": Look("#0072b2", "--"),
    "NGD": Look("#e69f00", width=2.4),
    "WhiteNGD": Look("#d1345b", width=2.4),
}
GARMENTS = (
    "T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


def figure4(outcome: NeuronOutcome, data: str) -> Figure:
    """Draw the study as the paper's figure 4.

    Args:
        outcome: a finished study; methods without a converged configuration are omitted from their panel.
        data: the name of the data set.

    Returns:
        The figure, with a row for each pair of classes and a column for each size.
    """
    pairs = list(dict.fromkeys(panel.pair for panel in outcome.study.panels))
    rows = [[panel for panel in outcome.study.panels if panel.pair == pair] for pair in pairs]
    columns = max(map(len, rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4 * columns, 5.1 * len(rows) + 0.9), dpi=150)
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes_row, panels in zip(grid, rows, strict=True):
            for axes in axes_row[len(panels) :]:
                axes.remove()
            for axes, panel in zip(axes_row, panels, strict=False):
                _panel(axes, outcome, panel)
                axes.set_title(_title(panel, data), loc="left", fontsize=11.5)
        for axes in grid[:, 0]:
            axes.set_ylabel("training cost")
        inches = figure.get_figheight()
        figure.suptitle(
            f"One sigmoid neuron on {data}", x=0.075, y=1 - 0.12 / inches, ha="left", fontsize=14, fontweight="bold"
        )
        figure.text(0.075, 0.12 / inches, _caption(outcome), fontsize=9, color="#555555")
        figure.subplots_adjust(
            left=0.075, right=0.985, top=1 - 0.78 / inches, bottom=1.75 / inches, wspace=0.17, hspace=0.47
        )
    return figure


def scientific(log_cost: float) -> str:
    """Format a cost whose logarithm alone fits into a floating-point number, such as 1.2e-434."""
    exponent, fraction = divmod(log_cost / LN10, 1)
    mantissa = f"{10**fraction:.2f}"
    if mantissa == "10.00":
        exponent, mantissa = exponent + 1, "1.00"
    return f"{mantissa}e{int(exponent):+03d}"


def _panel(axes: Axes, outcome: NeuronOutcome, panel: Panel) -> None:
    bottom, top = 0.0, 0.0
    for method in outcome.study.methods:
        curves, look = outcome.records[outcome.study.batch(panel, method)], LOOKS[method]
        if curves.chosen is None:
            axes.plot([], [], color=look.color, linestyle=look.dashes, label=f"{method}: all configurations diverged")
            continue
        epochs = np.arange(curves.best.shape[1])
        mean, low, high = (
            (values / LN10).numpy() for values in (curves.mean, curves.best.amin(0), curves.best.amax(0))
        )
        axes.fill_between(epochs, low, high, color=look.color, alpha=0.22, linewidth=0)
        axes.plot(
            epochs, mean, color=look.color, linestyle=look.dashes, linewidth=look.width, label=_label(method, curves)
        )
        bottom, top = min(bottom, float(low.min())), max(top, float(high.max()))
    axes.margins(x=0)
    if bottom < DEEP:
        _compress(axes, bottom, top)
    else:
        _decades(axes)
    if MINIMUM < lowest(outcome, panel) < math.inf:
        _inset(axes, outcome, panel)
    axes.set_xlabel("epoch", loc="right", labelpad=1)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, -0.08), fontsize=9, frameon=False, labelspacing=0.3)


def _inset(axes: Axes, outcome: NeuronOutcome, panel: Panel) -> None:
    """Draw the excess of each mean cost over the lowest one, which is not visible in the costs themselves."""
    inset = axes.inset_axes((0.42, 0.5, 0.56, 0.44))
    least = math.exp(lowest(outcome, panel))
    for method in outcome.study.methods:
        curves, look = outcome.records[outcome.study.batch(panel, method)], LOOKS[method]
        if curves.chosen is not None:
            excess = (curves.mean.exp() - least).clamp(min=SMALLEST_EXCESS).numpy()
            inset.semilogy(excess, color=look.color, linestyle=look.dashes, linewidth=0.75 * look.width)
    inset.set_title("cost above the lowest mean cost of the panel", loc="left", fontsize=8.5)
    inset.tick_params(labelsize=8)
    inset.margins(x=0)


def _compress(axes: Axes, lowest: float, highest: float) -> None:
    """Scale the axis of log costs linearly down to about 1e-4 and logarithmically below."""
    axes.set_yscale("function", functions=(lambda value: np.arcsinh(value / LINEAR), lambda y: LINEAR * np.sinh(y)))
    axes.set_ylim(1.25 * lowest, highest + 0.5)
    ticks = [2, 0, -2, -5, -10, -20, -50, -100, -200, -500, -1000, -2000, -5000]
    axes.set_yticks([tick for tick in ticks if 1.25 * lowest < tick < highest + 0.5])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:.0f}}}$"))


def _decades(axes: Axes) -> None:
    """Label the axis of log costs with the costs."""
    bottom, top = axes.get_ylim()
    if top - bottom > 3:
        step = max(1, round((top - bottom) / 6))
        axes.set_yticks(np.arange(math.ceil(bottom / step) * step, top, step))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"$10^{{{value:.0f}}}$"))
        return
    costs = [digit * 10.0**decade for decade in range(-3, 3) for digit in (1, 1.5, 2, 3, 4, 5, 7)]
    axes.set_yticks([math.log10(cost) for cost in costs if bottom < math.log10(cost) < top])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value:.3g}"))


def _label(method: str, curves: Curves) -> str:
    diverged = f", {len(curves.ends)} of {len(GRID)} diverged" if curves.ends else ""
    return f"{method}: {scientific(float(curves.mean[-1]))} ({curves.chosen}{diverged})"


def _title(panel: Panel, data: str) -> str:
    first, second = (GARMENTS[label] if data == "fashion-mnist" else str(label) for label in panel.pair)
    return f"{first} vs {second}, {panel.size:,} images"


def _caption(outcome: NeuronOutcome) -> str:
    options = outcome.study.options
    return (
        f"Line: mean of {options.runs} runs; band: lowest to highest run. Each method at the "
        f"configuration with the lowest mean cost after {options.epochs} epochs, given with that cost."
    )
