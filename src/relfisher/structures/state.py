"""What is kept of a layer, and what a batch tells of it: plain tensors by name."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from relfisher.responses import UnitResponse

__all__ = ["Cost", "Kept", "Samples", "State", "Statistics"]

State = dict[str, Tensor]


class Kept(NamedTuple):
    """A tensor that an owner (a structure, a step rule, the average) keeps of a layer: zeros until it is written.

    Args:
        shape: its shape.
        on_host: True for a few numbers that the host reads each time, and that stay there.
        dtype: None for that of the layer's metric.
    """

    shape: tuple[int, ...]
    on_host: bool = False
    dtype: torch.dtype | None = None

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor that stands for nothing kept yet."""
        return torch.zeros(self.shape, dtype=self.dtype or dtype, device="cpu" if self.on_host else device)


class Samples(NamedTuple):
    """The samples of a layer in one batch.

    Args:
        x: the augmented inputs, [*g, n, d].
        z: the pre-activations, [*g, n, out].
        response: of the units.
    """

    x: Tensor
    z: Tensor
    response: UnitResponse


class Cost(NamedTuple):
    """Floating-point operations of one layer: of a step, a refresh, and the statistics of one sample."""

    step: int
    refresh: int
    sample: int


class Statistics(NamedTuple):
    """The metric of a batch, summed over so many samples."""

    totals: State
    samples: int

    def __add__(self, other: Statistics) -> Statistics:  # type: ignore[override]  # a sum, not a longer tuple
        """Return the sum, made in place of the first."""
        for name, total in self.totals.items():
            total.add_(other.totals[name])
        return Statistics(self.totals, self.samples + other.samples)
