"""What a study found, as numbers: the paper's table, the learning-rate grid, and every curve."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from relfisher.studies.runs import Record
from relfisher.studies.study import Outcome, score

__all__ = [
    "AVERAGED",
    "TAUS",
    "Row",
    "averaged",
    "csv_text",
    "curves_csv_gz",
    "grid_csv",
    "rows",
    "table_csv",
    "table_markdown",
]

TAUS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.01)
AVERAGED = 10


@dataclass(frozen=True)
class Row:
    """A method's line in the table; without a learning rate that did not diverge it has no numbers.

    `sharp_ratios` holds, for each of `TAUS`, the mean and standard deviation of the mini-batch training cost over the
    last tau * M of the M iterations, all seeds together. `final_cost` is the cost of all training images at the end,
    averaged over seeds.
    `best_validation` is the best validation accuracy of any epoch, averaged over seeds.
    """

    method: str
    learning_rate: float | None
    seeds: int
    diverged: tuple[str, ...]
    sharp_ratios: tuple[tuple[float, float], ...] = ()
    final_cost: float | None = None
    best_validation: float | None = None
    seconds_per_epoch: float | None = None


def averaged(values: NDArray[np.floating], group: int = AVERAGED) -> NDArray[np.float64]:
    """Averages a curve over every `group` iterations; the last group may be shorter.

    Args:
        values: One value an iteration.
        group: How many iterations make a point.

    Returns:
        The averages, in order.
    """
    starts = np.arange(0, len(values), group)
    counts = np.diff(np.append(starts, len(values)))
    sums: NDArray[np.float64] = np.add.reduceat(values.astype(float), starts)
    return sums / counts


def rows(outcome: Outcome) -> list[Row]:
    """Sums up a study.

    Args:
        outcome: The finished study.

    Returns:
        A row for each method, in the study's order.
    """
    return [_row(outcome, method) for method in outcome.study.grids]


def table_csv(table: Sequence[Row]) -> str:
    """The table with one column a number."""
    ratios = [f"cost_{part}_tau_{tau:g}" for tau in TAUS for part in ("mean", "std")]
    summary = ["final_cost", "best_validation_accuracy", "seconds_per_epoch", "diverged"]
    lines: list[Sequence[object]] = [["method", "learning_rate", "seeds", *ratios, *summary]]
    for row in table:
        numbers = [value for ratio in row.sharp_ratios for value in ratio] if row.sharp_ratios else [""] * len(ratios)
        ends = [row.final_cost, row.best_validation, row.seconds_per_epoch, "; ".join(row.diverged)]
        lines.append([row.method, row.learning_rate, row.seeds, *numbers, *ends])
    return csv_text(lines)


def table_markdown(table: Sequence[Row]) -> str:
    """The table as Markdown, with what its columns mean below it."""
    header = ["method", "lr", "seeds", *(f"τ = {tau:g}" for tau in TAUS)]
    header += ["final cost", "validation", "s/epoch", "diverged"]
    lines = [header, ["---"] + ["---:"] * (len(header) - 2) + ["---"]]
    for row in table:
        ratios = [f"{mean:.2g} ± {std:.1g}" for mean, std in row.sharp_ratios] or ["-"] * len(TAUS)
        summary = [_number(row.final_cost, ".3g"), _number(row.best_validation, ".2%")]
        summary += [_number(row.seconds_per_epoch, ".2f"), ", ".join(row.diverged) or "none"]
        lines.append([row.method, _number(row.learning_rate, "g"), str(row.seeds), *ratios, *summary])
    table_lines = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return table_lines + (
        "\nτ: mean ± standard deviation of the mini-batch training cost over the last τM of the M iterations."
        " Final cost: that of all training images at the end. Validation: best accuracy after any epoch."
        " lr: the candidate with the lowest mean training cost over the last 10% of iterations.\n"
    )


def grid_csv(outcome: Outcome) -> str:
    """Every learning-rate candidate with its score, and which was chosen."""
    lines: list[Sequence[object]] = [["method", "learning_rate", "score", "diverged", "chosen"]]
    for method in outcome.study.grids:
        for run in outcome.study.candidates(method):
            record = outcome.records[run]
            chosen = run.learning_rate == outcome.chosen[method]
            lines.append([method, run.learning_rate, score(record), record.diverged, chosen])
    return csv_text(lines)


def curves_csv_gz(outcome: Outcome) -> bytes:
    """Every run's cost averaged over every ten iterations, at the last of them, with the training time so far."""
    lines: list[Sequence[object]] = [["method", "learning_rate", "seed", "iteration", "seconds", "cost"]]
    for run, record in outcome.records.items():
        identity = [run.method, run.learning_rate, run.seed]
        cost = averaged(record.cost)
        ends = np.minimum(AVERAGED * np.arange(1, len(cost) + 1), len(record.cost))
        for end, mean in zip(ends, cost, strict=True):
            lines.append([*identity, end, f"{record.seconds[end - 1]:.4f}", f"{mean:.6g}"])
    # A time stamp would make equal curves differ as files.
    return gzip.compress(csv_text(lines).encode(), mtime=0)


def _row(outcome: Outcome, method: str) -> Row:
    records = outcome.compared(method)
    diverged = tuple(f"lr {run.learning_rate:g} seed {run.seed}" for run in outcome.diverged(method))
    if not records:
        return Row(method, outcome.chosen[method], 0, diverged)
    return Row(
        method,
        outcome.chosen[method],
        len(records),
        diverged,
        sharp_ratios=tuple(_sharp_ratio(records, tau) for tau in TAUS),
        final_cost=float(np.mean([record.full_cost for record in records])),
        best_validation=float(np.mean([record.validation.max() for record in records])),
        seconds_per_epoch=float(np.mean([record.seconds[-1] / len(record.validation) for record in records])),
    )


def _sharp_ratio(records: Iterable[Record], tau: float) -> tuple[float, float]:
    last = np.concatenate([record.cost[-max(1, round(tau * len(record.cost))) :] for record in records])
    return float(last.mean(dtype=float)), float(last.std(dtype=float))


def _number(value: float | None, specification: str) -> str:
    return "-" if value is None else format(value, specification)


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """The lines as comma-separated values."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
