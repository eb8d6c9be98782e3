"""Exact neuron blocks: G = diag(G_1 ... G_out) with G_i = mean_n nu_i(z_n) x~_n x~_n'. Equations (23), (31)."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping

from torch import Tensor

from relfisher.metric import Metric
from relfisher.moments import add_weighted_second_moments
from relfisher.shapes import Float
from relfisher.structures.base import Structure
from relfisher.structures.inverse import Factor, times
from relfisher.structures.operator import block_operator
from relfisher.structures.state import Cost, Samples, State

__all__ = ["NeuronBlocks"]


class NeuronBlocks(Structure):
    """One block per unit: exact for every layer whose units respond independently; out * d^2 numbers."""

    name = "neuron"

    @property
    def alike(self) -> Hashable:
        """The class."""
        return self._alike(NeuronBlocks)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return [*g, out, d, d]."""
        return {"metric": (*shape, shape[-1])}

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Return 2 d^2, d^3 and 2 d^2 per unit."""
        units, d = math.prod(shape[:-1]), shape[-1]
        return Cost(2 * units * d**2, units * d**3, 2 * units * d**2)

    def accumulate(self, totals: State, samples: Samples, *, keep: float, share: float) -> bool:
        """Weight each sample's outer product by nu_i(z_n), for each unit i."""
        x, nu = samples.x, samples.response.information(samples.z)
        # A unit's diagonal bounds all entries of its block.
        if not math.isfinite(float((nu.mT @ x.square()).sum())):
            return False
        moments = totals["metric"]
        if x.ndim == 2:
            add_weighted_second_moments(moments, nu, x, keep=keep, share=share)
        elif nu.shape[-1] == 1:
            moments.mul_(keep).add_(((x * nu).mT @ x).unsqueeze(1), alpha=share)
        else:
            for group, weights, inputs in zip(moments, nu, x, strict=True):
                add_weighted_second_moments(group, weights, inputs, keep=keep, share=share)
        return True

    def operator(self, state: State, shape: tuple[int, ...]) -> Metric:
        """Return the direct sum of the units' blocks."""
        return block_operator(self.average(state)["metric"], shape)

    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Factor]) -> Float[Tensor, "*g out d"]:
        """Multiply each unit's row by its own block."""
        return times(field.unsqueeze(-2), factors["metric"]).squeeze(-2)
