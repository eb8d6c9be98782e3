"""`relfisher plan`: what RNGD will keep and compute for a model."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

import relfisher
from relfisher.cli.arguments import ArgumentError, whole

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

__all__ = ["plan"]

SIZE = re.compile("0*[1-9][0-9]{0,14}")
AXES = 8


def plan(
    model: Annotated[str, typer.Option(metavar="MODULE:FACTORY", help="A function that returns a model.")],
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
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Maps the output to a scalar, to identify a softmax head; under any other loss, as for RNGD, the "
            "units of a head are linear.",
        ),
    ] = None,
    structure: Annotated[str, typer.Option(help="As for RNGD, for all layers.")] = "auto",
    mebibytes: Annotated[int, whole("--mebibytes", "Memory limit of auto for one layer, in MiB.", most=1 << 30)] = 256,
    samples: Annotated[
        int, whole("--samples", "Maximum samples in the statistics; 0 for all.", low=0, most=1 << 30)
    ] = 256,
    world_size: Annotated[
        int, whole("--world-size", "Processes that share out the work, as with replicate=False.", most=1 << 16)
    ] = 1,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="N|MxN", help="N processes of fully_shard, which hold a part each; or M groups with the same parts."
        ),
    ] = None,
    state_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="N|Nx adam", help="Most bytes of the whole state, or of Adam's state, as '1x adam', with auto."
        ),
    ] = None,
) -> None:
    """Print what RNGD will keep and compute for each layer of a model, and the costs of other structures."""
    network, batch = _made(model)
    score = None if loss is None else _scoring(loss)
    from relfisher.optim.assignment import check_rules
    from relfisher.optim.budget import LimitError, check_state_bytes

    if inputs is not None:
        batch = _batch(inputs)
    if batch is None:
        raise ArgumentError("--inputs", f"{model} returns no inputs: give the shape of a batch, such as 50x784")
    try:
        check_rules(structure)
    except ValueError as error:
        raise ArgumentError("--structure", str(error)) from error
    processes = None if mesh is None else _sizes(mesh, most=2)
    if mesh is not None and (processes is None or world_size not in (1, math.prod(processes))):
        allowed = "a number of processes, or two joined by x, such as 2x4 for 2 groups of 4, as many as --world-size"
        raise ArgumentError("--mesh", f"{mesh!r} is not {allowed}")
    limit = int(state_bytes) if state_bytes is not None and SIZE.fullmatch(state_bytes) else state_bytes
    try:
        check_state_bytes(limit)
    except ValueError as error:
        raise ArgumentError("--state-bytes", str(error)) from error
    metric = relfisher.MetricOptions(
        structure=structure, structure_bytes=mebibytes << 20, stats_samples=samples or None
    )
    try:
        planned = relfisher.plan(
            network, batch, metric, score, world_size=world_size, mesh=processes, state_bytes=limit
        )
    except ArgumentError:
        raise
    except LimitError as error:
        raise ArgumentError("--state-bytes", str(error)) from error
    except Exception as error:
        given = "--model" if inputs is None else "--inputs"
        what = f"the inputs that {model} returns" if inputs is None else "them"
        remedy = "give the shape it takes, with :N for whole numbers below N, or let the factory return (model, inputs)"
        raise ArgumentError(given, f"the model cannot be called with {what}: {_named(error)}; {remedy}") from error
    print(planned)


def _made(spec: str) -> tuple[nn.Module, Any]:
    """Return a factory's model and its inputs, or None."""
    factory = _imported("--model", spec)
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise ArgumentError("--model", f"{spec}, called without arguments, raised {_named(error)}") from error
    import torch

    parts = made if isinstance(made, tuple) else (made, None)
    if len(parts) != 2 or not isinstance(parts[0], torch.nn.Module):
        names = ", ".join(type(part).__name__ for part in parts) if isinstance(made, tuple) else type(made).__name__
        got = f"({names})" if isinstance(made, tuple) else names
        raise ArgumentError("--model", f"{spec} must return a torch.nn.Module or (model, inputs), got {got}")
    return parts[0], parts[1]


def _scoring(spec: str) -> Callable[[Any], Tensor]:
    """Return a loss whose errors are those of the argument `--loss`."""
    function = _imported("--loss", spec)
    from relfisher.validation import check_scalar

    def score(output: Any) -> Tensor:
        try:
            value: Tensor = function(output)
            check_scalar("it", value)
            return value
        except Exception as error:
            raise ArgumentError("--loss", f"{spec}, called with the model's output: {_named(error)}") from error

    return score


def _imported(option: str, spec: str) -> Callable[..., Any]:
    """Import an object given as MODULE:NAME; the working directory is searched as well."""
    module, _, name = spec.partition(":")
    if not module or not name:
        raise ArgumentError(option, f"{spec!r} is not of the form MODULE:NAME")
    sys.path.insert(0, os.getcwd())
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ArgumentError(option, str(error)) from error
    except (Exception, SystemExit) as error:
        raise ArgumentError(option, f"importing {module} raised {_named(error)}") from error
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise ArgumentError(option, f"{spec} must be callable, got {type(found).__name__}")
    return found


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _batch(text: str) -> Tensor:
    """Return a batch of the given shape, of floats or of whole numbers below a limit."""
    import torch

    from relfisher.memory import check_fits

    shape, colon, limit = text.lower().partition(":")
    sizes = _sizes(shape, AXES)
    if sizes is None or (colon and not SIZE.fullmatch(limit)):
        allowed = f"up to {AXES} whole numbers joined by x, such as 50x784, and :N for whole numbers below N"
        raise ArgumentError("--inputs", f"{text!r} is not a shape, allowed are {allowed}, such as 4x9:100")
    count = math.prod(sizes)
    try:
        check_fits(f"a batch of {text}", count, torch.int64, torch.device("cpu"), "give a smaller one")
    except ValueError as error:
        raise ArgumentError("--inputs", str(error)) from error
    if not colon:
        return torch.randn(sizes)
    # From N - 1, which an embedding with fewer rows lacks, down to 0 and around.
    return torch.arange(-1, -1 - count, -1).remainder(int(limit)).view(sizes)


def _sizes(text: str, most: int) -> tuple[int, ...] | None:
    """Return up to so many whole numbers above 0 that are joined by x; None for anything else."""
    parts = text.lower().split("x")
    return tuple(map(int, parts)) if len(parts) <= most and all(map(SIZE.fullmatch, parts)) else None
