"""The training loop of all studies, for a number of iterations or of seconds."""

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
    """Train one model for its length, or until its cost is not finite. Evaluation does not count as training time.

    Args:
        workload: defines the loss, the batch size and the validation metric.
        data: the samples.
        build: returns the model.
        make: returns its optimizer.
        generator: draws the mini-batches, after the model is built.
        length: the length of the run and its number of evaluations.
        report: receives the finished fraction and the mean of the latest costs, a hundred times per run.
        scored: the number of training samples for the final cost.

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
        validation.append(_mean(model, workload.validate, data.held_inputs, data.held_targets))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model = build()
        optimizer = make(model)
        drawn = batches(data, workload.batch_size, generator)
        if math.isfinite(length.seconds):
            # This warms torch up, equally for all methods.
            evaluate()
        while done < 1 and not _diverged(cost):
            start = clock()
            try:
                cost.append(iterate(optimizer, workload.loss, model, *next(drawn)))
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
