"""Section 5.2 of the paper: a ReLU network on digits, trained by SGD, Adam and RNGD, with and without batch norm."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import relfisher
from relfisher.studies.data import Dataset, load
from relfisher.studies.jobs import Reporter
from relfisher.studies.runs import Record, Run

__all__ = ["BATCH_SIZE", "METHODS", "Method", "Normalization", "Trainer", "network", "train"]

WIDTHS = (784, 64, 64, 64, 10)
BATCH_SIZE = 50
INITIAL_STD = 0.1
BATCH_NORM_EPSILON = 1e-3
CHECK_INTERVAL = 100

Normalization = Literal["none", "after", "before"]


@dataclass(frozen=True)
class Method:
    """A row of the comparison: where batch norm stands, the optimizer, and its learning-rate candidates."""

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
class Trainer:
    """Carries out runs on one data set, which each process loads for itself."""

    source: str

    def __call__(self, run: Run, report: Reporter) -> Record:
        """Trains one network; see `train`."""
        return train(run, load(self.source), report)


def network(
    normalization: Normalization, generator: torch.Generator, activation: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    """The paper's network; batch norm, where it is wanted, stands before or after each hidden activation.

    Args:
        normalization: Where batch norm stands.
        generator: Draws the weights and biases; batch norm draws nothing, so all variants start with the same ones.
        activation: Makes the units of a hidden layer.

    Returns:
        The network, from images `[n, 784]` to logits `[n, 10]`.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(WIDTHS):
        linear = nn.Linear(inputs, outputs)
        for parameter in linear.parameters():
            nn.init.trunc_normal_(
                parameter, std=INITIAL_STD, a=-2 * INITIAL_STD, b=2 * INITIAL_STD, generator=generator
            )
        layers.append(linear)
        if outputs == WIDTHS[-1]:
            break
        if normalization == "before":
            layers.append(nn.BatchNorm1d(outputs, eps=BATCH_NORM_EPSILON))
        layers.append(activation())
        if normalization == "after":
            layers.append(nn.BatchNorm1d(outputs, eps=BATCH_NORM_EPSILON))
    return nn.Sequential(*layers)


def train(run: Run, data: Dataset, report: Reporter) -> Record:
    """Trains one network, until its epochs are over or its cost is not finite.

    Args:
        run: The method, learning rate and seed; its settings must have `epochs`.
        data: The images; those that do not fill an epoch's last mini-batch are left out of that epoch.
        report: Is told every hundred iterations how far the run is, and their mean cost.

    Returns:
        The mini-batch cost and the training time of every iteration, the validation accuracy of every epoch, and the
        cost of all training images at the end.
    """
    method = METHODS[run.method]
    epochs = int(dict(run.settings)["epochs"])
    batches = len(data.train_labels) // BATCH_SIZE
    generator = torch.Generator().manual_seed(run.seed)
    model = network(method.normalization, generator)
    optimizer = method.optimizer(model, run.learning_rate)
    curve = _Curve(epochs * batches, report)
    validation: list[float] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(epochs):
            order = torch.randperm(len(data.train_labels), generator=generator)
            _epoch(model, optimizer, data, order[: batches * BATCH_SIZE].view(batches, BATCH_SIZE), curve)
            if curve.diverged:
                break
            validation.append(_accuracy(model, data))
    return Record(
        cost=curve.cost[: curve.iteration].numpy(),
        seconds=curve.seconds[: curve.iteration],
        validation=np.array(validation),
        full_cost=_full_cost(model, data),
        diverged=curve.diverged,
        threads=torch.get_num_threads(),
        warnings=tuple(sorted({str(warning.message) for warning in caught})),
    )


class _Curve:
    """The cost and the training time of each iteration, looked at only now and then since looking takes time."""

    def __init__(self, iterations: int, report: Reporter) -> None:
        self.cost = torch.zeros(iterations)
        self.seconds = np.zeros(iterations)
        self.iteration = 0
        self.diverged = False
        self._report = report

    def append(self, cost: Tensor, seconds: float) -> None:
        self.cost[self.iteration] = cost
        self.seconds[self.iteration] = seconds
        self.iteration += 1
        if self.iteration % CHECK_INTERVAL == 0 or self.iteration == len(self.cost):
            self._check()

    def _check(self) -> None:
        recent = self.cost[max(0, self.iteration - CHECK_INTERVAL) : self.iteration]
        mean = float(recent.mean())
        if not math.isfinite(mean):
            self.diverged = True
        self._report(self.iteration / len(self.cost), mean)


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Dataset, batches: Tensor, curve: _Curve) -> None:
    model.train()
    before = curve.seconds[curve.iteration - 1] if curve.iteration else 0.0
    start = time.perf_counter() - before
    for batch in batches:
        optimizer.zero_grad()
        cost = cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
        cost.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        optimizer.step()
        curve.append(cost.detach(), time.perf_counter() - start)
        if curve.diverged:
            return


def _full_cost(model: nn.Module, data: Dataset) -> float:
    model.eval()
    with torch.no_grad():
        return float(cross_entropy(model(data.train_images), data.train_labels))


def _accuracy(model: nn.Module, data: Dataset) -> float:
    model.eval()
    with torch.no_grad():
        predicted = model(data.validation_images).argmax(dim=1)
    return float((predicted == data.validation_labels).double().mean())
