"""The output of `relfisher reproduce neuron`: best configurations, the grid, all curves, the claims and figure 4."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from relfisher.studies.data import Dataset
from relfisher.studies.descent import DAMPING
from relfisher.studies.neuron import (
    GRID,
    LEARNING_RATES,
    METHODS,
    MOMENTUMS,
    Batch,
    Curves,
    NeuronOutcome,
    log_mean,
    lowest,
)
from relfisher.studies.neuron_figure import LN10, figure4, scientific
from relfisher.studies.panels import Panel
from relfisher.studies.report import ABSENT, Report, markdown

__all__ = ["claims", "report"]


def claims(outcome: NeuronOutcome, panel: Panel) -> dict[str, bool]:
    """Return which claims of section 5.1 hold in a panel, judged by the mean costs after the last epoch.

    Args:
        outcome: a study of all four methods.
        panel: one of its panels.

    Returns:
        The claims and whether they hold; empty if a method is missing or diverged in all configurations.
    """
    final = {
        batch.method: float(curves.mean[-1])
        for batch, curves in outcome.records.items()
        if batch.panel == panel and not curves.diverged
    }
    if set(final) != set(METHODS):
        return {}
    return {
        "NGD and WhiteNGD reach deeper than GD and WhiteGD": max(final["NGD"], final["WhiteNGD"])
        < min(final["GD"], final["WhiteGD"]),
        "WhiteNGD is first": final["WhiteNGD"] == min(final.values()),
        "GD is last": final["GD"] == max(final.values()),
    }


def report(outcome: NeuronOutcome, data: Dataset) -> Report:
    """Report the results.

    Args:
        outcome: the finished study.
        data: the data set.

    Returns:
        The table, claims, grid, curves and figure.
    """
    study = outcome.study
    return Report(
        table=table_markdown(outcome),
        about={
            "settings": asdict(study.options),
            "panels": [str(panel) for panel in study.panels],
            "methods": study.methods,
            "learning_rates": LEARNING_RATES,
            "momentums": MOMENTUMS,
            "damping": DAMPING,
        },
        threads=[curves.threads for curves in outcome.records.values()],
        figures={"figure4": figure4(outcome, data.name)},
        terminal=summary(outcome),
        files={
            "table.csv": table_lines(outcome),
            "grid.csv": grid_lines(outcome),
            "curves.csv.gz": curve_lines(outcome),
        },
        remark=claims_markdown(outcome),
    )


def table_lines(outcome: NeuronOutcome) -> list[Sequence[object]]:
    """Return the chosen configurations, with costs as decimal logarithms, since some are below the smallest float64."""
    header = ["classes", "images", "method", "learning_rate", "momentum", "runs", "log10_cost_of_mean"]
    header += ["log10_cost_lowest_run", "log10_cost_highest_run", "excess", "configurations_diverged", "seconds"]
    lines: list[Sequence[object]] = [header]
    for batch, curves in outcome.records.items():
        runs, end = len(curves.best), [len(curves.ends), f"{curves.seconds:.2f}"]
        if curves.chosen is None:
            lines.append([*_start(batch), "", "", runs, "", "", "", "", *end])
            continue
        final = curves.best[:, -1] / LN10
        numbers = [float(curves.mean[-1]) / LN10, float(final.min()), float(final.max())]
        configuration = [curves.chosen.learning_rate, curves.chosen.momentum, runs]
        excess = f"{_excess(outcome, batch, curves):.3e}"
        lines.append([*_start(batch), *configuration, *(f"{value:.6f}" for value in numbers), excess, *end])
    return lines


def table_markdown(outcome: NeuronOutcome) -> str:
    """Return the chosen configurations as Markdown, followed by an explanation of the columns and the claims."""
    header = ["panel", "method", "lr", "momentum", "cost", "lowest to highest run", "above lowest", "diverged", "s"]
    lines = [
        [str(batch.panel), batch.method, *_cells(outcome, batch, curves)] for batch, curves in outcome.records.items()
    ]
    notes = (
        f"\nCost: mean over the runs of the training cost (29) after {outcome.study.options.epochs} epochs, at the"
        " configuration where it is lowest. Above lowest: its excess over the lowest mean cost of any method,"
        " configuration and epoch in the panel. Diverged: the number of the ten configurations in which a run had no"
        " finite step; they are never chosen. s: seconds for all runs and configurations.\n\n"
    )
    return markdown(header, lines, texts=2) + notes + claims_markdown(outcome)


def claims_markdown(outcome: NeuronOutcome) -> str:
    """Return which claims of section 5.1 hold, with one line per panel."""
    found = {panel: claims(outcome, panel) for panel in outcome.study.panels}
    names = list(next(iter(found.values()), {}))
    if not names or not all(found.values()):
        return ""
    lines = [[str(panel), *("yes" if holds[name] else "no" for name in names)] for panel, holds in found.items()]
    return markdown(["panel", *names], lines, texts=len(names) + 1)


def grid_lines(outcome: NeuronOutcome) -> list[Sequence[object]]:
    """Return all configurations with their final costs or the epochs at which they diverged, and the choice."""
    header = ["classes", "images", "method", "learning_rate", "momentum", "log10_cost_of_mean", "diverged", "chosen"]
    lines: list[Sequence[object]] = [header]
    for batch, curves in outcome.records.items():
        for entry, cost in zip(GRID, log_mean(curves.log_cost)[:, -1] / LN10, strict=True):
            epoch = curves.ends.get(entry, "")
            final = "" if entry in curves.ends else f"{float(cost):.6f}"
            start = [*_start(batch), entry.learning_rate, entry.momentum]
            lines.append([*start, final, epoch, entry == curves.chosen])
    return lines


def curve_lines(outcome: NeuronOutcome) -> list[Sequence[object]]:
    """Return the mean, lowest and highest run of all configurations after every epoch, as decimal logarithms."""
    header = ["classes", "images", "method", "learning_rate", "momentum", "epoch", "mean", "lowest", "highest"]
    lines: list[Sequence[object]] = [header]
    for batch, curves in outcome.records.items():
        for entry, costs in zip(GRID, curves.log_cost / LN10, strict=True):
            means = log_mean(costs * LN10) / LN10
            columns = zip(means.tolist(), costs.amin(0).tolist(), costs.amax(0).tolist(), strict=True)
            for epoch, values in enumerate(columns):
                if all(map(math.isfinite, values)):
                    numbers = [f"{value:.4f}" for value in values]
                    lines.append([*_start(batch), entry.learning_rate, entry.momentum, epoch, *numbers])
    return lines


def summary(outcome: NeuronOutcome) -> Table:
    """Return the table for the terminal."""
    shown = Table("panel", "method", title="Training cost after the last epoch")
    for name in ("lr", "mom.", "cost", "diverged", "s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for batch, curves in outcome.records.items():
        cells = _cells(outcome, batch, curves)
        last = batch.method == outcome.study.methods[-1]
        shown.add_row(str(batch.panel), batch.method, *cells[:3], *cells[5:], end_section=last)
    return shown


def _start(batch: Batch) -> list[object]:
    return [batch.panel.classes, batch.panel.size, batch.method]


def _cells(outcome: NeuronOutcome, batch: Batch, curves: Curves) -> list[str]:
    end = [f"{len(curves.ends)} of {len(GRID)}", f"{curves.seconds:.1f}"]
    if curves.chosen is None:
        return [ABSENT] * 5 + end
    final = curves.best[:, -1]
    cost = scientific(float(curves.mean[-1]))
    spread = f"{scientific(float(final.min()))} to {scientific(float(final.max()))}"
    configuration = [f"{curves.chosen.learning_rate:g}", f"{curves.chosen.momentum:g}"]
    return [*configuration, cost, spread, f"{_excess(outcome, batch, curves):.1e}", *end]


def _excess(outcome: NeuronOutcome, batch: Batch, curves: Curves) -> float:
    least, final = lowest(outcome, batch.panel), float(curves.mean[-1])
    return abs(math.exp(final) * math.expm1(least - final))
