"""The command line. Errors are one line that names the argument; torch is imported only once it is needed."""

from __future__ import annotations

import importlib
import math
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import relfisher

try:
    import typer
except ImportError:
    sys.exit("relfisher: the command line needs the extra `experiments`: pip install 'relfisher[experiments]'")

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relfisher.experiments.data import Dataset
    from relfisher.experiments.neuron_study import NeuronStudy
    from relfisher.experiments.reproduce import Invocation
    from relfisher.experiments.runs import ArrayStore
    from relfisher.experiments.study import Outcome, Study

__all__ = ["main"]

WORKER_STATUS = 1
INTERRUPTED_STATUS = 130

app = typer.Typer(
    help="Relative Fisher information metrics and relative natural gradient descent.", add_completion=False
)
reproduce_app = typer.Typer(help="Repeat the paper's experiments.")
data_app = typer.Typer(help="Get the data sets.")
app.add_typer(reproduce_app, name="reproduce")
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
        typer.Option(metavar="AxBx...", help="Shape of a batch; not needed if the factory returns (model, inputs)."),
    ] = None,
    structure: Annotated[str, typer.Option(help="As for RNGD, for all layers.")] = "auto",
    mebibytes: Annotated[int, typer.Option(min=1, help="What auto may keep of one layer, in MiB.")] = 256,
) -> None:
    """Print what RNGD will keep and compute for each layer of a model, and what other structures would."""
    made = _made(model)
    network, batch = made if isinstance(made, tuple) else (made, None)
    import torch

    if not isinstance(network, torch.nn.Module):
        raise _wrong(
            "--model", f"{model} must return a torch.nn.Module or (model, inputs), got {type(network).__name__}"
        )
    if inputs is not None:
        batch = torch.randn(_shape(inputs))
    if batch is None:
        raise _wrong("--inputs", f"{model} returns no inputs: give the shape of a batch, such as 50x784")
    try:
        print(relfisher.plan(network, batch, structure, mebibytes << 20))
    except ValueError as error:
        raise _wrong("--structure", str(error)) from error
    except (RuntimeError, TypeError) as error:
        raise _wrong("--inputs", f"the model cannot be called with them: {error}") from error


def _made(spec: str) -> object:
    """Return what a factory, given as MODULE:NAME, returns; modules of the working directory count."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise _wrong("--model", f"{spec!r} is not of the form MODULE:FACTORY")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _wrong("--model", str(error)) from error
    finally:
        sys.path.pop(0)
    return factory()


def _shape(text: str) -> tuple[int, ...]:
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise _wrong("--inputs", f"{text!r} is not a shape, allowed are whole numbers joined by x, such as 50x784")
    return tuple(map(int, parts))


@reproduce_app.callback()
def _reproduce() -> None:
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

    from relfisher.experiments.data import DataError, fetch
    from relfisher.experiments.progress import DownloadDisplay

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
    from relfisher.experiments.data import DataError, load
    from relfisher.experiments.mlp import METHODS
    from relfisher.experiments.reproduce import Invocation, plan

    selected = _selected(methods, METHODS)
    grids = dict(_grid(entry, selected) for entry in lr or ())
    try:
        dataset = load(data)
    except DataError as error:
        raise _wrong("--data", str(error)) from error
    _check_writable(out)
    study = plan(dataset, methods=selected, quick=quick, epochs=epochs, seeds=seeds, grids=grids)
    _run(study, dataset, data, out, Invocation(shlex.join(["relfisher", *sys.argv[1:]]), jobs))


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
    from relfisher.experiments.data import DataError, load
    from relfisher.experiments.neuron import METHODS
    from relfisher.experiments.neuron_study import PanelError, panels, plan

    selected = _selected(methods, METHODS)
    pairs = [_pair(text) for text in pair] if pair else None
    sizes = [_size(text) for text in size] if size else None
    try:
        dataset = load(data)
    except DataError as error:
        raise _wrong("--data", str(error)) from error
    try:
        chosen = panels(dataset, pairs, sizes)
    except PanelError as error:
        raise _wrong(f"--{error.argument}", str(error)) from error
    _check_writable(out)
    study = plan(dataset, chosen, methods=selected, runs=runs, epochs=epochs, initial_std=initial_std)
    _run_neuron(study, dataset, out)


def _run_neuron(study: NeuronStudy, dataset: Dataset, out: Path) -> None:
    from rich.console import Console

    from relfisher.experiments.neuron_results import write_neuron_results
    from relfisher.experiments.neuron_study import carry_out
    from relfisher.experiments.neuron_tables import claims_markdown, summary
    from relfisher.experiments.progress import Display
    from relfisher.experiments.reproduce import Invocation
    from relfisher.experiments.runs import ArrayStore

    console = Console()
    store = ArrayStore(out / "runs")
    try:
        with Display(console, len(study.batches)) as display:
            outcome = carry_out(study, dataset, store, display)
    except KeyboardInterrupt as error:
        raise _stopped(store) from error
    _tell_damaged(store)
    invocation = Invocation(shlex.join(["relfisher", *sys.argv[1:]]), jobs=1)
    table, picture = write_neuron_results(outcome, dataset, invocation, out)
    console.print(summary(outcome))
    print(f"{claims_markdown(outcome)}table:   {table}\npicture: {picture}")


def _run(study: Study, dataset: Dataset, source: str, out: Path, invocation: Invocation) -> None:
    import torch
    from rich.console import Console

    from relfisher.experiments.jobs import WorkerError
    from relfisher.experiments.mlp import Trainer
    from relfisher.experiments.progress import Display, summary
    from relfisher.experiments.reproduce import write_results
    from relfisher.experiments.runs import RunStore
    from relfisher.experiments.study import carry_out
    from relfisher.experiments.tables import rows

    console = Console()
    store = RunStore(out / "runs")
    # Layers this narrow gain nothing from a second thread, and worker processes have one each too.
    torch.set_num_threads(1)
    try:
        with Display(console, study.planned) as display:
            outcome = carry_out(study, Trainer(source), store, jobs=invocation.jobs, watcher=display)
    except KeyboardInterrupt as error:
        raise _stopped(store) from error
    except WorkerError as error:
        print(f"relfisher: {error}; the same command goes on with what is missing", file=sys.stderr)
        raise typer.Exit(WORKER_STATUS) from error
    _tell_damaged(store)
    _tell(outcome)
    table, picture = write_results(outcome, dataset, invocation, out)
    console.print(summary(rows(outcome)))
    print(f"table:   {table}\npicture: {picture}")


def _stopped(store: ArrayStore) -> typer.Exit:
    print(f"relfisher: stopped; the same command goes on with the runs missing in {store.directory}", file=sys.stderr)
    return typer.Exit(INTERRUPTED_STATUS)


def _tell_damaged(store: ArrayStore) -> None:
    for path in store.damaged:
        print(f"relfisher: {path} was unreadable, its run was done again", file=sys.stderr)


def _tell(outcome: Outcome) -> None:
    messages = {message: run for run, record in outcome.records.items() for message in record.warnings}
    for message, run in messages.items():
        print(f"relfisher: warning in {run}: {message}", file=sys.stderr)


def _selected(methods: str | None, known: Iterable[str]) -> tuple[str, ...]:
    if methods is None:
        return tuple(known)
    spelled = {name.upper(): name for name in known}
    names = tuple(dict.fromkeys(name.strip().upper() for name in methods.split(",")))
    for name in names:
        if name not in spelled:
            raise _wrong("--methods", f"{name!r} is not a method, allowed are {', '.join(spelled.values())}")
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
