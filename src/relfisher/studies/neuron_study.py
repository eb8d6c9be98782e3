"""Figure 4 as a whole: which batches it takes, which configuration each method is shown with, what the paper claims."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relfisher.studies.data import Dataset
from relfisher.studies.descent import Configuration
from relfisher.studies.neuron import GRID, METHODS, Batch, Curves, Panel, pair, solve
from relfisher.studies.progress import RESUMED
from relfisher.studies.runs import ArrayStore

__all__ = [
    "Choice",
    "NeuronOutcome",
    "NeuronStudy",
    "NeuronWatcher",
    "PanelError",
    "carry_out",
    "log_mean",
    "panels",
    "plan",
]

FASHION_PAIRS = ((0, 6), (2, 4))
DIGIT_PAIRS = ((3, 5), (4, 9))
LARGE_SUBSET, SMALL_SUBSET = 1000, 200
FEWEST_IMAGES = 20


class PanelError(ValueError):
    """Data cannot give a panel; the message is one line for the user, about the argument `pair` or `size`."""

    def __init__(self, argument: str, message: str) -> None:
        super().__init__(message)
        self.argument = argument


@dataclass(frozen=True)
class NeuronStudy:
    """Panels, methods and settings."""

    panels: tuple[Panel, ...]
    methods: tuple[str, ...]
    settings: tuple[tuple[str, str | int | float], ...]

    def batch(self, panel: Panel, method: str) -> Batch:
        """All runs and configurations of a method in a panel."""
        return Batch(panel, method, self.settings)

    @property
    def batches(self) -> list[Batch]:
        """All of them, panel by panel."""
        return [self.batch(panel, method) for panel in self.panels for method in self.methods]


@dataclass(frozen=True)
class Choice:
    """What a method found in a panel.

    `chosen` is the configuration with the lowest mean cost after the last epoch; one with a diverged run is never
    chosen, so that it is None if all have one. `curves` has its runs' ln cost, [runs, epochs + 1]. `diverged` maps each
    configuration with a diverged run to the epoch of its first non-finite step.
    """

    chosen: Configuration | None
    curves: Tensor
    diverged: Mapping[Configuration, int]
    seconds: float
    threads: int

    @property
    def mean(self) -> Tensor:
        """The logarithm of the runs' mean cost after each epoch."""
        return log_mean(self.curves)


@dataclass(frozen=True)
class NeuronOutcome:
    """All curves of a study."""

    study: NeuronStudy
    curves: Mapping[Batch, Curves]

    @cached_property
    def choices(self) -> dict[tuple[Panel, str], Choice]:
        """What each method found in each panel."""
        return {(batch.panel, batch.method): _choose(curves) for batch, curves in self.curves.items()}

    def lowest(self, panel: Panel) -> float:
        """The logarithm of the lowest mean cost in a panel, of any method at any configuration and epoch."""
        means = [log_mean(self.curves[self.study.batch(panel, method)].log_cost) for method in self.study.methods]
        return min(float(mean[mean.isfinite()].min()) for mean in means)


@runtime_checkable
class NeuronWatcher(Protocol):
    """Follows the execution, as a progress display does."""

    def started(self, run: Batch) -> None:
        """A batch begins."""

    def progressed(self, run: Batch, fraction: float, cost: float) -> None:
        """A batch has come some way."""

    def ended(self, run: Batch, how: str) -> None:
        """A batch is finished, or was found finished."""


def log_mean(log_cost: Tensor) -> Tensor:
    """Returns ln of the mean cost of the runs, the last axis but one."""
    return torch.logsumexp(log_cost, dim=-2) - math.log(log_cost.shape[-2])


def panels(
    data: Dataset, pairs: Sequence[tuple[int, int]] | None = None, sizes: Sequence[int | None] | None = None
) -> tuple[Panel, ...]:
    """Says which panels a data set gets.

    Args:
        data: The data set.
        pairs: Pairs of classes; if None, 3 vs 5 and 4 vs 9, or T-shirt vs shirt and pullover vs coat of Fashion-MNIST.
        sizes: Numbers of images; None among them stands for all. If None itself, a subset and all.

    Returns:
        Two classes and a size each.

    Raises:
        PanelError: A pair is not two classes of the data, or it has not so many images.
    """
    chosen = []
    for classes in pairs or (FASHION_PAIRS if data.name == "fashion-mnist" else DIGIT_PAIRS):
        _, signs = pair(data, classes)
        available = [int((signs == sign).sum()) for sign in (-1, 1)]
        if min(available) == 0 or classes[0] == classes[1]:
            raise PanelError("pair", f"{classes[0]} and {classes[1]} are not two classes of {data.name}")
        usual = LARGE_SUBSET if sum(available) >= 2 * LARGE_SUBSET else SMALL_SUBSET
        for size in (usual, None) if sizes is None else sizes:
            if size is not None and not FEWEST_IMAGES <= size <= 2 * min(available):
                allowed = f"allowed are {FEWEST_IMAGES} to {2 * min(available)}, or all"
                raise PanelError("size", f"{size} images of {classes[0]} and {classes[1]} in {data.name}: {allowed}")
            chosen.append(Panel(classes, size or sum(available), subset=size is not None))
    return tuple(dict.fromkeys(chosen))


def plan(
    data: Dataset,
    chosen: tuple[Panel, ...],
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    runs: int = 10,
    epochs: int = 100,
    initial_std: float = 0.01,
) -> NeuronStudy:
    """Says what figure 4 takes.

    Args:
        data: What is trained on.
        chosen: The panels.
        methods: Names from `METHODS`.
        runs: How many runs each configuration gets.
        epochs: How many full-batch steps.
        initial_std: The standard deviation of the initial weights, which the paper does not say.

    Returns:
        The study.
    """
    settings: dict[str, str | int | float] = {
        "data": data.name,
        "fingerprint": data.fingerprint(),
        "runs": runs,
        "epochs": epochs,
        "initial_std": initial_std,
        "relfisher": version("relfisher"),
    }
    return NeuronStudy(chosen, methods, tuple(sorted(settings.items())))


def carry_out(study: NeuronStudy, data: Dataset, store: ArrayStore, watcher: NeuronWatcher) -> NeuronOutcome:
    """Carries out every batch that the store does not have.

    Args:
        study: What is compared.
        data: What is trained on.
        store: Holds the finished batches.
        watcher: Follows the execution.

    Returns:
        All curves.
    """
    found: dict[Batch, Curves] = {}
    for batch in study.batches:
        curves = store.read(batch.key, batch.identity(), _decode)
        if curves is None:
            watcher.started(batch)
            curves = solve(data, batch, lambda done, cost, batch=batch: watcher.progressed(batch, done, math.exp(cost)))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
            store.write(batch.key, batch.identity(), _encode(curves))
            final = log_mean(_choose(curves).curves)[-1] / math.log(10)
            watcher.ended(batch, f"cost 10^{float(final):.2f} in {curves.seconds:.1f} s")
        else:
            watcher.ended(batch, RESUMED)
        found[batch] = curves
    return NeuronOutcome(study, found)


def _choose(curves: Curves) -> Choice:
    finite = curves.log_cost.isfinite().all(dim=1)
    diverged = {GRID[index]: int(finite[index].sum()) for index in (~finite.all(dim=1)).nonzero().flatten().tolist()}
    final = log_mean(curves.log_cost)[:, -1].nan_to_num(nan=math.inf)
    best = int(final.argmin())
    chosen = GRID[best] if math.isfinite(float(final[best])) else None
    return Choice(chosen, curves.log_cost[best], diverged, curves.seconds, curves.threads)


def _encode(curves: Curves) -> dict[str, NDArray[Any]]:
    about = np.array([curves.seconds, curves.threads])
    return {"log_cost": curves.log_cost.numpy(), "about": about}


def _decode(file: Mapping[str, NDArray[Any]]) -> Curves:
    seconds, threads = file["about"].tolist()
    return Curves(torch.from_numpy(file["log_cost"]), float(seconds), int(threads))
