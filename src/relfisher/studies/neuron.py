"""Section 5.1 of the paper: one sigmoid neuron by GD, WhiteGD, NGD and WhiteNGD, each at its best configuration."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from relfisher.studies.coordinates import Coordinates, raw, whitened
from relfisher.studies.data import Dataset
from relfisher.studies.descent import DAMPING, Configuration, Problems, descend

__all__ = [
    "GRID",
    "LEARNING_RATES",
    "METHODS",
    "MOMENTUMS",
    "Batch",
    "Curves",
    "Method",
    "Panel",
    "pair",
    "problems",
    "solve",
]

LEARNING_RATES = (1e-2, 1e-1, 1.0, 10.0, 100.0)
MOMENTUMS = (0.0, 0.8)
GRID = tuple(Configuration(rate, momentum) for rate in LEARNING_RATES for momentum in MOMENTUMS)


@dataclass(frozen=True)
class Method:
    """Whether the features are whitened first, and whether steps are natural (30) or plain gradients."""

    coordinates: Callable[[Tensor], Coordinates]
    natural: bool


METHODS = {
    "GD": Method(raw, natural=False),
    "WhiteGD": Method(whitened, natural=False),
    "NGD": Method(raw, natural=True),
    "WhiteNGD": Method(whitened, natural=True),
}


@dataclass(frozen=True)
class Panel:
    """One panel of figure 4: two classes and how many images of both together; `subset` if each run draws its own."""

    pair: tuple[int, int]
    size: int
    subset: bool

    def __str__(self) -> str:
        return f"{self.pair[0]} vs {self.pair[1]}, n = {self.size:,}"


@dataclass(frozen=True)
class Batch:
    """All runs and configurations of a method in a panel: everything that its curves depend on, but the machine."""

    panel: Panel
    method: str
    settings: tuple[tuple[str, str | int | float], ...]

    @property
    def key(self) -> str:
        """A file name: readable, and another one as soon as any setting differs."""
        digest = hashlib.sha256(self.identity().encode()).hexdigest()[:12]
        first, second = self.panel.pair
        return f"neuron-{first}vs{second}-n{self.panel.size}-{self.method}-{digest}"

    def identity(self) -> str:
        """All fields and the grid, as text that is the same in every process."""
        return json.dumps({**asdict(self), "grid": [asdict(entry) for entry in GRID], "damping": DAMPING})

    def __str__(self) -> str:
        return f"{self.panel}: {self.method}"


@dataclass(frozen=True)
class Curves:
    """What a batch measured.

    `log_cost` is the natural logarithm of the training cost (29), [configurations, runs, epochs + 1]; NaN from where a
    configuration diverged. `seconds` is what the batch took, coordinates included, with `threads` threads.
    """

    log_cost: Tensor
    seconds: float
    threads: int


def pair(data: Dataset, classes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Returns all images of two classes, the validation images included: section 5.1 is about the training cost only.

    Args:
        data: The data set.
        classes: The two classes.

    Returns:
        Pixels in float64, [n, 784], and +1 for the second class, -1 for the first, [n].
    """
    labels = torch.cat([data.train_labels, data.validation_labels])
    chosen = (labels == classes[0]) | (labels == classes[1])
    images = torch.cat([data.train_images, data.validation_images])[chosen].double()
    return images, torch.where(labels[chosen] == classes[1], 1.0, -1.0).double()


def problems(data: Dataset, batch: Batch) -> Problems:
    """Draws the runs of a batch: initial weights and, below all images, a subset of equally many of both classes.

    Every method gets the same draws.

    Args:
        data: The data set.
        batch: Its settings must have `runs` and `initial_std`.

    Returns:
        One data set that the runs share, or one for each.
    """
    settings = dict(batch.settings)
    runs = int(settings["runs"])
    x, signs = pair(data, batch.panel.pair)
    generator = torch.Generator().manual_seed(0)
    parameters = x.shape[1] + 1
    start = torch.randn(runs, parameters, generator=generator, dtype=x.dtype) * float(settings["initial_std"])
    if batch.panel.subset:
        draws = [_draw(signs, batch.panel.size, generator) for _ in range(runs)]
        starts = list(torch.split(start, 1))
    else:
        draws, starts = [torch.arange(len(signs))], [start]
    coordinates = [METHODS[batch.method].coordinates(x[draw]) for draw in draws]
    rank = max(entry.features.shape[1] for entry in coordinates)
    return Problems(
        torch.stack([pad(entry.features, (0, rank - entry.features.shape[1])) for entry in coordinates]),
        torch.stack([signs[draw] for draw in draws]),
        torch.stack([
            pad(theta @ entry.basis, (0, rank - entry.features.shape[1]))
            for theta, entry in zip(starts, coordinates, strict=True)
        ]),
        parameters,
    )


def solve(data: Dataset, batch: Batch, report: Callable[[float, float], None]) -> Curves:
    """Carries out all runs and configurations of a method in a panel.

    Args:
        data: The data set.
        batch: What to carry out; its settings must also have `epochs`.
        report: Is told how much is done, from 0 to 1, and the natural logarithm of the lowest cost.

    Returns:
        The curves.
    """
    epochs = int(dict(batch.settings)["epochs"])
    begin = time.perf_counter()
    log_cost = descend(
        problems(data, batch),
        GRID,
        natural=METHODS[batch.method].natural,
        epochs=epochs,
        report=lambda epoch, cost: report(epoch / epochs, cost),
    )
    return Curves(log_cost, time.perf_counter() - begin, torch.get_num_threads())


def _draw(signs: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Returns the indices of a random subset, half of it from either class."""
    halves = zip((-1, 1), (size - size // 2, size // 2), strict=True)
    members = [(signs == sign).nonzero().squeeze(1) for sign, _ in halves]
    counts = (size - size // 2, size // 2)
    return torch.cat([
        member[torch.randperm(len(member), generator=generator)[:count]]
        for member, count in zip(members, counts, strict=True)
    ])
