"""The training loop of every study, for a number of iterations or of seconds."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # torch does not list it

from relfisher.studies.executor import Reporter
from relfisher.studies.runs import Record
from relfisher.studies.workloads import Samples, Workload, batches

__all__ = ["Length", "iterate", "state_bytes", "train"]

EVALUATED_AT_ONCE = 500
REPORTS = 100
SHOWN = 100


@dataclass(frozen=True)
class Length:
    """How long a run lasts, in iterations or in seconds of training, and how often it is evaluated on the way."""

    evaluations: int
    iterations: float = math.inf
    seconds: float = math.inf

    def done(self, iterations: int, seconds: float) -> float:
        """Return how much of the run is over, from 0 to 1 or a little more."""
        return max(iterations / self.iterations, seconds / self.seconds)


def iterate(optimizer: torch.optim.Optimizer, loss: Callable[..., Tensor], *arguments: object) -> float:
    """Take one training iteration: zero_grad, forward, backward and step.

    Args:
        optimizer: Trains a model.
        loss: Returns the loss of the model on a mini-batch.
        arguments: What it is called with.

    Returns:
        The loss before the step.
    """
    optimizer.zero_grad()
    value = loss(*arguments)
    value.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    optimizer.step()
    return float(value.detach())


def train(
    workload: Workload,
    data: Samples,
    build: Callable[[], nn.Module],
    make: Callable[[nn.Module], torch.optim.Optimizer],
    generator: torch.Generator,
    length: Length,
    report: Reporter,
    *,
    scored: int,
) -> Record:
    """Train one model, until its length is over or its cost is not finite; evaluation is not in its seconds.

    Args:
        workload: Says the loss, the batch size and what validation measures.
        data: What is trained on.
        build: Returns the model.
        make: Returns its optimizer.
        generator: Draws the mini-batches, once the model is built.
        length: How long, and how often it is evaluated.
        report: Is told a hundred times how far the run is, and the mean of the latest costs.
        scored: How many training samples the cost at the end is of.

    Returns:
        Cost and training time of every iteration, and what each evaluation found.
    """
    cost: list[float] = []
    seconds: list[float] = []
    validation: list[float] = []
    evaluated: list[int] = []
    clock = done = 0.0

    def evaluate() -> None:
        evaluated.append(len(cost))
        validation.append(_mean(model, workload.validate, data.held_inputs, data.held_targets))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model = build()
        optimizer = make(model)
        drawn = batches(data, workload.batch_size, generator)
        if math.isfinite(length.seconds):
            # It warms torch up, for every method alike.
            evaluate()
        while done < 1 and not _diverged(cost):
            start = time.perf_counter()
            try:
                cost.append(iterate(optimizer, workload.loss, model, *next(drawn)))
            except LinAlgError as error:
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)
                cost.append(math.nan)
            clock += time.perf_counter() - start
            seconds.append(clock)
            before, done = done, length.done(len(cost), clock)
            if _passed(before, done, length.evaluations) and not _diverged(cost):
                evaluate()
            if _passed(before, done, REPORTS) or _diverged(cost):
                report(min(1.0, done), float(np.mean(cost[-SHOWN:])))
    return Record(
        cost=np.array(cost, dtype=np.float32),
        seconds=np.array(seconds),
        validation=np.array(validation),
        full_cost=_mean(model, workload.loss, data.inputs[:scored], data.targets[:scored]),
        diverged=_diverged(cost),
        threads=torch.get_num_threads(),
        warnings=tuple(sorted({str(warning.message) for warning in caught})),
        evaluated=tuple(evaluated),
        state_bytes=state_bytes(optimizer),
    )


def _diverged(cost: list[float]) -> bool:
    return bool(cost) and not math.isfinite(cost[-1])


def _passed(before: float, done: float, marks: int) -> bool:
    """Return whether one of so many marks, at equal distances, lies between two places of a run."""
    # The last of several equal parts may end just below 1.
    return math.floor(before * marks + 1e-9) < math.floor(done * marks + 1e-9)


@torch.no_grad()
def _mean(model: nn.Module, measure: Callable[[nn.Module, Tensor, Tensor], Tensor | float], *both: Tensor) -> float:
    """Return the mean of a measure over all samples, as the trained model sees them."""
    model.eval()
    parts = list(zip(*(torch.split(part, EVALUATED_AT_ONCE) for part in both), strict=True))
    total = sum(float(measure(model, *part)) * len(part[0]) for part in parts)
    model.train()
    return total / len(both[0])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Count what an optimizer keeps from one step to the next.

    Args:
        optimizer: It has taken a step.

    Returns:
        The bytes of all tensors that it holds, in `state` or elsewhere, besides parameters and their gradients.
    """
    own = {
        part for group in optimizer.param_groups for p in group["params"] for part in (p, p.grad) if part is not None
    }
    excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _held(optimizer)}
    return sum(size for pointer, size in storages.items() if pointer not in excluded)


def _held(root: object) -> list[Tensor]:
    """Return the tensors that can be reached from an object without going through a module."""
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, nn.Module | type):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            waiting += item.values()
        elif isinstance(item, list | tuple | set | frozenset):
            waiting += item
        else:
            waiting += getattr(item, "__dict__", {}).values()
    return found
