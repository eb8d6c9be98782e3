"""What a study is made of: cells, each a piece of work with all its options, and the result of one."""

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
    """What all cells of a study have in common: the data, and what else its result depends on."""

    data: str
    fingerprint: str
    relfisher: str = field(default=version("relfisher"), kw_only=True)


class Cell(ABC):
    """A piece of work: everything that its result depends on, apart from the machine. A frozen dataclass."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The readable part of its file name."""

    @abstractmethod
    def identity(self) -> str:
        """Return all options as text that is the same in every process."""

    @property
    def key(self) -> str:
        """Its file name, another one as soon as any option differs."""
        digest = hashlib.sha256(self.identity().encode()).hexdigest()[:12]
        return f"{self.name}-{digest}"


class Result(ABC):
    """What a cell measured."""

    warnings: tuple[str, ...] = ()

    @property
    @abstractmethod
    def score(self) -> float:
        """What a candidate is judged by: the lowest is the best, and infinity has diverged."""

    @property
    @abstractmethod
    def ending(self) -> str:
        """How it ended, in a few words for the terminal."""

    @abstractmethod
    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the result as arrays for a file."""

    @property
    def diverged(self) -> bool:
        """Whether it has nothing to compare."""
        return not math.isfinite(self.score)
