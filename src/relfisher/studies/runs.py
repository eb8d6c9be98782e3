"""Training runs: the cells of `reproduce mlp` and of races, and what they measure."""

from __future__ import annotations

import json
import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from relfisher.studies.cells import Cell, Result

__all__ = ["Record", "Run", "Scalar"]

SCORED_FRACTION = 0.1
Scalar = str | int | float


@dataclass(frozen=True)
class Run(Cell):
    """One training run."""

    experiment: str
    method: str
    learning_rate: float
    seed: int

    @abstractmethod
    def settings(self) -> Mapping[str, Scalar]:
        """Return all other options by name."""

    @property
    def name(self) -> str:
        """The readable part of its file name."""
        return f"{self.experiment}-{self.method}-lr{self.learning_rate:g}-seed{self.seed}"

    def identity(self) -> str:
        """Return all options as text that is the same in every process."""
        options = {
            "experiment": self.experiment,
            "method": self.method,
            "learning_rate": self.learning_rate,
            "seed": self.seed,
            "settings": sorted(self.settings().items()),
        }
        return json.dumps(options, sort_keys=True)

    def __str__(self) -> str:
        return f"{self.method} lr {self.learning_rate:g} seed {self.seed}"


@dataclass(frozen=True)
class Record(Result):
    """What a run measured.

    `cost` and `seconds` have one entry an iteration: the mini-batch's cost before the update, and the training time
    so far. `validation` has what each evaluation found: after each epoch or, where `evaluated` is not empty, after as
    many iterations as it says. `full_cost` is the cost of training samples at the end, as the trained network sees
    them. A diverged run ends with a non-finite cost. `state_bytes` is what the optimizer keeps.
    """

    cost: NDArray[np.float32]
    seconds: NDArray[np.float64]
    validation: NDArray[np.float64]
    full_cost: float = math.nan
    diverged: bool = False
    threads: int = 1
    warnings: tuple[str, ...] = ()
    evaluated: tuple[int, ...] = ()
    state_bytes: int = 0

    @property
    def score(self) -> float:
        """The mean training cost over the last tenth of the iterations, or infinity if the run diverged."""
        if self.diverged:
            return math.inf
        last = max(1, round(SCORED_FRACTION * len(self.cost)))
        return float(self.cost[-last:].mean(dtype=float))

    @property
    def ending(self) -> str:
        """The latest cost and the training time, or where it diverged."""
        if self.diverged:
            return f"diverged at iteration {len(self.cost)}"
        return f"cost {self.cost[-100:].mean():.3g} in {self.seconds[-1]:.1f} s"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the curves as they are, and all else as JSON."""
        about = {name: getattr(self, name) for name in _ABOUT}
        return {
            "about": np.array(json.dumps(about)),
            "cost": self.cost,
            "seconds": self.seconds,
            "validation": self.validation,
        }

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Record:
        """Return the record that `arrays` were made of."""
        # Files of earlier versions lack the last two.
        about = {"evaluated": (), "state_bytes": 0, **json.loads(str(arrays["about"]))}
        return cls(
            cost=arrays["cost"],
            seconds=arrays["seconds"],
            validation=arrays["validation"],
            full_cost=float(about["full_cost"]),
            diverged=bool(about["diverged"]),
            threads=int(about["threads"]),
            warnings=tuple(about["warnings"]),
            evaluated=tuple(about["evaluated"]),
            state_bytes=int(about["state_bytes"]),
        )


_ABOUT = ("full_cost", "diverged", "threads", "warnings", "evaluated", "state_bytes")
