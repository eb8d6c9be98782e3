"""The command line. Errors are one line that names the argument; torch is imported only when it is needed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import relfisher

try:
    import typer
except ImportError:
    sys.exit("relfisher: the command line needs the extra `experiments`: pip install 'relfisher[experiments]'")

from relfisher.cli.bench_race import bench_race
from relfisher.cli.bench_step import bench_step
from relfisher.cli.data_fetch import data_fetch
from relfisher.cli.plan import plan
from relfisher.cli.reproduce_mlp import reproduce_mlp
from relfisher.cli.reproduce_neuron import reproduce_neuron

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["main"]

PURPOSES = {
    "reproduce": "Repeat the paper's experiments.",
    "bench": "Compare with other optimizers.",
    "data": "Get the data sets.",
}
COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "reproduce mlp": reproduce_mlp,
    "reproduce neuron": reproduce_neuron,
    "bench step": bench_step,
    "bench race": bench_race,
    "data fetch": data_fetch,
}

app = typer.Typer(
    help="Relative Fisher information metrics and relative natural gradient descent.", add_completion=False
)
groups = {"": app} | {name: typer.Typer(help=purpose) for name, purpose in PURPOSES.items()}
for path, run in COMMANDS.items():
    group, _, name = path.rpartition(" ")
    groups[group].command(name)(run)
for name in PURPOSES:
    # With a callback, a group of a single command stays a group.
    groups[name].callback()(lambda: None)
    app.add_typer(groups[name], name=name)


def main() -> int:
    """Run the command of this process.

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
