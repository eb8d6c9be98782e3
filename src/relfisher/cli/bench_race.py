"""`relfisher bench race`: the time to a loss."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from relfisher.cli.arguments import check_writable, loaded, selected
from relfisher.cli.running import command_line, resumable, tell

__all__ = ["bench_race"]


def bench_race(
    name: Annotated[str, typer.Argument(help="mlp, mlp-tanh, mlp-sigmoid, autoencoder, cnn or transformer.")],
    out: Annotated[Path, typer.Option(help="Results go here; runs already finished there are kept.")],
    data: Annotated[str, typer.Option(help="The images: mnist5k, mnist, fashion-mnist, or a directory.")] = "mnist5k",
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all of the race by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method's chosen configuration.")] = 3,
    budget: Annotated[float | None, typer.Option(min=0, help="Training seconds a run.")] = None,
    tuning: Annotated[float | None, typer.Option(min=0, help="Seconds a tuning run; a sixth by default.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of a run; all cores by default.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time; more than one disturbs the seconds.")] = 1,
) -> None:
    """Race optimizers to a training loss, every method tuned as long."""
    from rich.console import Console

    from relfisher.studies.bench.race import RACES, Racer, available, carry_out, plan
    from relfisher.studies.bench.race_report import header, rows, title, write_race
    from relfisher.studies.bench.report import shown
    from relfisher.studies.bench.workloads import WORKLOADS
    from relfisher.studies.progress import Display
    from relfisher.studies.reproduce import Invocation
    from relfisher.studies.runs import RunStore

    (name,) = selected(name, RACES, "NAME")
    race = RACES[name]
    notes, taking_part = available(selected(methods, race.methods), WORKLOADS[race.workload])
    for method, note in notes.items():
        print(f"relfisher: {method} is left out, {note}", file=sys.stderr)
    seconds = budget or race.budget
    loaded(data)
    check_writable(out)
    planned = plan(
        name,
        data,
        methods=taking_part,
        seeds=seeds,
        tuning=tuning or seconds / 6,
        budget=seconds,
        threads=threads or os.cpu_count() or 1,
    )
    console = Console()
    store = RunStore(out / "runs")
    with resumable(store), Display(console, planned.planned) as display:
        outcome = carry_out(planned, Racer(data), store, jobs=jobs, watcher=display)
    tell({**outcome.tuned, **outcome.records})
    table, picture = write_race(outcome, notes, Invocation(command_line(), jobs), out)
    console.print(shown(title(outcome), header(outcome), rows(outcome)))
    print(f"table:   {table}\npicture: {picture}")
