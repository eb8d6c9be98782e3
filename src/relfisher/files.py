"""The one writer of files: a file is written as a whole, or stays as it was."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

__all__ = ["remove_stale", "write_atomically"]

STALE_SECONDS = 60.0


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is never incomplete under its name, not even after a power cut.

    Args:
        path: the path of the file, which is replaced if it exists.
        content: the whole content.

    Raises:
        OSError: if it cannot be written, with the path as its `filename`; nothing is left behind, and an older file
            stays.
    """
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                # Temporary files are private, but results are not.
                os.chmod(file.name, 0o644)
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                # What is still in the buffer would be written once more when the file is closed.
                with suppress(OSError):
                    file.close()
                raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_stale(directory: Path) -> None:
    """Remove the files that killed processes left incomplete.

    Args:
        directory: a directory that `write_atomically` wrote to.
    """
    for path in directory.glob(".*.tmp"):
        # A more recent file may still be in use by another process, which may also rename it now.
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
