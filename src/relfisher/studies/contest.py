"""A race by validation: each method's best configuration for equally many epochs, against the best peer's best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from relfisher.studies.cells import Options, Result
from relfisher.studies.contestants import CONTESTANTS
from relfisher.studies.engine import Outcome, Study
from relfisher.studies.executor import Reporter
from relfisher.studies.runs import Record
from relfisher.studies.training import Length, Supervised, train
from relfisher.studies.tuned import TunedRun
from relfisher.studies.workloads import WORKLOADS, Samples, samples

__all__ = [
    "CONTESTS",
    "Contest",
    "ContestOptions",
    "ContestOutcome",
    "ContestRun",
    "ContestStudy",
    "carry_out_run",
    "plan",
]

NETWORKS = tuple(name for name in CONTESTANTS if name != "BNB+AdamW")
LANGUAGE = tuple(name for name in NETWORKS if name not in {"Shampoo", "K-FAC"})


@dataclass(frozen=True)
class Contest:
    """The methods on a workload, the number of epochs and of training samples, and of seeds.

    Validation is measured `evaluations` times in an epoch. `samples` of 0 are all.
    """

    workload: str
    epochs: int
    samples: int = 0
    seeds: int = 3
    evaluations: int = 1
    methods: tuple[str, ...] = NETWORKS


CONTESTS = {
    "mlp": Contest("mlp", 30, 12_000, methods=tuple(CONTESTANTS)),
    "mlp-tanh": Contest("mlp-tanh", 30, 12_000, methods=tuple(CONTESTANTS)),
    "mlp-sigmoid": Contest("mlp-sigmoid", 30, 12_000, methods=tuple(CONTESTANTS)),
    "cnn": Contest("cnn", 8, 6_000, seeds=2),
    "resnet": Contest("resnet", 8, 12_000, seeds=2),
    "vit": Contest("vit", 8, 12_000, seeds=2),
    "lora": Contest("lora", 6, 6_000, seeds=2),
    "table": Contest("table", 40, seeds=5),
    "values": Contest("values", 40, seeds=5),
    "autoencoder": Contest("autoencoder", 40, 6_000, seeds=2),
    "characters": Contest("characters", 1, 16_000, seeds=2, evaluations=20, methods=LANGUAGE),
    "gpt": Contest("gpt", 1, 16_000, seeds=2, evaluations=20, methods=LANGUAGE),
    "lstm": Contest("lstm", 1, 16_000, seeds=2, evaluations=20, methods=LANGUAGE),
}


@dataclass(frozen=True)
class ContestOptions(Options):
    """The options that all runs share."""

    workload: str
    batch_size: int
    epochs: int
    samples: int
    evaluations: int


class ContestRun(TunedRun[ContestOptions]):
    """A run of a race by validation."""


@dataclass(frozen=True)
class ContestStudy(Study[ContestRun]):
    """A race by validation."""

    name: str
    methods: tuple[str, ...]
    seeds: int
    options: ContestOptions

    @property
    def groups(self) -> tuple[str, ...]:
        """The names of the methods."""
        return self.methods

    @property
    def higher_is_better(self) -> bool:
        """Whether validation is an accuracy."""
        return WORKLOADS[self.options.workload].higher_is_better

    def score(self, result: Result) -> float:
        """Return the best validation of a run, with the sign that makes the lowest the best."""
        if not isinstance(result, Record) or result.diverged:
            return result.score
        return -float(result.validation.max()) if self.higher_is_better else float(result.validation.min())

    def candidates(self, group: str) -> list[ContestRun]:
        """Return the runs of all configurations of a method with the first seed."""
        return [self._run(group, **options) for options in CONTESTANTS[group].configurations]

    def repeats(self, best: ContestRun) -> list[ContestRun]:
        """Return the runs of a configuration, one per seed."""
        return [replace(best, seed=seed) for seed in range(self.seeds)]

    def _run(self, method: str, lr: float, **others: float) -> ContestRun:
        return ContestRun(f"validation-{self.name}", method, lr, 0, self.options, tuple(others.items()))


ContestOutcome = Outcome[ContestStudy, ContestRun, Record]


def plan(
    name: str,
    source: str,
    *,
    methods: tuple[str, ...],
    seeds: int | None = None,
    epochs: int | None = None,
    most: int | None = None,
) -> ContestStudy:
    """Return the study of a race by validation.

    Args:
        name: a key of `CONTESTS`.
        source: the data set of images.
        methods: some of its methods.
        seeds: the number of runs of each chosen configuration, if not its own.
        epochs: the number of epochs, if not its own.
        most: the number of training samples, if not its own; 0 for all.

    Returns:
        The study.
    """
    contest = CONTESTS[name]
    workload = WORKLOADS[contest.workload]
    data = samples(workload.kind, source)
    options = ContestOptions(
        data.name,
        data.fingerprint,
        contest.workload,
        workload.batch_size,
        epochs or contest.epochs,
        len(_cut(data, contest.samples if most is None else most).inputs),
        contest.evaluations,
    )
    return ContestStudy(name, methods, seeds or contest.seeds, options)


def carry_out_run(source: str, run: ContestRun, report: Reporter) -> Record:
    """Train one model for its epochs, or until its loss is not finite.

    Args:
        source: the data set of images, which this process loads itself.
        run: the method, its options and the seed.
        report: receives the progress of the run.

    Returns:
        The loss and training time of every iteration, and the result of each evaluation.
    """
    options, peer = run.options, CONTESTANTS[run.method]
    workload = WORKLOADS[options.workload]
    data = _cut(samples(workload.kind, source), options.samples)
    iterations = options.epochs * (len(data.inputs) // workload.batch_size)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = peer.make(model, **run.configuration)
        if peer.scheduled:
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
            optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    return train(
        Supervised(workload, data, scored=workload.batch_size),
        partial(workload.build, run.seed, peer.normalization),
        make,
        torch.Generator().manual_seed(run.seed),
        Length(evaluations=options.epochs * options.evaluations, iterations=iterations),
        report,
    )


def _cut(data: Samples, most: int) -> Samples:
    """Return evenly spaced samples for training, since images may be sorted by class; all for 0."""
    count = len(data.inputs)
    if not 0 < most < count:
        return data
    places = torch.arange(most) * count // most
    return replace(data, inputs=data.inputs[places], targets=data.targets[places])
