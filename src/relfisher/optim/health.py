"""Counts and warnings of failures; the weights are protected from them."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relfisher.optim.outcome import Outcome
from relfisher.optim.rules import Move, Step

__all__ = ["Health", "HealthWarning", "all_finite", "finite", "flags"]


class HealthWarning(UserWarning):
    """Warns of a non-finite value, a singular metric, an unreached layer or metrics that differ between processes."""


class Health:
    """Failure counts since the optimizer was created. Warns at the first failure of a kind, the 10th, the 100th, etc.

    Attributes:
        failed_refreshes: refreshes of a layer whose metric could not be factorized; the last good inverse stays in use.
        dropped_batches: batch metrics of a layer that were not finite and were left out of the average.
    """

    def __init__(self) -> None:
        self.failed_refreshes = 0
        self.dropped_batches = 0
        self._skipped_steps = 0
        self._followed: _Followed | None = None
        self._times: Counter[str] = Counter()

    def __repr__(self) -> str:
        """Return all counts."""
        return f"Health({', '.join(f'{name}={count}' for name, count in self._counts().items())})"

    def __eq__(self, other: object) -> bool:
        """Return whether all counts are equal."""
        return isinstance(other, Health) and self._counts() == other._counts()

    __hash__ = None  # type: ignore[assignment]  # counts change

    def _counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in ("skipped_steps", "failed_refreshes", "dropped_batches")}

    @property
    def skipped_steps(self) -> int:
        """Skipped steps, because a gradient or the step itself was not finite. Waits for the steps taken so far."""
        self.settle()
        return self._skipped_steps

    def skipped(self, iteration: int, reason: str) -> None:
        """Count a skipped step."""
        self._skipped_steps += 1
        self._say(iteration, f"step skipped: {reason}")

    def follow(self, iteration: int, outcome: Outcome) -> None:
        """Count a step that is skipped unless it is finite, without waiting for it."""
        taken = outcome.taken()
        if taken is not None:
            steps, before = (
                (0, taken.new_zeros((), dtype=torch.float32)) if self._followed is None else self._followed[1:]
            )
            self._followed = _Followed(iteration, steps + 1, before.to(taken.device) + taken)

    def settle(self) -> None:
        """Wait for the steps that are followed, and warn of those that were skipped."""
        if self._followed is not None:
            (iteration, steps, taken), self._followed = self._followed, None
            for _ in range(steps - int(taken)):
                self.skipped(iteration, "a gradient or the step itself is not finite")

    def failed(self, iteration: int, layer: str) -> None:
        """Count a metric that could not be factorized."""
        self.failed_refreshes += 1
        self._say(iteration, f"the metric of {layer} could not be factorised; its last good inverse stays in use")

    def dropped(self, iteration: int, layer: str) -> None:
        """Count a batch metric that was not finite."""
        self.dropped_batches += 1
        self._say(iteration, f"the batch metric of {layer} is not finite and was left out")

    def _say(self, iteration: int, message: str) -> None:
        self._times[message] += 1
        times = self._times[message]
        if times == 10 ** (len(str(times)) - 1):
            so_far = "" if times == 1 else f", {times} times so far"
            warnings.warn(
                f"{message} (iteration {iteration}{so_far}; counted in RNGD.health)", HealthWarning, stacklevel=5
            )


class _Followed(NamedTuple):
    """Steps that may have been skipped: the last iteration, their number, and how many were taken, on the device."""

    iteration: int
    steps: int
    taken: Tensor


def flags(moves: Sequence[Move], steps: Sequence[Step]) -> list[Tensor]:
    """Return booleans [] that are all true if the steps of some moves can be taken."""
    unchecked = [pair for pair in zip(moves, steps, strict=True) if pair[1].is_finite is None]
    known = [step.is_finite for step in steps if step.is_finite is not None]
    return known + finite([tensor for move, step in unchecked for tensor in (move.gradient, step.direction)])


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all values of some tensors are finite, which the host waits for."""
    return all(map(bool, finite(tensors)))


def finite(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return whether all values of some tensors are finite, for each device one boolean [] that it has."""
    if not tensors:
        return []
    values = [tensor._values() if tensor.is_sparse else tensor for tensor in tensors]
    by_device: dict[torch.device, list[Tensor]] = {}
    for each in values:
        if each.numel():
            by_device.setdefault(each.device, []).append(each)
    # Zero times what is not finite is not a number. The largest norm would take ten times as long on a CPU.
    nothing = [torch._foreach_norm(torch._foreach_mul(own, 0.0)) for own in by_device.values()]
    return [torch.stack(each).sum() == 0 for each in nothing]
