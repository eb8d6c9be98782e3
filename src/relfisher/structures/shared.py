"""The shared block: G = I (x) mean_n x~_n x~_n', one block for all units. Equation (22).

Exact for a linear layer. With no other choice in it, later work calls the step in this metric FOOF or ISAAC.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from relfisher.moments import fold_second_moments
from relfisher.responses import UnitResponse
from relfisher.shapes import Float
from relfisher.structures.base import Cost, State, Structure
from relfisher.structures.lowrank import check_rank, times

__all__ = ["SharedBlock"]


class SharedBlock(Structure):
    """One block of d^2 numbers that all units of the layer, or of a group, share.

    Args:
        rank: see `Structure`.

    Raises:
        ValueError: if the rank is not positive.
    """

    name = "shared"

    def __init__(self, rank: int | None = None) -> None:
        check_rank(rank)
        self.rank = rank

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return [*g, d, d]."""
        return {"metric": (*shape[:-2], shape[-1], shape[-1])}

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Return 2 d^2 a unit, d^3 and 2 d^2 a group; 4 d r and 6 d^2 r with an inverse of rank r."""
        *groups, out, d = shape
        count = math.prod(groups)
        return Cost(count * out * self.product_cost(d), count * self.inversion_cost(d), 2 * count * d**2)

    def gather(self, x: Float[Tensor, "*g n d"], z: Float[Tensor, "*g n out"], response: UnitResponse) -> State:
        """Return the sum of x~_n x~_n', whatever the units respond."""
        return {"metric": x.mT @ x}

    def fold(
        self,
        state: State,
        x: Float[Tensor, "*g n d"],
        z: Float[Tensor, "*g n out"],
        response: UnitResponse,
        decay: float,
    ) -> bool:
        """Add the product of the inputs to the moving average as it is made."""
        if not fold_second_moments(state["metric"], x, keep=decay, share=(1 - decay) / x.shape[-2]):
            return False
        self.age(state, decay)
        return True

    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Any]) -> Float[Tensor, "*g out d"]:
        """Multiply all rows by the block."""
        return times(field, factors["metric"])
