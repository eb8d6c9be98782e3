"""Exact neuron blocks: G = diag(G_1 ... G_out) with G_i = mean_n nu_i(z_n) x~_n x~_n'. Equations (23), (31)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from relfisher.moments import fold_weighted_second_moments, is_narrow, weighted_second_moments
from relfisher.responses import UnitResponse
from relfisher.shapes import Float
from relfisher.structures.base import Cost, State, Structure

__all__ = ["NeuronBlocks"]


class NeuronBlocks(Structure):
    """One block a unit: exact for every layer whose units respond independently; out * d^2 numbers."""

    name = "neuron"

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return [*g, out, d, d]."""
        return {"metric": (*shape, shape[-1])}

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Return 2 d^2, d^3 and 2 d^2 a unit."""
        units, d = math.prod(shape[:-1]), shape[-1]
        return Cost(2 * units * d**2, units * d**3, 2 * units * d**2)

    def gather(self, x: Float[Tensor, "*g n d"], z: Float[Tensor, "*g n out"], response: UnitResponse) -> State:
        """Return the sum of nu_i(z_n) x~_n x~_n' for each unit i."""
        nu = response.information(z)
        if x.ndim == 2:
            return {"metric": weighted_second_moments(nu, x)}
        if nu.shape[-1] == 1:
            return {"metric": ((x * nu).mT @ x).unsqueeze(1)}
        return {"metric": torch.stack([weighted_second_moments(*group) for group in zip(nu, x, strict=True)])}

    def fold(
        self,
        state: State,
        x: Float[Tensor, "*g n d"],
        z: Float[Tensor, "*g n out"],
        response: UnitResponse,
        decay: float,
    ) -> bool:
        """Add the products of narrow blocks to the moving average as they are made."""
        if x.ndim != 2 or not is_narrow(x):
            return super().fold(state, x, z, response, decay)
        nu = response.information(z)
        # Each entry is bounded by a unit's diagonal.
        if not math.isfinite(float((nu.mT @ x.square()).sum())):
            return False
        fold_weighted_second_moments(state["metric"], nu, x, keep=decay, share=(1 - decay) / x.shape[-2])
        self.age(state, decay)
        return True

    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Any]) -> Float[Tensor, "*g out d"]:
        """Multiply each unit's row by its own block."""
        blocks: Tensor = factors["metric"]
        return (field.unsqueeze(-2) @ blocks).squeeze(-2)
