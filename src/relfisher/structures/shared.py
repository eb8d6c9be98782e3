"""The shared block: G = I (x) mean_n x~_n x~_n', one block for all units. Equation (22).

Exact for a linear layer. In later work, the step in this metric without further options is called FOOF or ISAAC.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

from torch import Tensor

from relfisher.metric import Metric
from relfisher.shapes import Float
from relfisher.structures.base import Structure
from relfisher.structures.inverse import Factor, check_rank, times
from relfisher.structures.operator import block_operator
from relfisher.structures.state import Cost, Samples, State

__all__ = ["SharedBlock"]


class SharedBlock(Structure):
    """One block of d^2 numbers, shared by all units of the layer or of a group.

    Args:
        rank: see `Structure`.

    Raises:
        ValueError: if the rank is not positive.
    """

    name = "shared"

    def __init__(self, rank: int | None = None) -> None:
        check_rank(rank)
        self.rank = rank

    @property
    def alike(self) -> Hashable:
        """The class and the rank."""
        return self._alike(SharedBlock, self.rank)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return [*g, d, d], or the shape of a sketch."""
        return {"metric": self.block(shape[:-2], shape[-1])}

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Return 2 d^2 per unit, d^3 and 2 d^2 per group; 4 d r, 20 d r^2 and 8 d r with an inverse of rank r."""
        *groups, out, d = shape
        count = math.prod(groups)
        return Cost(count * out * self.product_cost(d), count * self.inversion_cost(d), count * self.sample_cost(d))

    def accumulate(self, totals: State, samples: Samples, *, keep: float, share: float) -> bool:
        """Add the products of the inputs, regardless of the response."""
        return self.add(totals["metric"], samples.x, keep=keep, share=share)

    def operator(self, state: State, shape: tuple[int, ...]) -> Metric:
        """Return the block, repeated for each unit."""
        return block_operator(self.dense(self.average(state)["metric"]), shape)

    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Factor]) -> Float[Tensor, "*g out d"]:
        """Multiply all rows by the block."""
        return times(field, factors["metric"])
