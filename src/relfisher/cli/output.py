"""What the command line says: errors of one line, and a standard output that may fail while a command goes on."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["FAILURE_STATUS", "Output", "failure", "tell"]

FAILURE_STATUS = 1


def tell(message: str) -> None:
    """Print a message for the user on standard error, in one line."""
    print("relfisher:", " ".join(message.split()), file=sys.stderr)


def failure(error: OSError) -> str:
    """Return what failed, a file if there is one, and why."""
    return f"{error.filename} cannot be written: {error.strerror}" if error.filename else str(error)


class Output:
    """A text stream that swallows the errors of another, such as a closed pipe or a full disk.

    Characters that the stream cannot encode are escaped. Everything but writing is that of the stream.

    Attributes:
        failure: the first error of the stream, or None; nothing is written after it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, unless the stream has failed before."""
        if self._stream is None:
            self.failure = self.failure or OSError(errno.EBADF, os.strerror(errno.EBADF))
        elif self.failure is None:
            with self._swallowing(self._stream) as stream:
                try:
                    stream.write(text)
                except UnicodeEncodeError as error:
                    stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered, unless the stream has failed before."""
        if self._stream is not None and self.failure is None:
            with self._swallowing(self._stream) as stream:
                stream.flush()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream is not None and self._stream.isatty()

    @contextmanager
    def _swallowing(self, stream: Any) -> Iterator[Any]:
        try:
            yield stream
        except OSError as error:
            self.failure = error
            _discard(stream)


def _discard(stream: Any) -> None:
    """Send what is still in the stream's buffer nowhere, so that the interpreter does not fail on it at its end."""
    try:
        descriptor = stream.fileno()
    except OSError:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)
