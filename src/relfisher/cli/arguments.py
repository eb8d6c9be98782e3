"""Arguments that several commands share, and the error for an invalid one."""

from __future__ import annotations

import math
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relfisher.studies.data import Dataset

__all__ = ["DIGITS", "ArgumentError", "check_writable", "loaded", "number", "selected", "whole"]

MOST = 100_000
DIGITS = re.compile("[0-9]{1,18}")


class ArgumentError(typer.BadParameter):
    """An invalid argument; the message is one line for the user."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message, param_hint=f"'{argument}'")


def whole(option: str, help: str, low: int = 1, most: int = MOST) -> Any:  # noqa: A002  # as typer calls it
    """Return an option whose value is a whole number.

    Args:
        option: the name of the option, for errors.
        help: its description.
        low: the smallest value.
        most: the largest value.

    Returns:
        The option.
    """

    def parse(text: str | int) -> int:
        # typer also passes on the default.
        value = int(text) if DIGITS.fullmatch(str(text)) else -1
        if not low <= value <= most:
            raise ArgumentError(option, f"{str(text)!r} is not a whole number from {low} to {most}")
        return value

    return typer.Option(option, parser=parse, metavar=f"{low}..{most}", help=help)


def number(option: str, help: str, *, above: bool = True) -> Any:  # noqa: A002  # as typer calls it
    """Return an option whose value is a finite number.

    Args:
        option: the name of the option, for errors.
        help: its description.
        above: True if it must be above 0, False if it may be 0.

    Returns:
        The option.
    """
    allowed = "> 0" if above else ">= 0"

    def parse(text: str | float) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > 0 or (value == 0 and not above))):
            raise ArgumentError(option, f"{str(text)!r} is not a finite number {allowed}")
        return value

    return typer.Option(option, parser=parse, metavar=f"x{allowed}".replace(" ", ""), help=help)


def selected(chosen: str | None, known: Iterable[str], option: str = "--methods") -> tuple[str, ...]:
    """Return the names in a comma-separated argument, in any case, with the spelling of the known names.

    Args:
        chosen: the argument; None for all names.
        known: all names.
        option: the name of the argument.

    Returns:
        The names, each once.

    Raises:
        ArgumentError: if a name is not known.
    """
    if chosen is None:
        return tuple(known)
    spelled = {name.upper(): name for name in known}
    kind = option.strip("-").removesuffix("s").lower()
    names = []
    for name in map(str.strip, chosen.split(",")):
        if name.upper() not in spelled:
            wrong = f"{name!r} is not a {kind}" if name else f"{chosen!r} has an empty name"
            raise ArgumentError(option, f"{wrong}, allowed are {', '.join(spelled.values())}")
        names.append(spelled[name.upper()])
    return tuple(dict.fromkeys(names))


def loaded(source: str) -> Dataset:
    """Load the data set given by `--data`.

    Args:
        source: the argument.

    Returns:
        The data set.

    Raises:
        ArgumentError: if the data set is missing or damaged.
    """
    from relfisher.studies.data import DataError, load

    try:
        return load(source)
    except DataError as error:
        raise ArgumentError("--data", str(error)) from error


def check_writable(out: Path) -> None:
    """Create the output directory, and check that it is writable.

    Args:
        out: the argument `--out`.

    Raises:
        ArgumentError: if it cannot be created or written to.
    """
    try:
        for directory in (out, out / "runs"):
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        message = f"cannot write to {out}: {reason}; allowed is a directory that can be made or written to"
        raise ArgumentError("--out", message) from error
