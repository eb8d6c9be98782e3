"""The diagonal alone: exact for an embedding, whose inputs are one-hot, and all that fits for the widest layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from relfisher.responses import UnitResponse
from relfisher.shapes import Float
from relfisher.structures.base import Cost, Form, State, Structure

__all__ = ["Diagonal"]


class Diagonal(Structure):
    """The diagonal of the shared block, mean_n x~_n^2: d numbers."""

    name = "diagonal"

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return [*g, d]."""
        return {"metric": (*shape[:-2], shape[-1])}

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Return 1 a parameter, and 2 an input for a refresh and for a sample."""
        inputs = math.prod(self.shapes(shape)["metric"])
        return Cost(math.prod(shape), 2 * inputs, 2 * inputs)

    def gather(self, x: Float[Tensor, "*g n d"], z: Float[Tensor, "*g n out"], response: UnitResponse) -> State:
        """Return the sum of x~_n^2, whatever the units respond; x~ may be sparse."""
        if x.is_sparse:
            x = x.coalesce()
            return {"metric": z.new_zeros(x.shape[-1]).index_add_(0, x.indices()[1], x.values().square())}
        return {"metric": x.square().sum(-2)}

    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Any]) -> Float[Tensor, "*g out d"]:
        """Scale the columns."""
        diagonal: Tensor = factors["metric"]
        return field * diagonal.unsqueeze(-2)

    def identity(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ones."""
        return torch.ones(size, dtype=dtype, device=device)

    def diagonals(self, blocks: Tensor) -> Tensor:
        """Return what is the diagonal already."""
        return blocks

    def without(self, blocks: Tensor, columns: Tensor) -> Tensor:
        """Return the blocks with 1 in those columns."""
        return blocks.masked_fill(columns, 1.0)

    def inverted(self, blocks: Tensor, damping: Tensor, form: Form) -> tuple[Tensor, bool]:
        """Return the reciprocals, or their square roots, and whether all of them are finite and positive."""
        damped = blocks + damping.unsqueeze(-1)
        inverse = damped.reciprocal() if form == "inverse" else damped.rsqrt()
        return inverse, bool(((damped > 0) & torch.isfinite(inverse)).all())

    def transposed(self, blocks: Tensor) -> Tensor:
        """Return the blocks, which are symmetric."""
        return blocks
