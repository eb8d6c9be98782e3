"""Finished cells on disk: one file per cell, complete or absent, so that a study can always be resumed."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from relfisher.files import remove_stale, write_atomically
from relfisher.studies.cells import Cell, Result

__all__ = ["Store"]

R = TypeVar("R", bound=Result)


@dataclass
class Store(Generic[R]):
    """A directory of results, which `decode` reconstructs from the arrays in a file.

    `damaged` lists the unreadable files found so far, which count as missing.
    """

    directory: Path
    decode: Callable[[Mapping[str, NDArray[Any]]], R]
    damaged: list[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Create the directory and remove files that killed processes left incomplete."""
        self.directory.mkdir(parents=True, exist_ok=True)
        remove_stale(self.directory)

    def path(self, cell: Cell) -> Path:
        """Return the file path of a cell, whether the file exists or not."""
        return self.directory / f"{cell.key}.npz"

    def load(self, cell: Cell) -> R | None:
        """Read the result of a cell.

        Args:
            cell: the cell.

        Returns:
            Its result, or None if the file is missing, unreadable, or belongs to another cell.
        """
        path = self.path(cell)
        if not path.exists():
            return None
        try:
            # Given the path of a damaged file, numpy would leave it open.
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                if str(file["run"]) == cell.identity():
                    return self.decode(file)
        except Exception:
            # What a damaged file raises depends on where the damage is: zlib.error, KeyError, NotImplementedError, ...
            pass
        self.damaged.append(path)
        return None

    def save(self, cell: Cell, result: R) -> None:
        """Write the result of a cell; other processes see either the whole file or none."""
        content = io.BytesIO()
        np.savez_compressed(content, allow_pickle=False, run=np.array(cell.identity()), **result.arrays())
        write_atomically(self.path(cell), content.getvalue())
