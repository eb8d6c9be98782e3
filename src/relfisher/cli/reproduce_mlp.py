"""`relfisher reproduce mlp`: figure 5."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from relfisher.cli.arguments import ArgumentError, check_writable, loaded, selected, whole
from relfisher.cli.running import carried_out, leave

__all__ = ["reproduce_mlp"]


def reproduce_mlp(
    out: Annotated[Path, typer.Option(help="Results go here; runs already finished there are kept.")],
    data: Annotated[str, typer.Option(help="mnist5k, mnist, fashion-mnist, or a directory of IDX files.")] = "mnist5k",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer epochs: two minutes on mnist5k.")] = False,
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all by default.")] = None,
    seeds: Annotated[int, whole("--seeds", "Seeds for each method's chosen learning rate.")] = 1,
    epochs: Annotated[int | None, whole("--epochs", "Passes over the training images.")] = None,
    lr: Annotated[
        list[str] | None, typer.Option(metavar="METHOD=VALUE[,VALUE...]", help="Replace a learning-rate grid.")
    ] = None,
    jobs: Annotated[int, whole("--jobs", "Worker processes.")] = 1,
) -> None:
    """Train the paper's 784-64-64-64-10 network with every method of figure 5."""
    import torch

    from relfisher.studies.mlp import METHODS, carry_out_run, plan
    from relfisher.studies.mlp_report import report
    from relfisher.studies.runs import Record

    names = selected(methods, METHODS)
    grids = _grids(lr or [], names)
    dataset = loaded(data)
    check_writable(out)
    study = plan(dataset, methods=names, quick=quick, epochs=epochs, seeds=seeds, grids=grids)
    # Layers this narrow gain nothing from a second thread, and worker processes have one each as well.
    torch.set_num_threads(1)
    outcome = carried_out(study, partial(carry_out_run, data), Record.of, out, jobs)
    leave(report(outcome, dataset), out, jobs)


def _grids(entries: list[str], selected: tuple[str, ...]) -> dict[str, tuple[float, ...]]:
    grids: dict[str, tuple[float, ...]] = {}
    for entry in entries:
        name, _, values = entry.partition("=")
        method = name.strip().upper()
        if method not in selected:
            raise ArgumentError("--lr", f"{name!r} is not a method of this run, allowed are {', '.join(selected)}")
        if method in grids:
            raise ArgumentError("--lr", f"{name!r} is given twice, allowed is one grid of several values")
        grids[method] = tuple(dict.fromkeys(_learning_rate(entry, value) for value in values.split(",")))
    return grids


def _learning_rate(entry: str, text: str) -> float:
    from relfisher.validation import LARGEST_RATE

    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LARGEST_RATE:
        wrong = f"{text!r} in {entry!r} is not a learning rate" if text.strip() else f"{entry!r} lacks a learning rate"
        raise ArgumentError("--lr", f"{wrong}, allowed are numbers above 0, up to {LARGEST_RATE:g}")
    return value
