"""What section 5.1 found, as numbers: each method's best configuration, the whole grid, every curve, the claims."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence

from rich.table import Table

from relfisher.studies.neuron import GRID, METHODS, Panel
from relfisher.studies.neuron_study import Choice, NeuronOutcome, log_mean
from relfisher.studies.tables import csv_text

__all__ = [
    "claims",
    "claims_markdown",
    "curves_csv_gz",
    "grid_csv",
    "scientific",
    "summary",
    "table_csv",
    "table_markdown",
]

LN10 = math.log(10)


def scientific(log_cost: float) -> str:
    """Writes a cost of which only the logarithm fits into a floating-point number, such as 1.2e-434."""
    exponent, fraction = divmod(log_cost / math.log(10), 1)
    mantissa = f"{10**fraction:.2f}"
    if mantissa == "10.00":
        exponent, mantissa = exponent + 1, "1.00"
    return f"{mantissa}e{int(exponent):+03d}"


def claims(outcome: NeuronOutcome, panel: Panel) -> dict[str, bool]:
    """Returns whether what section 5.1 says holds in a panel, by the mean costs after the last epoch.

    Args:
        outcome: A study of all four methods.
        panel: One of its panels.

    Returns:
        Each claim and whether it holds; none if a method is missing or has diverged throughout.
    """
    final = {
        method: float(outcome.choices[panel, method].mean[-1])
        for method in outcome.study.methods
        if outcome.choices[panel, method].chosen is not None
    }
    if set(final) != set(METHODS):
        return {}
    return {
        "NGD and WhiteNGD reach deeper than GD and WhiteGD": max(final["NGD"], final["WhiteNGD"])
        < min(final["GD"], final["WhiteGD"]),
        "WhiteNGD is first": final["WhiteNGD"] == min(final.values()),
        "GD is last": final["GD"] == max(final.values()),
    }


def table_csv(outcome: NeuronOutcome) -> str:
    """The chosen configurations; costs as decimal logarithms, since some are below the smallest float64."""
    header = ["classes", "images", "method", "learning_rate", "momentum", "runs", "log10_cost_of_mean"]
    header += ["log10_cost_lowest_run", "log10_cost_highest_run", "excess", "configurations_diverged", "seconds"]
    lines: list[Sequence[object]] = [header]
    for (panel, method), choice in outcome.choices.items():
        start: list[object] = [f"{panel.pair[0]} vs {panel.pair[1]}", panel.size, method]
        end = [len(choice.diverged), f"{choice.seconds:.2f}"]
        if choice.chosen is None:
            lines.append([*start, "", "", len(choice.curves), "", "", "", "", *end])
            continue
        final = choice.curves[:, -1] / LN10
        numbers = [float(choice.mean[-1]) / LN10, float(final.min()), float(final.max())]
        configuration = [choice.chosen.learning_rate, choice.chosen.momentum, len(choice.curves)]
        shown = [f"{value:.6f}" for value in numbers]
        lines.append([*start, *configuration, *shown, f"{_excess(outcome, panel, choice):.3e}", *end])
    return csv_text(lines)


def table_markdown(outcome: NeuronOutcome) -> str:
    """The chosen configurations as Markdown, with what the columns mean, and the claims below."""
    header = ["panel", "method", "lr", "momentum", "cost", "lowest to highest run", "above lowest", "diverged", "s"]
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for (panel, method), choice in outcome.choices.items():
        lines.append([str(panel), method, *_cells(outcome, panel, choice)])
    epochs = dict(outcome.study.settings)["epochs"]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return (
        table
        + (
            f"\nCost: mean over the runs of the training cost (29) after {epochs} epochs, at the configuration where it"
            " is lowest. Above lowest: how far that is above the lowest mean cost of any method, configuration and"
            " epoch in the panel. Diverged: configurations of the ten in which a run had no finite step any more; they"
            " are never chosen. s: seconds for all runs and configurations.\n\n"
        )
        + claims_markdown(outcome)
    )


def claims_markdown(outcome: NeuronOutcome) -> str:
    """Whether each claim of section 5.1 holds, a line a panel."""
    found = {panel: claims(outcome, panel) for panel in outcome.study.panels}
    names = list(next(iter(found.values()), {}))
    if not names or not all(found.values()):
        return ""
    lines = [["panel", *names], ["---"] * (len(names) + 1)]
    lines += [[str(panel), *("yes" if holds[name] else "no" for name in names)] for panel, holds in found.items()]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def grid_csv(outcome: NeuronOutcome) -> str:
    """Every configuration with its final cost, or the epoch at which it diverged, and which was chosen."""
    header = ["classes", "images", "method", "learning_rate", "momentum", "log10_cost_of_mean", "diverged", "chosen"]
    lines: list[Sequence[object]] = [header]
    for (panel, method), choice in outcome.choices.items():
        curves = outcome.curves[outcome.study.batch(panel, method)]
        for entry, cost in zip(GRID, log_mean(curves.log_cost)[:, -1] / LN10, strict=True):
            epoch = choice.diverged.get(entry, "")
            shown = "" if entry in choice.diverged else f"{float(cost):.6f}"
            start = [f"{panel.pair[0]} vs {panel.pair[1]}", panel.size, method, entry.learning_rate, entry.momentum]
            lines.append([*start, shown, epoch, entry == choice.chosen])
    return csv_text(lines)


def curves_csv_gz(outcome: NeuronOutcome) -> bytes:
    """The mean, lowest and highest run of every configuration after every epoch, as decimal logarithms."""
    header = ["classes", "images", "method", "learning_rate", "momentum", "epoch", "mean", "lowest", "highest"]
    lines: list[Sequence[object]] = [header]
    for batch, curves in outcome.curves.items():
        start = [f"{batch.panel.pair[0]} vs {batch.panel.pair[1]}", batch.panel.size, batch.method]
        for entry, costs in zip(GRID, curves.log_cost / LN10, strict=True):
            means = log_mean(costs * LN10) / LN10
            columns = zip(means.tolist(), costs.amin(0).tolist(), costs.amax(0).tolist(), strict=True)
            for epoch, values in enumerate(columns):
                if all(map(math.isfinite, values)):
                    shown = [f"{value:.4f}" for value in values]
                    lines.append([*start, entry.learning_rate, entry.momentum, epoch, *shown])
    # A time stamp would make equal curves differ as files.
    return gzip.compress(csv_text(lines).encode(), mtime=0)


def summary(outcome: NeuronOutcome) -> Table:
    """The table as a person at the terminal sees it."""
    shown = Table("panel", "method", title="Training cost after the last epoch")
    for name in ("lr", "mom.", "cost", "diverged", "s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for (panel, method), choice in outcome.choices.items():
        cells = _cells(outcome, panel, choice)
        shown.add_row(str(panel), method, *cells[:3], *cells[5:], end_section=method == outcome.study.methods[-1])
    return shown


def _cells(outcome: NeuronOutcome, panel: Panel, choice: Choice) -> list[str]:
    end = [f"{len(choice.diverged)} of {len(GRID)}", f"{choice.seconds:.1f}"]
    if choice.chosen is None:
        return ["-"] * 5 + end
    final = choice.curves[:, -1]
    cost = scientific(float(choice.mean[-1]))
    spread = f"{scientific(float(final.min()))} to {scientific(float(final.max()))}"
    configuration = [f"{choice.chosen.learning_rate:g}", f"{choice.chosen.momentum:g}"]
    return [*configuration, cost, spread, f"{_excess(outcome, panel, choice):.1e}", *end]


def _excess(outcome: NeuronOutcome, panel: Panel, choice: Choice) -> float:
    lowest, final = outcome.lowest(panel), float(choice.mean[-1])
    return abs(math.exp(final) * math.expm1(lowest - final))
