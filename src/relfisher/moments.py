"""Weighted second moments of the augmented input x~ = (x, 1): the sums that every exact metric block is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.shapes import Float

__all__ = ["augment", "weighted_second_moments"]

# Up to this many inputs the outer products of a piece of the batch are formed and met by one matrix product; above it
# a product a unit is as fast and needs no room.
_FLAT_INPUTS = 160
_FLAT_NUMBERS = 1 << 23


def augment(x: Float[Tensor, "*g n in"], ones: int = 1) -> Float[Tensor, "*g n d"]:
    """Return x~ = (x, 1), the input in homogeneous coordinates: with a 1 for each bias."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], ones)], dim=-1) if ones else x


def weighted_second_moments(weights: Float[Tensor, "n q"], augmented: Float[Tensor, "n d"]) -> Float[Tensor, "q d d"]:
    """Return sum_n w_nq x~_n x~_n' for every column q of the weights.

    Args:
        weights: nu of each unit, or any other weights of the samples.
        augmented: x~.

    Returns:
        One symmetric matrix a column, [q, d, d].
    """
    n, d = augmented.shape
    q = weights.shape[1]
    if d > _FLAT_INPUTS:
        return torch.stack([(augmented * weights[:, unit, None]).T @ augmented for unit in range(q)])
    rows = max(1, _FLAT_NUMBERS // (d * d))
    moments = weights[:rows].T @ _outer_products(augmented[:rows])
    for start in range(rows, n, rows):
        moments.addmm_(weights[start : start + rows].T, _outer_products(augmented[start : start + rows]))
    return moments.view(q, d, d)


def _outer_products(augmented: Float[Tensor, "n d"]) -> Float[Tensor, "n dd"]:
    return (augmented.unsqueeze(2) * augmented.unsqueeze(1)).flatten(1)
