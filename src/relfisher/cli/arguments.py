"""What several commands take as arguments, and the error for a wrong one."""

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
    """A wrong argument; the message is one line for the user."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message, param_hint=argument)


def selected(chosen: str | None, known: Iterable[str], option: str = "--methods") -> tuple[str, ...]:
    """Return the names that a comma-separated argument gives, in any case, as they are spelled in the list of all.

    Args:
        chosen: The argument; None stands for all names.
        known: All names.
        option: What the argument is called.

    Returns:
        The names, each once.

    Raises:
        ArgumentError: A name is not in the list.
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
    """Load the data set that `--data` names.

    Args:
        source: The argument.

    Returns:
        The data set.

    Raises:
        ArgumentError: It is not there, or damaged.
    """
    from relfisher.studies.data import DataError, load

    try:
        return load(source)
    except DataError as error:
        raise ArgumentError("--data", str(error)) from error


def check_writable(out: Path) -> None:
    """Make the output directory, and check that files can be written to it.

    Args:
        out: The argument `--out`.

    Raises:
        ArgumentError: They cannot.
    """
    try:
        for directory in (out, out / "runs"):
            directory.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
    except OSError as error:
        message = f"cannot write to {out}: {error.strerror}; allowed is a directory that can be made or written to"
        raise ArgumentError("--out", message) from error
