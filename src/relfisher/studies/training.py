"""The training loop of all studies, for a number of iterations or of seconds."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]  # torch does not list it

from relfisher.studies.executor import Reporter
from relfisher.studies.runs import Record
from relfisher.studies.workloads import Samples, Workload, batches

__all__ = ["Length", "Pace", "Supervised", "Task", "iterate", "state_bytes", "train"]

EVALUATED_AT_ONCE = 500
REPORTS = 100
SHOWN = 100

#: Adapts an optimizer before a step to the finished fraction of the run, from 0 to 1.
Pace = Callable[[torch.optim.Optimizer, float], None]


@runtime_checkable
class Task(Protocol):
    """What a model trains on, and how good it is."""

    def draws(self, generator: torch.Generator) -> Iterator[tuple[Any, ...]]:
        """Yield what each iteration trains on, without end."""

    def iterate(self, optimizer: torch.optim.Optimizer, model: nn.Module, *drawn: Any) -> float:
        """Perform one training iteration, and return the cost before the step."""

    def validate(self, model: nn.Module) -> float:
        """Return the validation of a model."""

    def cost(self, model: nn.Module) -> float:
        """Return the final cost of a model."""


@dataclass(frozen=True)
class Length:
    """The length of a run, in iterations or in seconds of training, and the number of evaluations during it."""

    evaluations: int
    iterations: float = math.inf
    seconds: float = math.inf

    def done(self, iterations: int, seconds: float) -> float:
        """Return the finished fraction of the run, from 0 to 1 or slightly more."""
        return max(iterations / self.iterations, seconds / self.seconds)


def iterate(optimizer: torch.optim.Optimizer, loss: Callable[..., Tensor], *arguments: object) -> float:
    """Perform one training iteration: zero_grad, forward, backward and step.

    Args:
        optimizer: the optimizer of the model.
        loss: returns the loss of the model on a mini-batch.
        arguments: the arguments of the loss.

    Returns:
        The loss before the step.
    """
    optimizer.zero_grad()
    value = loss(*arguments)
    value.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    optimizer.step()
    return float(value.detach())


@dataclass(frozen=True)
class Supervised:
    """A workload with its samples; the final cost is that of the first `scored` training samples."""

    workload: Workload
    data: Samples
    scored: int

    def draws(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield mini-batches."""
        return batches(self.data, self.workload.batch_size, generator)

    def iterate(self, optimizer: torch.optim.Optimizer, model: nn.Module, *drawn: Tensor) -> float:
        """Perform one training iteration, and return the loss before the step."""
        return iterate(optimizer, self.workload.loss, model, *drawn)

    def validate(self, model: nn.Module) -> float:
        """Return the mean validation of the held-out samples."""
        return _mean(model, self.workload.validate, self.data.held_inputs, self.data.held_targets)

    def cost(self, model: nn.Module) -> float:
        """Return the mean loss of training samples."""
        return _mean(model, self.workload.loss, self.data.inputs[: self.scored], self.data.targets[: self.scored])


def train(
    task: Task,
    build: Callable[[], nn.Module],
    make: Callable[[nn.Module], torch.optim.Optimizer],
    generator: torch.Generator,
    length: Length,
    report: Reporter,
    pace: Pace | None = None,
) -> Record:
    """Train one model for its length, or until its cost is not finite. Evaluation does not count as training time.

    Args:
        task: what it trains on.
        build: returns the model.
        make: returns its optimizer.
        generator: draws what each iteration trains on, after the model is built.
        length: the length of the run and its number of evaluations.
        report: receives the finished fraction and the mean of the latest costs, a hundred times per run.
        pace: adapts the optimizer to the finished fraction of the run; its time counts.

    Returns:
        The cost and training time of every iteration, and the result of each evaluation.
    """
    cost: list[float] = []
    seconds: list[float] = []
    validation: list[float] = []
    evaluated: list[int] = []
    spent = done = 0.0
    # Other processes do not slow the clock of a run with one thread.
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def evaluate() -> None:
        evaluated.append(len(cost))
        validation.append(task.validate(model))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model = build()
        optimizer = make(model)
        drawn = task.draws(generator)
        if math.isfinite(length.seconds):
            # This warms torch up, equally for all methods.
            evaluate()
        while done < 1 and not _diverged(cost):
            start = clock()
            try:
                if pace is not None:
                    pace(optimizer, done)
                cost.append(task.iterate(optimizer, model, *next(drawn)))
            except LinAlgError as error:
                warnings.warn(str(error), RuntimeWarning, stacklevel=2)
                cost.append(math.nan)
            spent += clock() - start
            seconds.append(spent)
            before, done = done, length.done(len(cost), spent)
            if _passed(before, done, length.evaluations) and not _diverged(cost):
                evaluate()
            if _passed(before, done, REPORTS) or _diverged(cost):
                report(min(1.0, done), float(np.mean(cost[-SHOWN:])))
    return Record(
        cost=np.array(cost, dtype=np.float32),
        seconds=np.array(seconds),
        validation=np.array(validation),
        full_cost=task.cost(model),
        diverged=_diverged(cost),
        threads=torch.get_num_threads(),
        warnings=tuple(sorted({str(warning.message) for warning in caught})),
        evaluated=tuple(evaluated),
        state_bytes=state_bytes(optimizer),
    )


def _diverged(cost: list[float]) -> bool:
    return bool(cost) and not math.isfinite(cost[-1])


def _passed(before: float, done: float, marks: int) -> bool:
    """Return whether one of `marks` equidistant marks lies between two points of a run."""
    # The last of several equal parts may end just below 1.
    return math.floor(before * marks + 1e-9) < math.floor(done * marks + 1e-9)


@torch.no_grad()
def _mean(model: nn.Module, measure: Callable[[nn.Module, Tensor, Tensor], Tensor | float], *both: Tensor) -> float:
    """Return the mean of a measure over all samples, with the model in evaluation mode."""
    model.eval()
    parts = list(zip(*(torch.split(part, EVALUATED_AT_ONCE) for part in both), strict=True))
    total = sum(float(measure(model, *part)) * len(part[0]) for part in parts)
    model.train()
    return total / len(both[0])


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Return the size of an optimizer's state.

    Args:
        optimizer: an optimizer that has taken a step.

    Returns:
        The bytes of all tensors that it holds, in `state` or elsewhere, except for parameters and their gradients.
    """
    own = {
        part for group in optimizer.param_groups for p in group["params"] for part in (p, p.grad) if part is not None
    }
    excluded = {tensor.untyped_storage().data_ptr() for tensor in own}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in _held(optimizer)}
    return sum(size for pointer, size in storages.items() if pointer not in excluded)


def _held(root: object) -> list[Tensor]:
    """Return the tensors that can be reached from an object without passing through a module."""
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
