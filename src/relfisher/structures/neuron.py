"""Exact neuron blocks: G = diag(G_1 ... G_out) with G_i = mean_n nu_i(z_n) x~_n x~_n'. Equations (23), (31)."""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.moments import weighted_second_moments
from relfisher.responses import UnitResponse
from relfisher.shapes import Float
from relfisher.structures.base import State, Structure

__all__ = ["NeuronBlocks"]


class NeuronBlocks(Structure):
    """One block a unit: exact for every layer whose units respond independently; out * d^2 numbers."""

    def gather(
        self, augmented: Float[Tensor, "n d"], z: Float[Tensor, "n out"], response: UnitResponse
    ) -> Float[Tensor, "out d d"]:
        """Return the sum of nu_i(z_n) x~_n x~_n' for each unit i."""
        return weighted_second_moments(response.information(z), augmented)

    def shape(self, out: int, d: int) -> tuple[int, ...]:
        """Return [out, d, d]."""
        return (out, d, d)

    def precondition(self, state: State, gradient: Float[Tensor, "out d"]) -> Float[Tensor, "out d"]:
        """Multiply each unit's gradient by its own inverse, which is symmetric, from the right."""
        return torch.bmm(gradient.unsqueeze(1), state["inverse"]).squeeze(1)
