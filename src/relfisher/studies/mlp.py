"""Section 5.2 of the paper: a ReLU network on digits, trained by SGD, Adam and RNGD with and without batch norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from relfisher.studies.cells import Options
from relfisher.studies.data import Dataset, load
from relfisher.studies.engine import Outcome, Study
from relfisher.studies.executor import Reporter
from relfisher.studies.networks import paper_network
from relfisher.studies.peers import PEERS, Peer
from relfisher.studies.runs import Record, Run, Scalar
from relfisher.studies.training import Length, Supervised, train
from relfisher.studies.workloads import WORKLOADS, of_images

__all__ = ["METHODS", "MlpOptions", "MlpOutcome", "MlpRun", "MlpStudy", "carry_out_run", "plan"]

EPOCHS = 50
QUICK_EPOCHS = 16
WORKLOAD = WORKLOADS["mlp"]


SGD = Peer(partial(PEERS["SGD"].make, momentum=0.0), {"lr": (0.03, 0.1, 0.3, 1.0)})
ADAM = Peer(PEERS["Adam"].make, {"lr": (0.0003, 0.001, 0.003, 0.01)})
METHODS = {
    "PLAIN+SGD": SGD,
    "PLAIN+ADAM": ADAM,
    "BNA+SGD": replace(SGD, normalization="after"),
    "BNA+ADAM": replace(ADAM, normalization="after"),
    "BNB+SGD": replace(SGD, normalization="before"),
    "BNB+ADAM": replace(ADAM, normalization="before"),
    "PLAIN+RNGD": Peer(PEERS["RNGD-published"].make, {"lr": (0.01, 0.03, 0.1, 0.3)}),
    "PLAIN+RNGD-DEFAULT": Peer(PEERS["RNGD"].make, {"lr": (0.003, 0.01, 0.03, 0.1)}),
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
    usual = {name: METHODS[name].grid["lr"] for name in methods}
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
        Supervised(WORKLOAD, data, scored=len(data.inputs)),
        partial(paper_network, method.normalization, generator),
        partial(method.make, lr=run.learning_rate),
        generator,
        Length(evaluations=epochs, iterations=epochs * (len(data.inputs) // WORKLOAD.batch_size)),
        report,
    )
