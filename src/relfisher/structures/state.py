"""The state of a layer, and the statistics of a batch: plain tensors by name."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from relfisher.responses import UnitResponse

__all__ = ["Cost", "Kept", "Samples", "State", "Statistics", "factor_key", "scale_key"]

State = dict[str, Tensor]


class Kept(NamedTuple):
    """A tensor that an owner (a structure, a step rule, the average) keeps for a layer; zeros until it is written.

    Args:
        shape: its shape.
        on_host: True for a few numbers that the host reads at each step and that stay in its memory.
        dtype: None for the dtype of the layer's metric.
        parted: True if it has an entry for each of a parameter; a process that holds a part of these holds as much.
    """

    shape: tuple[int, ...]
    on_host: bool = False
    dtype: torch.dtype | None = None
    parted: bool = False

    def zeros(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the initial tensor, filled with zeros."""
        return torch.zeros(self.shape, dtype=self.dtype or dtype, device="cpu" if self.on_host else device)


class Samples(NamedTuple):
    """The samples of a layer in one batch.

    Args:
        x: the augmented inputs, [*g, n, d].
        z: the pre-activations, [*g, n, out].
        response: the response of the units.
    """

    x: Tensor
    z: Tensor
    response: UnitResponse


class Cost(NamedTuple):
    """Floating-point operations for one layer: for a step, a refresh, and the statistics of one sample."""

    step: int
    refresh: int
    sample: int


class Statistics(NamedTuple):
    """The metric of a batch, summed over its samples."""

    totals: State
    samples: int

    def __add__(self, other: Statistics) -> Statistics:  # type: ignore[override]  # a sum, not concatenation
        """Return the sum, computed in place of the first operand."""
        for name, total in self.totals.items():
            total.add_(other.totals[name])
        return Statistics(self.totals, self.samples + other.samples)


def factor_key(name: str, *, root: bool) -> str:
    """Return the key of the factor of a tensor."""
    form = "root" if root else "inverse"
    return form if name == "metric" else f"{name}_{form}"


def scale_key(key: str) -> str:
    """Return the key of the scale of a low-rank factor."""
    return f"{key}_scale"
