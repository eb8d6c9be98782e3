"""The output of `relfisher bench race`: the table, tuning, curves, figure and configuration."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from matplotlib.figure import Figure

from relfisher.studies.figures import Look, line, panels
from relfisher.studies.peers import PEERS, UNTUNED, described
from relfisher.studies.race import RaceOutcome, reached, running_mean
from relfisher.studies.report import ABSENT, Report, shown, titled
from relfisher.studies.runs import Record
from relfisher.studies.workloads import WORKLOADS

__all__ = ["header", "report", "rows"]

POINTS = 400
LOOKS = {
    "SGD": Look("#8a8a8a", "--"),
    "Adam": Look("#8a8a8a"),
    "AdamW": Look("#4d4d4d", ":"),
    "BNA+Adam": Look("#0072b2"),
    "BNB+Adam": Look("#009e73"),
    "Muon": Look("#56b4e9"),
    "SOAP": Look("#7b3294"),
    "Shampoo": Look("#7b3294", "--"),
    "K-FAC": Look("#a6761d"),
    "FOOF": Look("#e69f00", "--"),
    "RNGD": Look("#d1345b", width=2.6),
    UNTUNED: Look("#d1345b", "--"),
    "RNGD-trust-region": Look("#0b7a75", width=2.6),
    "RNGD-normalized": Look("#8c1d40", width=2.6),
}


def title(outcome: RaceOutcome) -> str:
    """Return the title: what was trained, and on which data."""
    return f"{WORKLOADS[outcome.study.race.workload].title}, {outcome.study.options.data}"


def header(outcome: RaceOutcome) -> list[str]:
    """Return the column names of `rows`."""
    goal = "target" if outcome.study.race.target is None else f"{outcome.study.race.target:g}"
    return [
        "method",
        "configuration",
        f"s to {goal}",
        f"steps to {goal}",
        "reached",
        "ms/step",
        f"loss at {outcome.study.budget:g} s",
        f"loss at {_fewest(outcome)} steps",
        f"validation at {goal}",
        "validation at the end",
        "best validation",
        "state MB",
        "diverged",
    ]


def rows(outcome: RaceOutcome) -> list[list[str]]:
    """Summarize a race.

    Args:
        outcome: the finished race.

    Returns:
        One row per method, with the columns of `header`.
    """
    return [_row(outcome, method) for method in outcome.study.methods]


def figure(outcome: RaceOutcome) -> Figure:
    """Draw the loss against steps and seconds.

    Args:
        outcome: the finished race; methods without a converged run are omitted.

    Returns:
        The figure.
    """
    compared = {method: outcome.compared(method) for method in outcome.study.methods}
    lines = [
        line(method, LOOKS[method], records, max(outcome.study.race.window, len(records[0].cost) // POINTS))
        for method, records in compared.items()
        if records
    ]
    caption = (
        f"Mini-batch loss, mean over {outcome.study.seeds} seeds, as far as the shortest run goes; each method with "
        f"the best of {len(outcome.study.candidates(outcome.study.methods[0]))} configurations."
    )
    return panels(lines, title(outcome), caption, outcome.study.race.target)


def report(outcome: RaceOutcome, notes: Mapping[str, str]) -> Report:
    """Report the results.

    Args:
        outcome: the finished race.
        notes: the reasons why methods of the race did not take part.

    Returns:
        The table, tuning, curves and figure.
    """
    study, names, table = outcome.study, header(outcome), rows(outcome)
    return Report(
        table=titled(title(outcome), names, table, notes, _notes(outcome)),
        about={
            "settings": asdict(study.options),
            "target": study.race.target,
            "window": study.race.window,
            "seeds": study.seeds,
            "tuning_seconds": study.tuning,
            "budget_seconds": study.budget,
            "grids": {method: dict(PEERS[method].grid) for method in study.methods},
            "chosen": {method: best and best.configuration for method, best in outcome.chosen.items()},
            "absent": dict(notes),
        },
        threads=[record.threads for record in outcome.records.values()],
        figures={"race": figure(outcome)},
        terminal=shown(title(outcome), names, table),
        files={"tuning.csv": _tuning(outcome), "curves.csv.gz": _curves(outcome)},
    )


def _row(outcome: RaceOutcome, method: str) -> list[str]:
    race, chosen, records = outcome.study.race, outcome.chosen[method], outcome.compared(method)
    best = max if WORKLOADS[race.workload].higher_is_better else min
    hits = [(record, steps) for record in records if (steps := reached(record, race.target, race.window)) is not None]
    fewest = _fewest(outcome)
    return [
        method,
        "all diverged" if chosen is None else described(chosen.configuration),
        _mean([float(record.seconds[steps - 1]) for record, steps in hits], ".1f"),
        _mean([float(steps) for _, steps in hits], ".0f"),
        ABSENT if race.target is None else f"{len(hits)} of {outcome.study.seeds}",
        _mean([1e3 * float(record.seconds[-1]) / len(record.seconds) for record in records], ".2f"),
        _mean([_latest(record, race.window) for record in records], ".4g"),
        _mean([_latest(record, race.window, fewest) for record in records], ".4g"),
        _mean([_validation_at(record, steps) for record, steps in hits], ".4f"),
        _mean([float(record.validation[-1]) for record in records], ".4f"),
        _mean([float(best(record.validation)) for record in records], ".4f"),
        _mean([record.state_bytes / 1e6 for record in records[:1]], ".3g"),
        str(len(outcome.diverged(method))),
    ]


def _notes(outcome: RaceOutcome) -> str:
    race = outcome.study
    metric = "accuracy" if WORKLOADS[race.race.workload].higher_is_better else "loss"
    return (
        f"\nEvery method runs {len(race.candidates(race.methods[0]))} configurations for {race.tuning:g} s each, then "
        "the one with the lowest mean loss over the last tenth of its iterations for "
        f"{race.budget:g} s with each of {race.seeds} seeds; mean ± standard deviation. {UNTUNED} is not tuned. "
        f"Evaluation does not count as time. Loss: mean over the last {race.race.window} mini-batches. "
        f"Validation: {metric}. Reached: runs that reached the target in time; "
        "seconds and steps are those of these runs. Diverged: number of runs, tuning included.\n"
    )


def _fewest(outcome: RaceOutcome) -> int:
    """Return the number of steps that every compared run has taken."""
    records = [record for method in outcome.study.methods for record in outcome.compared(method)]
    return min((len(record.cost) for record in records), default=0)


def _latest(record: Record, window: int, steps: int | None = None) -> float:
    return float(record.cost[:steps][-window:].mean(dtype=float))


def _validation_at(record: Record, steps: int) -> float:
    """Return the first evaluation at or after a step."""
    place = min(bisect_left(record.evaluated, steps), len(record.validation) - 1)
    return float(record.validation[place])


def _mean(values: Sequence[float], specification: str) -> str:
    if not values:
        return ABSENT
    mean = format(float(np.mean(values)), specification)
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.2g}"


def _tuning(outcome: RaceOutcome) -> list[Sequence[object]]:
    lines: list[Sequence[object]] = [["method", "configuration", "score", "steps", "diverged", "chosen"]]
    for method in outcome.study.methods:
        for run in outcome.study.candidates(method):
            record, chosen = outcome.records[run], run == outcome.chosen[method]
            text = described(run.configuration)
            lines.append([method, text, record.score, len(record.cost), record.diverged, chosen])
    return lines


def _curves(outcome: RaceOutcome) -> list[Sequence[object]]:
    """Return the running mean of each run's loss at up to `POINTS` iterations, with the training time so far."""
    window = outcome.study.race.window
    lines: list[Sequence[object]] = [["method", "seed", "iteration", "seconds", "loss"]]
    for run in (run for method in outcome.study.methods for run in outcome.repeats(method)):
        record = outcome.records[run]
        means = running_mean(record.cost, window)
        for index in np.linspace(0, len(means) - 1, min(POINTS, len(means))).astype(int):
            end = index + window
            lines.append([run.method, run.seed, end, f"{record.seconds[end - 1]:.4f}", f"{means[index]:.6g}"])
    return lines
