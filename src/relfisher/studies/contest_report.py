"""The output of `relfisher bench race --by validation`: the table, all configurations, curves and figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from relfisher.studies.contest import ContestOutcome
from relfisher.studies.contestants import CONTESTANTS, PARTS, RIVALS
from relfisher.studies.figures import STYLE, Look, accuracy_range, frame, label_ends
from relfisher.studies.peers import UNTUNED, described
from relfisher.studies.report import ABSENT, Report, shown, titled
from relfisher.studies.workloads import WORKLOADS

__all__ = ["Course", "courses", "header", "report", "rows", "target"]

LOOKS = {
    "SGD": Look("#8a8a8a", "--"),
    "AdamW": Look("#4d4d4d"),
    "BNB+AdamW": Look("#009e73"),
    "Schedule-Free AdamW": Look("#4d4d4d", ":"),
    "Muon": Look("#0072b2"),
    "averaged Muon": Look("#0072b2", "--"),
    "SOAP": Look("#7b3294"),
    "Shampoo": Look("#7b3294", "--"),
    "K-FAC": Look("#a6761d"),
    "no metric": Look("#e69f00"),
    "RNGD": Look("#d1345b", "--"),
    UNTUNED: Look("#d1345b", width=2.6),
}
BRIEF = (0, 2, 4, 6, 7)
"""The columns that fit into a terminal."""


@dataclass(frozen=True)
class Course:
    """The validation of a method's seeds: its mean, epochs and seconds at each evaluation, and its end.

    `spread` is the standard deviation of the seeds at the best mean.
    """

    epochs: NDArray[np.float64]
    seconds: NDArray[np.float64]
    mean: NDArray[np.float64]
    spread: float
    place: int
    milliseconds: float
    state_bytes: int

    @property
    def best(self) -> float:
        """The best mean."""
        return float(self.mean[self.place])


def courses(outcome: ContestOutcome) -> dict[str, Course]:
    """Return the courses of all methods with runs that did not diverge, by method."""
    return {method: _course(outcome, method) for method in outcome.study.methods if outcome.compared(method)}


def target(outcome: ContestOutcome) -> tuple[str, Course] | None:
    """Return the rival with the best mean validation, and its course; None without rivals."""
    found = {method: course for method, course in courses(outcome).items() if method in RIVALS}
    if not found:
        return None
    sign = 1 if outcome.study.higher_is_better else -1
    best = max(found, key=lambda method: sign * found[method].best)
    return best, found[best]


def header(outcome: ContestOutcome) -> list[str]:
    """Return the column names of `rows`."""
    goal = target(outcome)
    reached = "target" if goal is None else _text(outcome, goal[1].best)
    return [
        "method",
        "configuration",
        "best validation",
        "± over seeds",
        "at the end",
        "epoch of the best",
        f"epochs to {reached}",
        f"s to {reached}",
        "s in all",
        "ms/step",
        "state MB",
        "diverged",
    ]


def rows(outcome: ContestOutcome) -> list[list[str]]:
    """Summarize a race.

    Args:
        outcome: the finished race.

    Returns:
        One row per method, with the columns of `header`.
    """
    goal, found = target(outcome), courses(outcome)
    return [_row(outcome, method, found.get(method), goal) for method in outcome.study.methods]


def report(outcome: ContestOutcome, notes: Mapping[str, str]) -> Report:
    """Report the results.

    Args:
        outcome: the finished race.
        notes: the reasons why methods of the race did not take part.

    Returns:
        The table, configurations, curves and figure.
    """
    study, names, table = outcome.study, header(outcome), rows(outcome)
    title = _title(outcome)
    return Report(
        table=titled(title, names, table, notes, _notes(outcome)),
        about={
            "settings": asdict(study.options),
            "seeds": study.seeds,
            "grids": {method: dict(CONTESTANTS[method].grid) for method in study.methods},
            "scheduled": [method for method in study.methods if CONTESTANTS[method].scheduled],
            "chosen": {method: best and best.configuration for method, best in outcome.chosen.items()},
            "absent": dict(notes),
        },
        threads=[record.threads for record in outcome.records.values()],
        figures={"race": figure(outcome)},
        terminal=shown(title, [names[place] for place in BRIEF], [[row[place] for place in BRIEF] for row in table]),
        files={"tuning.csv": _tuning(outcome), "curves.csv.gz": _curves(outcome)},
    )


def figure(outcome: ContestOutcome) -> Figure:
    """Draw validation against epochs and against seconds, without the parts other than the metric.

    Args:
        outcome: the finished race; methods without a converged run are omitted.

    Returns:
        The figure.
    """
    study, goal = outcome.study, target(outcome)
    scale = 100 if study.higher_is_better else 1
    drawn = {method: course for method, course in courses(outcome).items() if method in LOOKS}
    with mpl.rc_context(STYLE):
        made = Figure(figsize=(12, 5.2), dpi=150)
        left, right = made.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.75})
        for method, course in drawn.items():
            look = LOOKS[method]
            for axes, x in ((left, course.epochs), (right, course.seconds)):
                axes.plot(x, scale * course.mean, color=look.color, linestyle=look.dashes, linewidth=look.width)
        if drawn:
            for axes in (left, right):
                axes.set_xlim(left=0)
            left.margins(x=0)
            left.set_ylim(_range([scale * course.mean for course in drawn.values()], study.higher_is_better))
            label_ends(left, LOOKS, {method: scale * course.mean[-1] for method, course in drawn.items()})
        if goal is not None:
            for axes in (left, right):
                axes.axhline(scale * goal[1].best, color="#555555", linewidth=1, linestyle=":")
        left.set(xlabel="epoch", ylabel="validation accuracy (%)" if study.higher_is_better else "validation loss")
        right.set(xlabel="training time (seconds)")
        right.tick_params(labelleft=True)
        frame(made, _title(outcome), _caption(outcome))
    return made


def _range(curves: list[NDArray[np.float64]], higher_is_better: bool) -> tuple[float, float]:
    """Return the range of the axis; that of losses is the one of accuracies, upside down."""
    if higher_is_better:
        return accuracy_range(curves)
    low, high = accuracy_range([-curve for curve in curves])
    return -high, -low


def _course(outcome: ContestOutcome, method: str) -> Course:
    records = outcome.compared(method)
    options = outcome.study.options
    validation = np.array([record.validation for record in records])
    mean = validation.mean(0)
    place = int(mean.argmax() if outcome.study.higher_is_better else mean.argmin())
    evaluated = np.array(records[0].evaluated)
    return Course(
        epochs=evaluated / (options.samples // options.batch_size),
        seconds=np.mean([record.seconds[evaluated - 1] for record in records], axis=0),
        mean=mean,
        spread=float(validation[:, place].std(ddof=1)) if len(records) > 1 else 0.0,
        place=place,
        milliseconds=float(np.mean([1e3 * record.seconds[-1] / len(record.seconds) for record in records])),
        state_bytes=records[0].state_bytes,
    )


def _row(outcome: ContestOutcome, method: str, course: Course | None, goal: tuple[str, Course] | None) -> list[str]:
    chosen, diverged = outcome.chosen[method], str(len(outcome.diverged(method)))
    if course is None or chosen is None:
        return [method, "all diverged", *[ABSENT] * (len(header(outcome)) - 3), diverged]
    hit = None if goal is None else _first(course.mean, goal[1].best, outcome.study.higher_is_better)
    return [
        method,
        described(chosen.configuration),
        _text(outcome, course.best),
        _text(outcome, course.spread),
        _text(outcome, float(course.mean[-1])),
        f"{course.epochs[course.place]:.3g}",
        ABSENT if hit is None else f"{course.epochs[hit]:.3g}",
        ABSENT if hit is None else f"{course.seconds[hit]:.1f}",
        f"{course.seconds[-1]:.1f}",
        f"{course.milliseconds:.2f}",
        f"{course.state_bytes / 1e6:.3g}",
        diverged,
    ]


def _first(mean: NDArray[np.float64], goal: float, higher_is_better: bool) -> int | None:
    """Return the first evaluation that is at least as good as a goal."""
    (hits,) = np.nonzero(mean >= goal if higher_is_better else mean <= goal)
    return int(hits[0]) if len(hits) else None


def _text(outcome: ContestOutcome, value: float) -> str:
    return f"{100 * value:.2f}" if outcome.study.higher_is_better else f"{value:.4g}"


def _title(outcome: ContestOutcome) -> str:
    options = outcome.study.options
    return f"{WORKLOADS[options.workload].title}, {options.samples:,} samples of {options.data}"


def _caption(outcome: ContestOutcome) -> str:
    return (
        f"Mean over {outcome.study.seeds} seeds. Each peer with the best of its configurations, and RNGD; {UNTUNED} "
        "and RNGD with no metric are not tuned. Dotted: the best of the peers."
    )


def _notes(outcome: ContestOutcome) -> str:
    study = outcome.study
    measure = "accuracy in percent" if study.higher_is_better else "loss"
    each = {len(CONTESTANTS[method].configurations) for method in _tuned(study.methods)}
    return (
        f"\nValidation: {measure}, mean over {study.seeds} seeds, measured "
        f"{study.options.epochs * study.options.evaluations} times in {study.options.epochs} epochs. Tuned methods "
        f"have {' or '.join(map(str, sorted(each))) or 'no'} configurations each, chosen by the best validation of the "
        "first seed. Peers have a cosine to 0, but for Schedule-Free AdamW and averaged Muon; RNGD has none, unless "
        f"its name says so. {UNTUNED}, and the lines below RNGD, which change one part of it, are not tuned. "
        "Evaluation does not count as time.\n"
    )


def _tuned(methods: Iterable[str]) -> list[str]:
    return [method for method in methods if method not in PARTS and method != UNTUNED]


def _tuning(outcome: ContestOutcome) -> list[Sequence[object]]:
    lines: list[Sequence[object]] = [["method", "configuration", "best validation", "last", "diverged", "chosen"]]
    for method in outcome.study.methods:
        for run in outcome.study.candidates(method):
            record, score = outcome.records[run], outcome.study.score(outcome.records[run])
            text = described(run.configuration)
            last = record.validation[-1] if len(record.validation) else ""
            lines.append([method, text, abs(score), last, record.diverged, run == outcome.chosen[method]])
    return lines


def _curves(outcome: ContestOutcome) -> list[Sequence[object]]:
    """Return each run's validation at its evaluations, with the training time so far."""
    lines: list[Sequence[object]] = [["method", "seed", "iteration", "seconds", "validation"]]
    for run in (run for method in outcome.study.methods for run in outcome.repeats(method)):
        record = outcome.records[run]
        for end, value in zip(record.evaluated, record.validation, strict=True):
            lines.append([run.method, run.seed, end, f"{record.seconds[end - 1]:.4f}", f"{value:.6g}"])
    return lines
