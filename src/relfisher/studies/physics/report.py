"""The output of `relfisher bench race --by error`: the table, tuning, curves and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from relfisher.studies.figures import STYLE, Look, frame, label_ends
from relfisher.studies.peers import described
from relfisher.studies.physics.methods import LIMIT, METHODS, OURS, RATE, RESIDUAL, UNTUNED
from relfisher.studies.physics.problems import PROBLEMS
from relfisher.studies.physics.race import ErrorOutcome, Solved
from relfisher.studies.physics.task import Solving
from relfisher.studies.report import ABSENT, Report, shown, titled

__all__ = ["best_peer", "header", "report", "rows"]

#: The columns that fit into a terminal.
BRIEF = (0, 2, 4, 6, 7)
LOOKS = {
    "Adam": Look("#8a8a8a"),
    "Adam-L-BFGS": Look("#4d4d4d"),
    "L-BFGS": Look("#4d4d4d", ":"),
    "SOAP": Look("#7b3294"),
    "Muon": Look("#0072b2"),
    LIMIT: Look("#009e73", "--"),
    "RNGD": Look("#e69f00"),
    RESIDUAL: Look("#d1345b", width=2.6),
    RATE: Look("#8c1d40", width=2.6),
    UNTUNED: Look("#d1345b", "--"),
}


def header(outcome: ErrorOutcome) -> list[str]:
    """Return the column names of `rows`."""
    return [
        "method",
        "configuration",
        f"error at {outcome.study.budget:g} s",
        "of the seeds",
        "relative to the best peer",
        f"at {outcome.study.budget / 2:g} s",
        "steps",
        "ms/step",
        "loss",
        "state MB",
        "diverged",
    ]


def rows(outcome: ErrorOutcome) -> list[list[str]]:
    """Summarize a race, one row per method, with the columns of `header`."""
    return [_row(outcome, method) for method in outcome.study.methods]


def best_peer(outcome: ErrorOutcome) -> tuple[str, float] | None:
    """Return the peer with the lowest median error, other than dense Gauss-Newton, and that error."""
    return _best(outcome, [method for method in outcome.study.methods if method not in (*OURS, LIMIT)])


def _best(outcome: ErrorOutcome, methods: Sequence[str]) -> tuple[str, float] | None:
    found = {method: median for method in methods if (median := _median(outcome, method)) is not None}
    return min(found.items(), key=lambda each: each[1]) if found else None


def report(outcome: ErrorOutcome, notes: Mapping[str, str]) -> Report:
    """Report the results.

    Args:
        outcome: the finished race.
        notes: the reasons why methods of the race did not take part.

    Returns:
        The table, tuning, curves and figures.
    """
    study, names, table = outcome.study, header(outcome), rows(outcome)
    return Report(
        table=titled(_title(outcome), names, table, notes, _notes(outcome)),
        about={
            "settings": asdict(study.options),
            "seeds": study.seeds,
            "tuning_seconds": study.tuning,
            "budget_seconds": study.budget,
            "grids": {method: dict(METHODS[method].grid) for method in study.methods},
            "chosen": {method: best and best.configuration for method, best in outcome.chosen.items()},
            "errors": {method: _errors(outcome, method) for method in study.methods},
            "absent": dict(notes),
        },
        threads=[record.threads for record in outcome.records.values()],
        figures={"race": _curves_figure(outcome), "solution": _map_figure(outcome)},
        terminal=shown(
            _title(outcome), [names[place] for place in BRIEF], [[row[place] for place in BRIEF] for row in table]
        ),
        files={"tuning.csv": _tuning(outcome), "curves.csv.gz": _curves(outcome)},
    )


def _row(outcome: ErrorOutcome, method: str) -> list[str]:
    chosen, records = outcome.chosen[method], outcome.compared(method)
    diverged = str(len(outcome.diverged(method)))
    median, peer = _median(outcome, method), best_peer(outcome)
    if chosen is None or median is None:
        return [method, "all diverged", *[ABSENT] * (len(header(outcome)) - 3), diverged]
    errors = sorted(_errors(outcome, method))
    return [
        method,
        described(chosen.configuration),
        f"{median:.2g}",
        f"{errors[0]:.2g} to {errors[-1]:.2g}",
        ABSENT if peer is None else f"{median / peer[1]:.2g}",
        f"{np.median([_at_half(outcome, record) for record in records]):.2g}",
        f"{np.median([len(record.cost) for record in records]):.0f}",
        f"{np.median([1e3 * record.seconds[-1] / len(record.cost) for record in records]):.2f}",
        f"{np.median([record.full_cost for record in records]):.2g}",
        f"{records[0].state_bytes / 1e6:.3g}",
        diverged,
    ]


def _errors(outcome: ErrorOutcome, method: str) -> list[float]:
    return [float(record.validation[-1]) for record in outcome.compared(method)]


def _median(outcome: ErrorOutcome, method: str) -> float | None:
    errors = _errors(outcome, method)
    return float(np.median(errors)) if errors else None


def _seconds(record: Solved) -> NDArray[np.float64]:
    """Return the training time at each evaluation, the first of which is before all training."""
    return np.concatenate([[0.0], record.seconds])[list(record.evaluated)]


def _at_half(outcome: ErrorOutcome, record: Solved) -> float:
    return float(record.validation[_seconds(record) <= outcome.study.budget / 2 + 1e-9][-1])


def _title(outcome: ErrorOutcome) -> str:
    study, equation = outcome.study, PROBLEMS[outcome.study.name]
    widths = "-".join(map(str, equation.widths))
    points = f"{study.options.inside} points{' drawn for each step' if study.options.fresh else ''}"
    return f"{equation.title[0].upper()}{equation.title[1:]}, {widths} {equation.unit}, {points}"


def _notes(outcome: ErrorOutcome) -> str:
    study = outcome.study
    return (
        f"\nRelative L2 error on a grid of {len(Solving(PROBLEMS[study.name]).answered[0]):,} points after "
        f"{study.budget:g} s of one core, the median of {study.seeds} seeds; and the range of the seeds. Every method "
        f"but {UNTUNED} runs {len(study.candidates(study.methods[0]))} configurations for {study.tuning:g} s each with "
        "the first seed; the one with the lowest error then runs with every seed. Learning rates fall to 0 by a cosine "
        f"over the time of a run, but those of L-BFGS and {LIMIT}, which have line searches. {LIMIT} is dense: a limit "
        "for networks of this size, not a peer. The loss is that at points drawn anew. Evaluation does not count as "
        "time.\n"
    )


def _tuning(outcome: ErrorOutcome) -> list[Sequence[object]]:
    lines: list[Sequence[object]] = [["method", "configuration", "error", "steps", "diverged", "chosen"]]
    for method in outcome.study.methods:
        for run in outcome.study.candidates(method):
            record, chosen = outcome.records[run], run == outcome.chosen[method]
            error = outcome.study.score(record)
            lines.append([method, described(run.configuration), error, len(record.cost), record.diverged, chosen])
    return lines


def _curves(outcome: ErrorOutcome) -> list[Sequence[object]]:
    lines: list[Sequence[object]] = [["method", "seed", "step", "seconds", "error"]]
    for run in (run for method in outcome.study.methods for run in outcome.repeats(method)):
        record = outcome.records[run]
        for step, second, error in zip(record.evaluated, _seconds(record), record.validation, strict=True):
            lines.append([run.method, run.seed, step, f"{second:.4f}", f"{error:.6g}"])
    return lines


def _curves_figure(outcome: ErrorOutcome) -> Figure:
    """Draw the median error of each method against seconds and against steps."""
    compared = {method: outcome.compared(method) for method in outcome.study.methods}
    compared = {method: records for method, records in compared.items() if records}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.2), dpi=150)
        left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.75})
        ends = {}
        for method, records in compared.items():
            look, count = LOOKS[method], min(len(record.evaluated) for record in records)
            error = np.median([record.validation[:count] for record in records], axis=0)
            ends[method] = float(error[-1])
            seconds = np.median([_seconds(record)[:count] for record in records], axis=0)
            steps = np.median([record.evaluated[:count] for record in records], axis=0)
            for axes, x in ((left, seconds), (right, steps)):
                axes.plot(x[1:], error[1:], color=look.color, linestyle=look.dashes, linewidth=look.width)
        left.set(xlabel="training time (seconds)", ylabel="relative L2 error", yscale="log", xlim=(0, None))
        right.set(xlabel="step", xscale="log")
        right.tick_params(labelleft=True)
        left.margins(x=0)
        if ends:
            label_ends(left, LOOKS, ends)
        caption = f"Median of {outcome.study.seeds} seeds, each method with its best configuration; {UNTUNED} untuned."
        frame(figure, _title(outcome), caption)
    return figure


def _map_figure(outcome: ErrorOutcome) -> Figure:
    """Draw the true solution, and the errors of the best peer and of ours, over the first two coordinates.

    Other coordinates are at the middle of the grid. The seed is the first.

    Args:
        outcome: the finished race.

    Returns:
        The figure.
    """
    equation, peer = PROBLEMS[outcome.study.name], best_peer(outcome)
    x, answer = Solving(equation).answered
    side = round(len(x) ** (1 / len(equation.box)))
    middle = (slice(None), slice(None), *[side // 2] * (len(equation.box) - 2))

    def sheet(values: NDArray[np.floating]) -> NDArray[np.floating]:
        plane: NDArray[np.floating] = values[:, 0].reshape([side] * len(equation.box))[middle].T
        return plane

    truth = answer.numpy()
    ours = _best(outcome, [method for method in OURS if method in outcome.study.methods])
    shown_methods = [each[0] for each in (peer, ours) if each is not None]
    errors = {method: sheet(np.abs(outcome.compared(method)[0].solution - truth)) for method in shown_methods}
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(12, 4.8), dpi=150)
        panels = figure.subplots(1, 3, gridspec_kw={"wspace": 0.35})
        extent = (*equation.box[0], *equation.box[1])
        drawn = panels[0].imshow(sheet(truth), origin="lower", extent=extent, aspect="auto", cmap="RdBu_r")
        figure.colorbar(drawn, ax=panels[0])
        panels[0].set_title("true solution", fontsize=11)
        top = max((float(error.max()) for error in errors.values()), default=1.0)
        norm = mpl.colors.LogNorm(top * 1e-4, top)
        for axes, (method, error) in zip(panels[1:], errors.items(), strict=False):
            values = np.maximum(error, top * 1e-4)
            drawn = axes.imshow(values, origin="lower", extent=extent, aspect="auto", cmap="magma", norm=norm)
            figure.colorbar(drawn, ax=axes)
            axes.set_title(f"error of {method}", fontsize=11)
        for axes in panels:
            axes.set(xlabel=equation.axes[0], ylabel=equation.axes[1])
        caption = "The first seed of the best peer and of ours at the end; absolute errors on one scale."
        frame(figure, _title(outcome), caption, left=0.075, right=0.97)
        figure.subplots_adjust(top=0.84)
    return figure
