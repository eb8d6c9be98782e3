"""Arguments that several commands share, and the error for an invalid one."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Iterable

    from relfisher.studies.data import Dataset

__all__ = ["ArgumentError", "check_writable", "loaded", "selected"]


class ArgumentError(typer.BadParameter):
    """An invalid argument; the message is one line for the user."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message, param_hint=argument)


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
            raise ArgumentError(option, f"{name!r} is not a {kind}, allowed are {', '.join(spelled.values())}")
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
    except OSError as error:
        message = f"cannot write to {out}: {error.strerror}; allowed is a directory that can be made or written to"
        raise ArgumentError("--out", message) from error
