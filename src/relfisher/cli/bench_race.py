"""`relfisher bench race`: the time to a loss."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from relfisher.cli.arguments import check_writable, loaded, number, selected, whole
from relfisher.cli.output import tell
from relfisher.cli.running import carried_out, leave

__all__ = ["bench_race"]


def bench_race(
    name: Annotated[str, typer.Argument(help="mlp, mlp-tanh, mlp-sigmoid, autoencoder, cnn or transformer.")],
    out: Annotated[Path, typer.Option(help="Results go here; runs already finished there are kept.")],
    data: Annotated[str, typer.Option(help="The images: mnist5k, mnist, fashion-mnist, or a directory.")] = "mnist5k",
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all of the race by default.")] = None,
    seeds: Annotated[int, whole("--seeds", "Runs of each method's chosen configuration.")] = 3,
    budget: Annotated[float | None, number("--budget", "Training seconds per run.")] = None,
    tuning: Annotated[float | None, number("--tuning", "Seconds per tuning run; a sixth by default.")] = None,
    threads: Annotated[int | None, whole("--threads", "Threads of a run; all cores by default.", most=1024)] = None,
    jobs: Annotated[int, whole("--jobs", "Concurrent runs; more than one distorts the times.")] = 1,
) -> None:
    """Race optimizers to a training loss, all with equal tuning time."""
    from relfisher.studies.race import RACES, available, carry_out_run, plan
    from relfisher.studies.race_report import report
    from relfisher.studies.runs import Record
    from relfisher.studies.workloads import WORKLOADS

    (name,) = selected(name, RACES, "name")
    race = RACES[name]
    notes, taking_part = available(selected(methods, race.methods), WORKLOADS[race.workload])
    for method, note in notes.items():
        tell(f"{method} is left out, {note}")
    seconds = budget or race.budget
    loaded(data)
    check_writable(out)
    study = plan(
        name,
        data,
        methods=taking_part,
        seeds=seeds,
        tuning=tuning or seconds / 6,
        budget=seconds,
        threads=threads or os.cpu_count() or 1,
    )
    outcome = carried_out(study, partial(carry_out_run, data), Record.of, out, jobs)
    leave(report(outcome, notes), out, jobs)
