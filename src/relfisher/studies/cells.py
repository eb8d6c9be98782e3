"""The building blocks of a study: cells, each a piece of work with all its options, and their results."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from numpy.typing import NDArray

__all__ = ["Cell", "Options", "Result"]


@dataclass(frozen=True)
class Options:
    """The options that all cells of a study share: the data, and anything else that determines the results."""

    data: str
    fingerprint: str
    relfisher: str = field(default=version("relfisher"), kw_only=True)


class Cell(ABC):
    """A piece of work with everything that determines its result, apart from the machine. A frozen dataclass."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The readable part of its file name."""

    @abstractmethod
    def identity(self) -> str:
        """Return all options as text that does not depend on the process."""

    @property
    def key(self) -> str:
        """The file name, which changes if any option changes."""
        digest = hashlib.sha256(self.identity().encode()).hexdigest()[:12]
        return f"{self.name}-{digest}"


class Result(ABC):
    """The measurements of a cell."""

    warnings: tuple[str, ...] = ()

    @property
    @abstractmethod
    def score(self) -> float:
        """The score of a candidate: the lowest is the best, and infinity means diverged."""

    @property
    @abstractmethod
    def ending(self) -> str:
        """How the cell ended, in a few words for the terminal."""

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the result as arrays to be saved in a file."""

    @property
    def diverged(self) -> bool:
        """Whether the cell diverged, so that there is nothing to compare."""
        return not math.isfinite(self.score)
