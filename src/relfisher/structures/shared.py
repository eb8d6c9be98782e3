"""The shared block: G = I (x) mean_n x~_n x~_n', one block for all units. Equation (22).

Exact for a linear layer. With no other choice in it, later work calls the step in this metric FOOF or ISAAC.
"""

from __future__ import annotations

from torch import Tensor

from relfisher.responses import UnitResponse
from relfisher.shapes import Float
from relfisher.structures.base import State, Structure

__all__ = ["SharedBlock"]


class SharedBlock(Structure):
    """One block of d^2 numbers that all units of the layer share."""

    def gather(
        self, augmented: Float[Tensor, "n d"], z: Float[Tensor, "n out"], response: UnitResponse
    ) -> Float[Tensor, "d d"]:
        """Return the sum of x~_n x~_n', whatever the units respond."""
        return augmented.T @ augmented

    def shape(self, out: int, d: int) -> tuple[int, ...]:
        """Return [d, d]."""
        return (d, d)

    def precondition(self, state: State, gradient: Float[Tensor, "out d"]) -> Float[Tensor, "out d"]:
        """Multiply the gradient by the inverse from the right."""
        return gradient @ state["inverse"]
