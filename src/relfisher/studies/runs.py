"""Training runs: the cells of `reproduce mlp` and of races, and their measurements."""

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
        """Return all options as text that does not depend on the process."""
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
    """The measurements of a run.

    `cost` and `seconds` have one entry per iteration: the mini-batch's cost before the update, and the training time so
    far. `validation` has the result of each evaluation: after each epoch or, if `evaluated` is not empty, after these
    numbers of iterations. `full_cost` is the final cost on training samples, in evaluation mode. The costs of a
    diverged run end with a non-finite value. `state_bytes` is the memory of the optimizer's state.
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
        """The mean training cost over the last tenth of the iterations; infinity if the run diverged."""
        if self.diverged:
            return math.inf
        last = max(1, round(SCORED_FRACTION * len(self.cost)))
        return float(self.cost[-last:].mean(dtype=float))

    @property
    def ending(self) -> str:
        """The latest cost and the training time, or the iteration where it diverged."""
        if self.diverged:
            return f"diverged at iteration {len(self.cost)}"
        return f"cost {self.cost[-100:].mean():.3g} in {self.seconds[-1]:.1f} s"

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the curves as they are, and everything else as JSON."""
        about = {name: getattr(self, name) for name in _ABOUT}
        return {
            "about": np.array(json.dumps(about)),
            "cost": self.cost,
            "seconds": self.seconds,
            "validation": self.validation,
        }

    @classmethod
    def of(cls, arrays: Mapping[str, NDArray[Any]]) -> Record:
        """Return the record from the result of `arrays`."""
        # Files written by earlier versions lack the last two.
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
