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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

__all__ = ["Record", "Run", "RunStore", "write_atomically"]

STALE_SECONDS = 60.0


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
    so far. `validation` has the validation accuracy after each epoch. A diverged run ends with a non-finite cost.
    """

    cost: NDArray[np.float32]
    seconds: NDArray[np.float64]
    validation: NDArray[np.float64]
    diverged: bool = False
    threads: int = 1
    warnings: tuple[str, ...] = ()


@dataclass
class RunStore:
    """A directory of records. `damaged` lists the unreadable files met so far, which count as missing."""

    directory: Path
    damaged: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Creates the directory and removes what killed processes left half written."""
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.glob(".*.tmp"):
            # A younger file may belong to a process that is writing it right now.
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink(missing_ok=True)

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
        path = self.path(run)
        if not path.exists():
            return None
        try:
            return _read(path, run)
        except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
            self.damaged.append(path)
            return None

    def save(self, run: Run, record: Record) -> None:
        """Writes a finished run; another process sees the whole file or none."""
        about = {"diverged": record.diverged, "threads": record.threads, "warnings": record.warnings}
        content = io.BytesIO()
        np.savez_compressed(
            content,
            allow_pickle=False,
            run=np.array(run.identity()),
            about=np.array(json.dumps(about)),
            cost=record.cost,
            seconds=record.seconds,
            validation=record.validation,
        )
        write_atomically(self.path(run), content.getvalue())


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


def _read(path: Path, run: Run) -> Record:
    # Given a path of a damaged file, numpy would leave it open.
    with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
        if str(file["run"]) != run.identity():
            raise ValueError(f"{path} belongs to another run")
        about = json.loads(str(file["about"]))
        return Record(
            cost=file["cost"],
            seconds=file["seconds"],
            validation=file["validation"],
            diverged=bool(about["diverged"]),
            threads=int(about["threads"]),
            warnings=tuple(about["warnings"]),
        )
