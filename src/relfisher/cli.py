"""The command line. Errors are one line that names the argument; torch is imported only once it is needed."""

from __future__ import annotations

import importlib
import math
import os
import shlex
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import relfisher

try:
    import typer
except ImportError:
    sys.exit("relfisher: the command line needs the extra `experiments`: pip install 'relfisher[experiments]'")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from relfisher.studies.data import Dataset
    from relfisher.studies.neuron_study import NeuronStudy
    from relfisher.studies.reproduce import Invocation
    from relfisher.studies.runs import ArrayStore, Record, Run
    from relfisher.studies.study import Study

__all__ = ["main"]

WORKER_STATUS = 1
INTERRUPTED_STATUS = 130

app = typer.Typer(
    help="Relative Fisher information metrics and relative natural gradient descent.", add_completion=False
)
reproduce_app = typer.Typer(help="Repeat the paper's experiments.")
bench_app = typer.Typer(help="Compare with other optimizers.")
data_app = typer.Typer(help="Get the data sets.")
app.add_typer(reproduce_app, name="reproduce")
app.add_typer(bench_app, name="bench")
app.add_typer(data_app, name="data")


def main() -> int:
    """Runs the command that the process was started with.

    Returns:
        The exit status: 0, 1 if a worker process was lost, 2 for a wrong argument, 130 after Ctrl-C.
    """
    command = typer.main.get_command(app)
    try:
        status = command.main(prog_name="relfisher", standalone_mode=False)
    except typer.TyperException as error:
        print("relfisher:", " ".join(error.format_message().split()), file=sys.stderr)
        return error.exit_code
    return status if isinstance(status, int) else 0


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"relfisher {relfisher.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _relfisher(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("plan")
def _plan(
    model: Annotated[str, typer.Option(metavar="MODULE:FACTORY", help="Called without arguments, it returns a model.")],
    inputs: Annotated[
        str | None,
        typer.Option(
            metavar="AxBx...[:N]",
            help="Shape of a batch of floats or, with :N, of whole numbers below N, as 4x9:100 for tokens; not needed "
            "if the factory returns (model, inputs).",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Of what the model returns, a scalar: tells a softmax head."),
    ] = None,
    structure: Annotated[str, typer.Option(help="As for RNGD, for all layers.")] = "auto",
    mebibytes: Annotated[int, typer.Option(min=1, help="What auto may keep of one layer, in MiB.")] = 256,
    samples: Annotated[int, typer.Option(min=0, help="What goes into statistics at most; 0 for all samples.")] = 256,
) -> None:
    """Print what RNGD will keep and compute for each layer of a model, and what other structures would."""
    made = _imported("--model", model)()
    score = None if loss is None else _imported("--loss", loss)
    network, batch = made if isinstance(made, tuple) else (made, None)
    import torch

    if not isinstance(network, torch.nn.Module):
        raise _wrong(
            "--model", f"{model} must return a torch.nn.Module or (model, inputs), got {type(network).__name__}"
        )
    from relfisher.optim.assignment import check_rules

    if inputs is not None:
        shape, limit = _batch_shape(inputs)
        if limit is None:
            batch = torch.randn(shape)
        else:  # from N - 1, the first that an embedding of fewer rows lacks, down to 0 and around
            batch = torch.arange(-1, -1 - math.prod(shape), -1).remainder(limit).view(shape)
    if batch is None:
        raise _wrong("--inputs", f"{model} returns no inputs: give the shape of a batch, such as 50x784")
    try:
        check_rules(structure, ())
    except ValueError as error:
        raise _wrong("--structure", str(error)) from error
    try:
        print(relfisher.plan(network, batch, structure, mebibytes << 20, score, samples or None))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        remedy = "give the shape it takes, with :N for whole numbers below N, or let the factory return (model, inputs)"
        raise _wrong("--inputs", f"the model cannot be called with them: {error}; {remedy}") from error


def _imported(option: str, spec: str) -> Callable[..., Any]:
    """Return what is given as MODULE:NAME; modules of the working directory count."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise _wrong(option, f"{spec!r} is not of the form MODULE:NAME")
    sys.path.insert(0, os.getcwd())
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _wrong(option, str(error)) from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise _wrong(option, f"{spec} must be callable, got {type(found).__name__}")
    return found


def _batch_shape(text: str) -> tuple[tuple[int, ...], int | None]:
    """Return the shape of a batch, and what its whole numbers are below; None for floats."""
    shape, colon, limit = text.lower().partition(":")
    parts = shape.split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in [*parts, *([limit] if colon else [])]):
        allowed = "whole numbers joined by x, such as 50x784, and :N for whole numbers below N, such as 4x9:100"
        raise _wrong("--inputs", f"{text!r} is not a shape, allowed are {allowed}")
    return tuple(map(int, parts)), int(limit) if colon else None


@reproduce_app.callback()
def _reproduce() -> None:
    pass


@bench_app.callback()
def _bench() -> None:
    pass


@data_app.callback()
def _data() -> None:
    pass


@data_app.command("fetch")
def _fetch(
    name: Annotated[str, typer.Argument(help="mnist or fashion-mnist.")],
    base_url: Annotated[str | None, typer.Option(help="Fetch the files from here instead.")] = None,
) -> None:
    """Download a data set into the cache and check its hashes."""
    from rich.console import Console

    from relfisher.studies.data import DataError, fetch
    from relfisher.studies.progress import DownloadDisplay

    console = Console(stderr=True)
    try:
        directory = fetch(name, base_url=base_url, bar=DownloadDisplay(console) if console.is_terminal else None)
    except DataError as error:
        raise _wrong("NAME", str(error)) from error
    print(directory)


@reproduce_app.command("mlp")
def _mlp(
    out: Annotated[Path, typer.Option(help="Results go here; runs already finished there are kept.")],
    data: Annotated[str, typer.Option(help="mnist5k, mnist, fashion-mnist, or a directory of IDX files.")] = "mnist5k",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer epochs: two minutes on mnist5k.")] = False,
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all by default.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each method's chosen learning rate.")] = 1,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training images.")] = None,
    lr: Annotated[
        list[str] | None, typer.Option(metavar="METHOD=VALUE[,VALUE...]", help="Replace a learning-rate grid.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
) -> None:
    """Train the paper's 784-64-64-64-10 network with every method of figure 5."""
    from relfisher.studies.mlp import METHODS
    from relfisher.studies.reproduce import Invocation, plan

    selected = _selected(methods, METHODS)
    grids = dict(_grid(entry, selected) for entry in lr or ())
    dataset = _loaded(data)
    _check_writable(out)
    study = plan(dataset, methods=selected, quick=quick, epochs=epochs, seeds=seeds, grids=grids)
    _run(study, dataset, data, out, Invocation(_command(), jobs))


@reproduce_app.command("neuron")
def _neuron(
    out: Annotated[Path, typer.Option(help="Results go here; what is already finished there is kept.")],
    data: Annotated[str, typer.Option(help="mnist5k, mnist, fashion-mnist, or a directory of IDX files.")] = "mnist5k",
    pair: Annotated[
        list[str] | None, typer.Option(metavar="A,B", help="Two classes; again for more. 3,5 and 4,9 by default.")
    ] = None,
    size: Annotated[
        list[str] | None, typer.Option(metavar="N|all", help="Images of both classes; again for more. 2 by default.")
    ] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all by default.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Initial weights, and subsets, for each configuration.")] = 10,
    epochs: Annotated[int, typer.Option(min=1, help="Full-batch steps.")] = 100,
    initial_std: Annotated[float, typer.Option(min=0, help="Standard deviation of the initial weights.")] = 0.01,
) -> None:
    """Train the paper's single sigmoid neuron with the four methods of figure 4."""
    from relfisher.studies.neuron import METHODS
    from relfisher.studies.neuron_study import PanelError, panels, plan

    selected = _selected(methods, METHODS)
    pairs = [_pair(text) for text in pair] if pair else None
    sizes = [_size(text) for text in size] if size else None
    dataset = _loaded(data)
    try:
        chosen = panels(dataset, pairs, sizes)
    except PanelError as error:
        raise _wrong(f"--{error.argument}", str(error)) from error
    _check_writable(out)
    study = plan(dataset, chosen, methods=selected, runs=runs, epochs=epochs, initial_std=initial_std)
    _run_neuron(study, dataset, out)


@bench_app.command("step")
def _step(
    out: Annotated[Path, typer.Option(help="Tables and numbers go here.")],
    data: Annotated[str, typer.Option(help="The images: mnist5k, mnist, fashion-mnist, or a directory.")] = "mnist5k",
    workloads: Annotated[str | None, typer.Option(help="Comma-separated names; all by default.")] = None,
    methods: Annotated[str | None, typer.Option(help="Comma-separated names; all by default.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Means of 200 iterations for each method.")] = 5,
    seconds: Annotated[float, typer.Option(min=0, help="What a method may use on a workload.")] = 30.0,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; all cores by default.")] = None,
    growth: Annotated[bool, typer.Option(help="Follow the cost to a width and a batch of 4096, too.")] = True,
    peak: Annotated[bool, typer.Option(help="Measure peak memory, too, in a process a method.")] = True,
) -> None:
    """Measure what a training iteration costs with each optimizer, in time and memory."""
    import torch
    from rich.console import Console

    from relfisher.studies.bench.peers import PEERS
    from relfisher.studies.bench.report import shown
    from relfisher.studies.bench.step import Cell, measure, peaks
    from relfisher.studies.bench.step_report import (
        BATCHES,
        BATCHES_WIDTH,
        GROWTH_METHODS,
        HEADER,
        STEP_WORKLOADS,
        WIDTHS,
        rows,
        write_steps,
    )
    from relfisher.studies.bench.workloads import WORKLOADS, Workload, growing
    from relfisher.studies.reproduce import Invocation

    chosen = _selected(workloads, STEP_WORKLOADS, "--workloads")
    peers = {name: PEERS[name] for name in _selected(methods, PEERS)}
    _loaded(data)
    _check_writable(out)
    torch.set_num_threads(threads or os.cpu_count() or 1)
    console = Console()
    found = {}
    for name in chosen:
        with console.status(name):
            cells = measure(WORKLOADS[name], peers, data, repeats=repeats, seconds=seconds)
            found[name] = peaks(name, cells, data) if peak else cells
        console.print(shown(f"{name}: {WORKLOADS[name].title}", HEADER, rows(found[name])))
    both = {name: PEERS[name] for name in GROWTH_METHODS}

    def grown(workload: Workload) -> list[Cell]:
        with console.status(workload.title):
            return measure(workload, both, data, repeats=repeats, seconds=seconds)

    widths = {width: grown(growing(width)) for width in WIDTHS if growth}
    batches = {batch: grown(growing(BATCHES_WIDTH, batch)) for batch in BATCHES if growth}
    for path in write_steps(found, widths, batches, Invocation(_command(), jobs=1), out):
        print(path)


@bench_app.command("race")
def _race(
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

    (name,) = _selected(name, RACES, "NAME")
    race = RACES[name]
    notes, taking_part = available(_selected(methods, race.methods), WORKLOADS[race.workload])
    for method, note in notes.items():
        print(f"relfisher: {method} is left out, {note}", file=sys.stderr)
    seconds = budget or race.budget
    _loaded(data)
    _check_writable(out)
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
    with _resumable(store), Display(console, planned.planned) as display:
        outcome = carry_out(planned, Racer(data), store, jobs=jobs, watcher=display)
    _tell({**outcome.tuned, **outcome.records})
    table, picture = write_race(outcome, notes, Invocation(_command(), jobs), out)
    console.print(shown(title(outcome), header(outcome), rows(outcome)))
    print(f"table:   {table}\npicture: {picture}")


def _run_neuron(study: NeuronStudy, dataset: Dataset, out: Path) -> None:
    from rich.console import Console

    from relfisher.studies.neuron_results import write_neuron_results
    from relfisher.studies.neuron_study import carry_out
    from relfisher.studies.neuron_tables import claims_markdown, summary
    from relfisher.studies.progress import Display
    from relfisher.studies.reproduce import Invocation
    from relfisher.studies.runs import ArrayStore

    console = Console()
    store = ArrayStore(out / "runs")
    with _resumable(store), Display(console, len(study.batches)) as display:
        outcome = carry_out(study, dataset, store, display)
    invocation = Invocation(_command(), jobs=1)
    table, picture = write_neuron_results(outcome, dataset, invocation, out)
    console.print(summary(outcome))
    print(f"{claims_markdown(outcome)}table:   {table}\npicture: {picture}")


def _run(study: Study, dataset: Dataset, source: str, out: Path, invocation: Invocation) -> None:
    import torch
    from rich.console import Console

    from relfisher.studies.mlp import Trainer
    from relfisher.studies.progress import Display, summary
    from relfisher.studies.reproduce import write_results
    from relfisher.studies.runs import RunStore
    from relfisher.studies.study import carry_out
    from relfisher.studies.tables import rows

    console = Console()
    store = RunStore(out / "runs")
    # Layers this narrow gain nothing from a second thread, and worker processes have one each too.
    torch.set_num_threads(1)
    with _resumable(store), Display(console, study.planned) as display:
        outcome = carry_out(study, Trainer(source), store, jobs=invocation.jobs, watcher=display)
    _tell(outcome.records)
    table, picture = write_results(outcome, dataset, invocation, out)
    console.print(summary(rows(outcome)))
    print(f"table:   {table}\npicture: {picture}")


@contextmanager
def _resumable(store: ArrayStore) -> Iterator[None]:
    """Says how to go on after an interruption, and at the end which files were damaged."""
    from relfisher.studies.jobs import WorkerError

    try:
        yield
    except KeyboardInterrupt as error:
        missing = f"the same command goes on with the runs missing in {store.directory}"
        print(f"relfisher: stopped; {missing}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED_STATUS) from error
    except WorkerError as error:
        print(f"relfisher: {error}; the same command goes on with what is missing", file=sys.stderr)
        raise typer.Exit(WORKER_STATUS) from error
    for path in store.damaged:
        print(f"relfisher: {path} was unreadable, its run was done again", file=sys.stderr)


def _tell(records: Mapping[Run, Record]) -> None:
    messages = {message: run for run, record in records.items() for message in record.warnings}
    for message, run in messages.items():
        print(f"relfisher: warning in {run}: {message}", file=sys.stderr)


def _command() -> str:
    return shlex.join(["relfisher", *sys.argv[1:]])


def _loaded(source: str) -> Dataset:
    from relfisher.studies.data import DataError, load

    try:
        return load(source)
    except DataError as error:
        raise _wrong("--data", str(error)) from error


def _selected(chosen: str | None, known: Iterable[str], option: str = "--methods") -> tuple[str, ...]:
    if chosen is None:
        return tuple(known)
    spelled = {name.upper(): name for name in known}
    names = tuple(dict.fromkeys(name.strip().upper() for name in chosen.split(",")))
    kind = option.strip("-").removesuffix("s").lower()
    for name in names:
        if name not in spelled:
            raise _wrong(option, f"{name!r} is not a {kind}, allowed are {', '.join(spelled.values())}")
    return tuple(spelled[name] for name in names)


def _pair(text: str) -> tuple[int, int]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise _wrong("--pair", f"{text!r} is not a pair of classes, allowed are two numbers such as 3,5")
    return int(parts[0]), int(parts[1])


def _size(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdecimal():
        raise _wrong("--size", f"{text!r} is not a number of images, allowed are whole numbers and all")
    return int(text)


def _grid(entry: str, selected: tuple[str, ...]) -> tuple[str, tuple[float, ...]]:
    name, _, values = entry.partition("=")
    method = name.strip().upper()
    if method not in selected:
        raise _wrong("--lr", f"{name!r} is not a method of this run, allowed are {', '.join(selected)}")
    return method, tuple(dict.fromkeys(_learning_rate(value) for value in values.split(",")))


def _learning_rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise _wrong("--lr", f"{text!r} is not a learning rate, allowed are finite numbers above 0")
    return value


def _check_writable(out: Path) -> None:
    try:
        for directory in (out, out / "runs"):
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
    except OSError as error:
        message = f"cannot write to {out}: {error.strerror}; allowed is a directory that can be made or written to"
        raise _wrong("--out", message) from error


def _wrong(argument: str, message: str) -> typer.BadParameter:
    return typer.BadParameter(message, param_hint=argument)
