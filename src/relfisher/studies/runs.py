"""Finished training runs on disk: one file a run, complete or absent, so that an experiment can always go on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["ArrayStore", "Record", "Run", "RunStore", "write_atomically"]

STALE_SECONDS = 60.0
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One training run: everything that its result depends on, apart from the machine."""

    experiment: str
    method: str
    learning_rate: float
    seed: int
    settings: tuple[tuple[str, str | int | float], ...]

    @property
    def key(self) -> str:
        """A file name for the run: readable, and another one as soon as any setting differs."""
        digest = hashlib.sha256(self.identity().encode()).hexdigest()[:12]
        return f"{self.experiment}-{self.method}-lr{self.learning_rate:g}-seed{self.seed}-{digest}"

    def identity(self) -> str:
        """All fields, as text that is the same in every process."""
        return json.dumps(asdict(self), sort_keys=True)

    def __str__(self) -> str:
        return f"{self.method} lr {self.learning_rate:g} seed {self.seed}"


@dataclass(frozen=True)
class Record:
    """What a run measured.

    `cost` and `seconds` have one entry an iteration: the mini-batch's cost before the update, and the training time
    so far. `validation` has the validation accuracy after each epoch. `full_cost` is the cost of all training images at
    the end, as the trained network sees them. A diverged run ends with a non-finite cost. Where validation does not
    follow epochs, `evaluated` has the number of iterations before each. `state_bytes` is what the optimizer keeps.
    """

    cost: NDArray[np.float32]
    seconds: NDArray[np.float64]
    validation: NDArray[np.float64]
    full_cost: float = float("nan")
    diverged: bool = False
    threads: int = 1
    warnings: tuple[str, ...] = ()
    evaluated: tuple[int, ...] = ()
    state_bytes: int = 0


@dataclass
class ArrayStore:
    """A directory of named arrays. `damaged` lists the unreadable files met so far, which count as missing."""

    directory: Path
    damaged: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Creates the directory and removes what killed processes left half written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob(".*.tmp"):
            # A younger file may belong to a process that is writing it right now.
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)

    def read(self, key: str, identity: str, decode: Callable[[Mapping[str, NDArray[Any]]], T]) -> T | None:
        """Reads a file.

        Args:
            key: Its name, without the suffix.
            identity: What it must have been written as.
            decode: Makes the result of the arrays.

        Returns:
            The result, or None if the file is not there, unreadable, or another one's.
        """
        path = self.directory / f"{key}.npz"
        if not path.exists():
            return None
        try:
            # Given a path of a damaged file, numpy would leave it open.
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                _check_identity(file, identity)
                return decode(file)
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
            self.damaged.append(path)
            return None

    def write(self, key: str, identity: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Writes a file; another process sees the whole of it or none."""
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, run=np.array(identity), **arrays)
        write_atomically(self.directory / f"{key}.npz", content.getvalue())


class RunStore(ArrayStore):
    """A directory of the records of training runs."""

    def path(self, run: Run) -> Path:
        """The file of a run, whether it is there or not."""
        return self.directory / f"{run.key}.npz"

    def load(self, run: Run) -> Record | None:
        """Reads a finished run.

        Args:
            run: The run.

        Returns:
            Its record, or None if it is not finished or its file is unreadable.
        """
        return self.read(run.key, run.identity(), _record)

    def save(self, run: Run, record: Record) -> None:
        """Writes a finished run; another process sees the whole file or none."""
        about = {
            "full_cost": record.full_cost,
            "diverged": record.diverged,
            "threads": record.threads,
            "warnings": record.warnings,
            "evaluated": record.evaluated,
            "state_bytes": record.state_bytes,
        }
        arrays = {
            "about": np.array(json.dumps(about)),
            "cost": record.cost,
            "seconds": record.seconds,
            "validation": record.validation,
        }
        self.write(run.key, run.identity(), arrays)


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that no moment, not even a power cut, leaves half of it under its name.

    Args:
        path: The file, replaced if it exists.
        content: All of its bytes.
    """
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".tmp", delete=False) as file:
        try:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # Temporary files are private, results are not.
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


def _check_identity(file: Mapping[str, NDArray[Any]], identity: str) -> None:
    if str(file["run"]) != identity:
        raise ValueError("the file belongs to another run")


def _record(file: Mapping[str, NDArray[Any]]) -> Record:
    about = json.loads(str(file["about"]))
    return Record(
        cost=file["cost"],
        seconds=file["seconds"],
        validation=file["validation"],
        full_cost=float(about["full_cost"]),
        diverged=bool(about["diverged"]),
        threads=int(about["threads"]),
        warnings=tuple(about["warnings"]),
        # Files of earlier versions lack the last two.
        evaluated=tuple(about.get("evaluated", ())),
        state_bytes=int(about.get("state_bytes", 0)),
    )
