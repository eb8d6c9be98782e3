"""`relfisher bench race`: the time to a loss, or the best validation."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from relfisher.cli.arguments import ArgumentError, check_writable, loaded, number, selected, whole
from relfisher.cli.output import tell
from relfisher.cli.running import carried_out, leave

if TYPE_CHECKING:
    from collections.abc import Mapping

    from relfisher.studies.peers import Peer

__all__ = ["bench_race"]

#: The options of each kind of race.
_OPTIONS = {
    "training": ("--budget", "--tuning", "--threads"),
    "validation": ("--epochs", "--samples"),
    "error": ("--budget", "--tuning"),
}


def bench_race(
    name: Annotated[str, typer.Argument(help="A workload, such as mlp; an unknown name lists all.")],
    out: Annotated[Path, typer.Option(help="Results go here; runs already finished there are kept.")],
    by: Annotated[
        str,
        typer.Option(help="training: the time to a loss; validation: the best of equal epochs; error: of an equation."),
    ] = "training",
    data: Annotated[str, typer.Option(help="The images: mnist5k, mnist, fashion-mnist, or a directory.")] = "mnist5k",
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all of the race by default.")] = None,
    seeds: Annotated[int | None, whole("--seeds", "Runs of each method's chosen configuration.")] = None,
    budget: Annotated[float | None, number("--budget", "By training: seconds per run.")] = None,
    tuning: Annotated[float | None, number("--tuning", "By training: seconds to tune; a sixth by default.")] = None,
    threads: Annotated[int | None, whole("--threads", "By training: threads; all cores by default.", most=1024)] = None,
    epochs: Annotated[int | None, whole("--epochs", "By validation: epochs per run.")] = None,
    samples: Annotated[int | None, whole("--samples", "By validation: training samples; 0 for all.", low=0)] = None,
    jobs: Annotated[int, whole("--jobs", "Concurrent runs; more than one distorts the times.")] = 1,
) -> None:
    """Race optimizers to a training loss or to the solution of an equation in equal time, or to the best validation."""
    (by,) = selected(by, tuple(_OPTIONS), "--by")
    given = {
        "--budget": budget,
        "--tuning": tuning,
        "--threads": threads,
        "--epochs": epochs,
        "--samples": samples,
    }
    for option, value in given.items():
        if value is not None and option not in _OPTIONS[by]:
            raise ArgumentError(option, f"{value:g} does not apply to a race by {by}, leave it out")
    if by == "error":
        _by_error(name, out, methods, seeds, budget, tuning, jobs)
    elif by == "validation":
        _by_validation(name, out, data, methods, seeds, epochs, samples, jobs)
    else:
        _by_training(name, out, data, methods, seeds, budget, tuning, threads, jobs)


def _by_training(
    name: str,
    out: Path,
    data: str,
    methods: str | None,
    seeds: int | None,
    budget: float | None,
    tuning: float | None,
    threads: int | None,
    jobs: int,
) -> None:
    from relfisher.studies.peers import PEERS
    from relfisher.studies.race import RACES, carry_out_run, plan
    from relfisher.studies.race_report import report
    from relfisher.studies.runs import Record

    (name,) = selected(name, RACES, "name")
    race = RACES[name]
    notes, taking_part = _available(selected(methods, race.methods), PEERS, race.workload)
    seconds = budget or race.budget
    loaded(data)
    check_writable(out)
    study = plan(
        name,
        data,
        methods=taking_part,
        seeds=seeds or 3,
        tuning=tuning or seconds / 6,
        budget=seconds,
        threads=threads or os.cpu_count() or 1,
    )
    outcome = carried_out(study, partial(carry_out_run, data), Record.of, out, jobs)
    leave(report(outcome, notes), out, jobs)


def _by_validation(
    name: str,
    out: Path,
    data: str,
    methods: str | None,
    seeds: int | None,
    epochs: int | None,
    samples: int | None,
    jobs: int,
) -> None:
    import torch

    from relfisher.studies.contest import CONTESTS, carry_out_run, plan
    from relfisher.studies.contest_report import report
    from relfisher.studies.contestants import CONTESTANTS
    from relfisher.studies.data import DataError
    from relfisher.studies.runs import Record

    (name,) = selected(name, CONTESTS, "name")
    contest = CONTESTS[name]
    loaded(data)
    notes, taking_part = _available(selected(methods, contest.methods), CONTESTANTS, contest.workload)
    check_writable(out)
    try:
        study = plan(name, data, methods=taking_part, seeds=seeds, epochs=epochs, most=samples)
    except DataError as error:
        raise ArgumentError("name", str(error)) from error
    # As in worker processes.
    torch.set_num_threads(1)
    outcome = carried_out(study, partial(carry_out_run, data), Record.of, out, jobs)
    leave(report(outcome, notes), out, jobs)


def _by_error(
    name: str,
    out: Path,
    methods: str | None,
    seeds: int | None,
    budget: float | None,
    tuning: float | None,
    jobs: int,
) -> None:
    import torch

    from relfisher.studies.peers import available
    from relfisher.studies.physics.methods import METHODS
    from relfisher.studies.physics.problems import PROBLEMS
    from relfisher.studies.physics.race import BUDGET, Solved, carry_out_run, plan
    from relfisher.studies.physics.report import report

    (name,) = selected(name, PROBLEMS, "name")
    wanted = selected(methods, METHODS)
    notes, taking_part = available(wanted, METHODS, lambda seed, _: PROBLEMS[name].build(seed))
    _tell_absent(notes)
    check_writable(out)
    seconds = budget or BUDGET
    study = plan(name, methods=taking_part, seeds=seeds or 3, tuning=tuning or seconds / 4, budget=seconds)
    # As in worker processes.
    torch.set_num_threads(1)
    leave(report(carried_out(study, carry_out_run, Solved.of, out, jobs), notes), out, jobs)


def _available(
    methods: tuple[str, ...], peers: Mapping[str, Peer], workload: str
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Tell which methods are not available, and return why, and the names of the others."""
    from relfisher.studies.peers import available
    from relfisher.studies.workloads import WORKLOADS

    notes, taking_part = available(methods, peers, WORKLOADS[workload].build)
    _tell_absent(notes)
    return notes, taking_part


def _tell_absent(notes: Mapping[str, str]) -> None:
    for method, note in notes.items():
        tell(f"{method} is left out, {note}")
