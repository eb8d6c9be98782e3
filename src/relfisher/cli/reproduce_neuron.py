"""`relfisher reproduce neuron`: figure 4."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from relfisher.cli.arguments import DIGITS, ArgumentError, check_writable, loaded, number, selected, whole
from relfisher.cli.running import carried_out, leave

__all__ = ["reproduce_neuron"]


def reproduce_neuron(
    out: Annotated[Path, typer.Option(help="Results go here; batches already finished there are kept.")],
    data: Annotated[str, typer.Option(help="mnist5k, mnist, fashion-mnist, or a directory of IDX files.")] = "mnist5k",
    pair: Annotated[
        list[str] | None,
        typer.Option(metavar="A,B", help="Two classes; repeatable. For digits, 3,5 and 4,9 by default."),
    ] = None,
    size: Annotated[
        list[str] | None,
        typer.Option(metavar="N|all", help="Images in total; repeatable. A subset and all by default."),
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all by default.")] = None,
    runs: Annotated[int, whole("--runs", "Initial weights, and subsets, for each configuration.")] = 10,
    epochs: Annotated[int, whole("--epochs", "Full-batch steps.")] = 100,
    initial_std: Annotated[
        float, number("--initial-std", "Standard deviation of the initial weights.", above=False)
    ] = 0.01,
) -> None:
    """Train the paper's single sigmoid neuron with the four methods of figure 4."""
    from relfisher.studies.neuron import METHODS, Curves, plan, solve
    from relfisher.studies.neuron_report import report
    from relfisher.studies.panels import PanelError, panels

    names = selected(methods, METHODS)
    pairs = [_pair(text) for text in pair] if pair else None
    sizes = [_size(text) for text in size] if size else None
    dataset = loaded(data)
    try:
        chosen = panels(dataset, pairs, sizes)
    except PanelError as error:
        raise ArgumentError(f"--{error.argument}", str(error)) from error
    check_writable(out)
    study = plan(dataset, chosen, methods=names, runs=runs, epochs=epochs, initial_std=initial_std)
    outcome = carried_out(study, partial(solve, dataset), Curves.of, out)
    leave(report(outcome, dataset), out)


def _pair(text: str) -> tuple[int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(map(DIGITS.fullmatch, parts)):
        raise ArgumentError("--pair", f"{text!r} is not a pair of classes, allowed are two numbers such as 3,5")
    return int(parts[0]), int(parts[1])


def _size(text: str) -> int | None:
    if text == "all":
        return None
    if not DIGITS.fullmatch(text):
        raise ArgumentError("--size", f"{text!r} is not a number of images, allowed are whole numbers and all")
    return int(text)
