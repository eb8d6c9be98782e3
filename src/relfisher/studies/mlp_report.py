"""The output of `relfisher reproduce mlp`: the paper's table, figure 5, the learning-rate grid and all curves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from matplotlib.figure import Figure
from rich.table import Column, Table

from relfisher.studies.data import Dataset
from relfisher.studies.figures import AVERAGED, FLOOR, SMOOTHED_FRACTION, Look, averaged, line, panels
from relfisher.studies.mlp import MlpOutcome
from relfisher.studies.networks import WIDTHS
from relfisher.studies.report import ABSENT, Report, markdown
from relfisher.studies.runs import Record

__all__ = ["report"]

TAUS = (1.0, 0.5, 0.2, 0.1, 0.05, 0.01)
LOOKS = {
    "PLAIN+SGD": Look("#8a8a8a", "--"),
    "PLAIN+ADAM": Look("#8a8a8a"),
    "BNA+SGD": Look("#0072b2", "--"),
    "BNA+ADAM": Look("#0072b2"),
    "BNB+SGD": Look("#009e73", "--"),
    "BNB+ADAM": Look("#009e73"),
    "PLAIN+RNGD": Look("#e69f00", width=2.6),
    "PLAIN+RNGD-DEFAULT": Look("#d1345b", width=2.6),
}


@dataclass(frozen=True)
class Row:
    """A method's row of the table; it has no numbers if all of its learning rates diverged.

    `sharp_ratios` holds, for each of `TAUS`, the mean and standard deviation of the mini-batch training cost over the
    last tau * M of the M iterations, for all seeds together. `final_cost` is the final cost on all training images,
    averaged over seeds. `best_validation` is the best validation accuracy of any epoch, averaged over seeds.
    """

    method: str
    learning_rate: float | None
    seeds: int
    diverged: tuple[str, ...]
    sharp_ratios: tuple[tuple[float, float], ...] = ()
    final_cost: float | None = None
    best_validation: float | None = None
    seconds_per_epoch: float | None = None


def rows(outcome: MlpOutcome) -> list[Row]:
    """Summarize a study.

    Args:
        outcome: the finished study.

    Returns:
        One row per method, in the order of the study.
    """
    return [_row(outcome, method) for method in outcome.study.groups]


def report(outcome: MlpOutcome, data: Dataset) -> Report:
    """Report the results.

    Args:
        outcome: the finished study.
        data: the data set.

    Returns:
        The table, learning-rate grid, curves and figure.
    """
    study, table = outcome.study, rows(outcome)
    images = f"{len(data.train_labels):,} images of {data.name}"
    title = f"{'-'.join(map(str, WIDTHS))} ReLU network, {images}, batch {study.options.batch_size}"
    return Report(
        table=table_markdown(table),
        about={
            "settings": asdict(study.options),
            "widths": WIDTHS,
            "training_images": len(data.train_labels),
            "validation_images": len(data.validation_labels),
            "seeds": study.seeds,
            "grids": dict(study.grids),
            "chosen": {row.method: row.learning_rate for row in table},
        },
        threads=[record.threads for record in outcome.records.values()],
        figures={"figure5": figure5(outcome, title)},
        terminal=summary(table),
        files={
            "table.csv": table_lines(table),
            "grid.csv": grid_lines(outcome),
            "curves.csv.gz": curve_lines(outcome),
        },
    )


def table_lines(table: Sequence[Row]) -> list[Sequence[object]]:
    """Return the table with one number per column."""
    ratios = [f"cost_{part}_tau_{tau:g}" for tau in TAUS for part in ("mean", "std")]
    ends = ["final_cost", "best_validation_accuracy", "seconds_per_epoch", "diverged"]
    lines: list[Sequence[object]] = [["method", "learning_rate", "seeds", *ratios, *ends]]
    for row in table:
        numbers = [value for ratio in row.sharp_ratios for value in ratio] if row.sharp_ratios else [""] * len(ratios)
        summed = [row.final_cost, row.best_validation, row.seconds_per_epoch, "; ".join(row.diverged)]
        lines.append([row.method, row.learning_rate, row.seeds, *numbers, *summed])
    return lines


def table_markdown(table: Sequence[Row]) -> str:
    """Return the table as Markdown, followed by an explanation of its columns."""
    header = ["method", "lr", "seeds", *(f"τ = {tau:g}" for tau in TAUS)]
    header += ["final cost", "validation", "s/epoch", "diverged"]
    lines = []
    for row in table:
        ratios = [f"{mean:.2g} ± {std:.1g}" for mean, std in row.sharp_ratios] or [ABSENT] * len(TAUS)
        ends = [_number(row.final_cost, ".3g"), _number(row.best_validation, ".2%")]
        ends += [_number(row.seconds_per_epoch, ".2f"), ", ".join(row.diverged) or "none"]
        lines.append([row.method, _number(row.learning_rate, "g"), str(row.seeds), *ratios, *ends])
    return markdown(header, lines) + (
        "\nτ: mean ± standard deviation of the mini-batch training cost over the last τM of the M iterations."
        " Final cost: on all training images, after training. Validation: best accuracy after any epoch."
        " lr: the candidate with the lowest mean training cost over the last 10% of iterations.\n"
    )


def grid_lines(outcome: MlpOutcome) -> list[Sequence[object]]:
    """Return all learning-rate candidates with their scores and the choice."""
    lines: list[Sequence[object]] = [["method", "learning_rate", "score", "diverged", "chosen"]]
    for method in outcome.study.groups:
        for run in outcome.study.candidates(method):
            record = outcome.records[run]
            lines.append([method, run.learning_rate, record.score, record.diverged, run == outcome.chosen[method]])
    return lines


def curve_lines(outcome: MlpOutcome) -> list[Sequence[object]]:
    """Return each run's cost averaged over ten iterations, at the last of these, with the training time so far."""
    lines: list[Sequence[object]] = [["method", "learning_rate", "seed", "iteration", "seconds", "cost"]]
    for run, record in outcome.records.items():
        cost = averaged(record.cost)
        ends = np.minimum(AVERAGED * np.arange(1, len(cost) + 1), len(record.cost))
        for end, mean in zip(ends, cost, strict=True):
            start = [run.method, run.learning_rate, run.seed, end]
            lines.append([*start, f"{record.seconds[end - 1]:.4f}", f"{mean:.6g}"])
    return lines


def _row(outcome: MlpOutcome, method: str) -> Row:
    records = outcome.compared(method)
    diverged = tuple(f"lr {run.learning_rate:g} seed {run.seed}" for run in outcome.diverged(method))
    best = outcome.chosen[method]
    learning_rate = None if best is None else best.learning_rate
    if not records:
        return Row(method, learning_rate, 0, diverged)
    return Row(
        method,
        learning_rate,
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
    return ABSENT if value is None else format(value, specification)


def figure5(outcome: MlpOutcome, title: str) -> Figure:
    """Draw the study as the paper's figure 5, with panels against wall-clock time and of validation.

    Args:
        outcome: a finished study of the methods in `LOOKS`; methods without a converged run are omitted.
        title: the title, which says what was trained on which data.

    Returns:
        The figure.
    """
    compared = {method: records for method in outcome.study.groups if (records := outcome.compared(method))}
    lines = [line(method, LOOKS[method], records) for method, records in compared.items()]
    accuracies = {
        method: np.mean([record.validation for record in records], axis=0) for method, records in compared.items()
    }
    return panels(lines, title, _caption(outcome), accuracies=accuracies)


def summary(table: Sequence[Row]) -> Table:
    """Return the table for the terminal.

    Args:
        table: the rows.

    Returns:
        A table that highlights the lowest cost.
    """
    # Without rules it fits into 80 characters; otherwise, names wrap.
    shown = Table(Column("method", overflow="fold"), title="Training cost", box=None, pad_edge=False)
    for name in ("lr", "last 10%", "all images", "validation", "s/epoch"):
        shown.add_column(name, justify="right")
    costs = [row.final_cost for row in table if row.final_cost is not None]
    for row in table:
        if row.learning_rate is None or row.final_cost is None:
            shown.add_row(row.method, "all candidates diverged", style="red")
            continue
        mean, std = row.sharp_ratios[TAUS.index(0.1)]
        shown.add_row(
            row.method,
            f"{row.learning_rate:g}",
            f"{mean:.2g} ± {std:.1g}",
            f"{row.final_cost:.3g}",
            f"{row.best_validation:.2%}",
            f"{row.seconds_per_epoch:.2f}",
            style="bold green" if row.final_cost == min(costs) else "",
        )
    return shown


def _caption(outcome: MlpOutcome) -> str:
    seeds = outcome.study.seeds
    return (
        f"Thin: mini-batch cost averaged over {AVERAGED} iterations. Thick: over {SMOOTHED_FRACTION:.0%} of all. "
        f"{'One seed' if seeds == 1 else f'Mean of {seeds} seeds'}; each method at the best learning rate of its grid. "
        f"Lower values are drawn at {FLOOR:g}."
    )
