"""`relfisher bench step`: the cost of an iteration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from relfisher.cli.arguments import check_writable, loaded, number, selected, whole
from relfisher.cli.running import leave

__all__ = ["bench_step"]


def bench_step(
    out: Annotated[Path, typer.Option(help="Tables and numbers go here.")],
    data: Annotated[str, typer.Option(help="The images: mnist5k, mnist, fashion-mnist, or a directory.")] = "mnist5k",
    workloads: Annotated[str | None, typer.Option(help="Comma-separated names; all by default.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all by default.")] = None,
    repeats: Annotated[int, whole("--repeats", "Means of 200 iterations for each method.")] = 5,
    seconds: Annotated[float, number("--seconds", "Time limit of a method on a workload.")] = 30.0,
    threads: Annotated[int | None, whole("--threads", "Threads; all cores by default.", most=1024)] = None,
    growth: Annotated[bool, typer.Option(help="Also measure growth up to a width and a batch of 4096.")] = True,
    peak: Annotated[bool, typer.Option(help="Also measure peak memory, in a process per method.")] = True,
) -> None:
    """Measure the cost of a training iteration with each optimizer, in time and memory."""
    import torch
    from rich.console import Console

    from relfisher.studies.peers import PEERS
    from relfisher.studies.report import shown
    from relfisher.studies.step import Timing, measure, peaks
    from relfisher.studies.step_report import (
        BATCHES,
        BATCHES_WIDTH,
        GROWTH_METHODS,
        HEADER,
        STEP_WORKLOADS,
        WIDTHS,
        report,
        rows,
    )
    from relfisher.studies.workloads import WORKLOADS, Workload, growing

    chosen = selected(workloads, STEP_WORKLOADS, "--workloads")
    peers = {name: PEERS[name] for name in selected(methods, PEERS)}
    loaded(data)
    check_writable(out)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    console = Console()
    found = {}
    for name in chosen:
        with console.status(name):
            timings = measure(WORKLOADS[name], peers, data, repeats=repeats, seconds=seconds)
            found[name] = peaks(name, timings, data) if peak else timings
        console.print(shown(f"{name}: {WORKLOADS[name].title}", HEADER, rows(found[name])))
    both = {name: PEERS[name] for name in GROWTH_METHODS}

    def grown(workload: Workload) -> list[Timing]:
        with console.status(workload.title):
            return measure(workload, both, data, repeats=repeats, seconds=seconds)

    widths = {width: grown(growing(width)) for width in WIDTHS if growth}
    batches = {batch: grown(growing(BATCHES_WIDTH, batch)) for batch in BATCHES if growth}
    leave(report(found, widths, batches), out, repeatable=False)
