"""The command line. Errors are one line that names the argument; torch is imported only when it is needed."""

from __future__ import annotations

import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Annotated, cast

import relfisher

try:
    import typer
except ImportError:
    sys.exit("relfisher: the command line needs the extra `experiments`: pip install 'relfisher[experiments]'")

from relfisher.cli.bench_race import bench_race
from relfisher.cli.bench_step import bench_step
from relfisher.cli.data_fetch import data_fetch
from relfisher.cli.output import FAILURE_STATUS, Output, failure, tell
from relfisher.cli.plan import plan
from relfisher.cli.reproduce_mlp import reproduce_mlp
from relfisher.cli.reproduce_neuron import reproduce_neuron

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

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
        The exit status: 0, 1 if a file, a worker process, memory or the standard output failed, 2 for a wrong argument,
        130 after Ctrl-C.
    """
    out, errors = Output(sys.stdout), Output(sys.stderr)
    with redirect_stdout(cast("TextIO", out)), redirect_stderr(cast("TextIO", errors)):
        status = _status()
        out.flush()
        if out.failure is not None:
            tell(f"standard output failed: {out.failure.strerror}; files were still written, if the command has any")
            status = status or FAILURE_STATUS
        errors.flush()
    return status


def _status() -> int:
    """Run the command, tell of an error in one line, and return the exit status."""
    command = typer.main.get_command(app)
    try:
        status = command.main(prog_name="relfisher", standalone_mode=False)
    except typer.TyperException as error:
        tell(error.format_message())
        return error.exit_code
    except OSError as error:
        tell(failure(error))
        return FAILURE_STATUS
    except (MemoryError, RuntimeError) as error:
        # The latter is how torch says it.
        if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
            raise
        tell(f"there is not enough memory: {error}")
        return FAILURE_STATUS
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
