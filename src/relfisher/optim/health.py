"""Counts and warnings of failures; the weights are protected from them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

__all__ = ["Health", "HealthWarning", "all_finite"]


class HealthWarning(UserWarning):
    """Warns of a non-finite value, a singular metric, an unreached layer or metrics that differ between processes."""


@dataclass
class Health:
    """Failure counts since the optimizer was created. Warns at the first failure of a kind, the 10th, the 100th, etc.

    Attributes:
        skipped_steps: skipped steps, because a gradient or the step itself was not finite.
        failed_refreshes: refreshes of a layer whose metric could not be factorized; the last good inverse stays in use.
        dropped_batches: batch metrics of a layer that were not finite and were left out of the average.
    """

    skipped_steps: int = 0
    failed_refreshes: int = 0
    dropped_batches: int = 0
    _times: Counter[str] = field(default_factory=Counter, repr=False, compare=False)

    def skipped(self, iteration: int, reason: str) -> None:
        """Count a skipped step."""
        self.skipped_steps += 1
        self._say(iteration, f"step skipped: {reason}")

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


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether all gradients are finite."""
    values = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    if not values or math.isfinite(get_total_norm(values)):
        return True
    # The norm of large finite values may overflow.
    return all(bool(torch.isfinite(gradient).all()) for gradient in values)
