"""The diagonal alone: exact for embeddings, whose inputs are one-hot, and the only choice for the widest layers."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

import torch
from torch import Tensor

from relfisher.metric import DiagonalMetric, Metric
from relfisher.shapes import Float
from relfisher.structures.base import Structure
from relfisher.structures.inverse import Factor, Inversion
from relfisher.structures.state import Cost, Samples, State

__all__ = ["Diagonal"]


class Diagonal(Structure):
    """The diagonal of the shared block, mean_n x~_n^2: d numbers."""

    name = "diagonal"
    reads_sparse = True

    @property
    def alike(self) -> Hashable:
        """The class."""
        return self._alike(Diagonal)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return [*g, d]."""
        return {"metric": (*shape[:-2], shape[-1])}

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Return 1 per parameter for a step, and 2 per input for a refresh and for a sample."""
        inputs = math.prod(self.shapes(shape)["metric"])
        return Cost(math.prod(shape), 2 * inputs, 2 * inputs)

    def accumulate(self, totals: State, samples: Samples, *, keep: float, share: float) -> bool:
        """Add the squares of the inputs, regardless of the response; x~ may be sparse."""
        x, z = samples.x, samples.z
        if x.is_sparse:
            x = x.coalesce()
            total = z.new_zeros(x.shape[-1]).index_add_(0, x.indices()[1], x.values().square())
        else:
            total = x.square().sum(-2)
        if not math.isfinite(float(total.sum())):
            return False
        totals["metric"].mul_(keep).add_(total, alpha=share)
        return True

    def operator(self, state: State, shape: tuple[int, ...]) -> Metric:
        """Return the diagonal, repeated for each unit."""
        diagonal = self.average(state)["metric"].unsqueeze(-2).expand(shape)
        return DiagonalMetric(diagonal.reshape(-1), shape)

    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Factor]) -> Float[Tensor, "*g out d"]:
        """Scale the columns."""
        diagonal = factors["metric"]
        assert isinstance(diagonal, Tensor)  # a diagonal has no low-rank inverse
        return field * diagonal.unsqueeze(-2)

    def identity(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ones."""
        return torch.ones(size, dtype=dtype, device=device)

    def diagonals(self, blocks: Tensor) -> Tensor:
        """Return the tensor itself, which is the diagonal."""
        return blocks

    def without(self, blocks: Tensor, columns: Tensor) -> Tensor:
        """Return the diagonals with 1 in the given columns."""
        return blocks.masked_fill(columns, 1.0)

    def inverted(self, blocks: Tensor, amounts: Tensor, inversion: Inversion, *, root: bool) -> tuple[Tensor, Tensor]:
        """Return powers of the damped entries, and a flag for each block: whether it is good."""
        return inversion.diagonal(blocks, amounts, root=root)

    def transposed(self, blocks: Tensor) -> Tensor:
        """Return the diagonals unchanged, since they are symmetric."""
        return blocks
