"""Section 5.2 of the paper: a ReLU network on digits, trained by SGD, Adam and RNGD with and without batch norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import nn

import relfisher
from relfisher.studies.cells import Options
from relfisher.studies.data import Dataset, load
from relfisher.studies.engine import Outcome, Study
from relfisher.studies.executor import Reporter
from relfisher.studies.networks import Normalization, paper_network
from relfisher.studies.runs import Record, Run, Scalar
from relfisher.studies.training import Length, train
from relfisher.studies.workloads import WORKLOADS, of_images

__all__ = ["METHODS", "Method", "MlpOptions", "MlpOutcome", "MlpRun", "MlpStudy", "carry_out_run", "plan"]

EPOCHS = 50
QUICK_EPOCHS = 16
WORKLOAD = WORKLOADS["mlp"]


@dataclass(frozen=True)
class Method:
    """A row of the comparison: the position of batch norm, the optimizer, and its learning-rate candidates."""

    normalization: Normalization
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    grid: tuple[float, ...]


def _sgd(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=learning_rate)


def _adam(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=learning_rate)


def _published(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return relfisher.RNGD.as_published(model, lr=learning_rate)


def _default(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    return relfisher.RNGD(model, lr=learning_rate)


METHODS = {
    "PLAIN+SGD": Method("none", _sgd, (0.03, 0.1, 0.3, 1.0)),
    "PLAIN+ADAM": Method("none", _adam, (0.0003, 0.001, 0.003, 0.01)),
    "BNA+SGD": Method("after", _sgd, (0.03, 0.1, 0.3, 1.0)),
    "BNA+ADAM": Method("after", _adam, (0.0003, 0.001, 0.003, 0.01)),
    "BNB+SGD": Method("before", _sgd, (0.03, 0.1, 0.3, 1.0)),
    "BNB+ADAM": Method("before", _adam, (0.0003, 0.001, 0.003, 0.01)),
    "PLAIN+RNGD": Method("none", _published, (0.01, 0.03, 0.1, 0.3)),
    "PLAIN+RNGD-DEFAULT": Method("none", _default, (0.01, 0.03, 0.1, 0.3)),
}


@dataclass(frozen=True)
class MlpOptions(Options):
    """The options that all runs share."""

    epochs: int
    batch_size: int = WORKLOAD.batch_size


@dataclass(frozen=True)
class MlpRun(Run):
    """One training run."""

    options: MlpOptions

    def settings(self) -> Mapping[str, Scalar]:
        """Return the options that are common to all runs."""
        return asdict(self.options)


@dataclass(frozen=True)
class MlpStudy(Study[MlpRun]):
    """The learning-rate candidates of each method, and the number of seeds for the best one."""

    grids: Mapping[str, tuple[float, ...]]
    seeds: int
    options: MlpOptions

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the methods."""
        return tuple(self.grids)

    def candidates(self, group: str) -> list[MlpRun]:
        """Return the runs that determine a method's learning rate: its whole grid, with the first seed."""
        return [MlpRun("mlp", group, learning_rate, 0, self.options) for learning_rate in self.grids[group]]

    def repeats(self, best: MlpRun) -> list[MlpRun]:
        """Return the runs of a learning rate, one per seed."""
        return [replace(best, seed=seed) for seed in range(self.seeds)]


MlpOutcome = Outcome[MlpStudy, MlpRun, Record]


def plan(
    data: Dataset,
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    quick: bool = False,
    epochs: int | None = None,
    seeds: int = 1,
    grids: Mapping[str, tuple[float, ...]] | None = None,
) -> MlpStudy:
    """Return the study of section 5.2.

    Args:
        data: the data set.
        methods: names from `METHODS`, in the order of the report.
        quick: True for fewer epochs, for a first look.
        epochs: the number of epochs, if not the default.
        seeds: the number of seeds for the chosen learning rate of each method.
        grids: learning-rate candidates that replace a method's default grid.

    Returns:
        The study.
    """
    usual = {name: METHODS[name].grid for name in methods}
    options = MlpOptions(data.name, data.fingerprint(), epochs or (QUICK_EPOCHS if quick else EPOCHS))
    return MlpStudy(usual | dict(grids or {}), seeds, options)


def carry_out_run(source: str, run: MlpRun, report: Reporter) -> Record:
    """Train one network on a data set that this process loads itself.

    Args:
        source: the data set, as for `load`.
        run: the method, learning rate, seed and number of epochs.
        report: receives the progress of the run.

    Returns:
        The mini-batch cost and the training time of every iteration, the validation accuracy of every epoch, and the
        final cost on all training images.
    """
    method = METHODS[run.method]
    data = of_images(load(source))
    epochs = run.options.epochs
    # This draws the initial weights, then the order of the images.
    generator = torch.Generator().manual_seed(run.seed)
    return train(
        WORKLOAD,
        data,
        partial(paper_network, method.normalization, generator),
        lambda model: method.optimizer(model, run.learning_rate),
        generator,
        Length(evaluations=epochs, iterations=epochs * (len(data.inputs) // WORKLOAD.batch_size)),
        report,
        scored=len(data.inputs),
    )
