"""Weighted second moments of the augmented input x~ = (x, 1): the sums that every exact metric block is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.shapes import Float

__all__ = ["augment", "second_moment", "weighted_second_moments"]

# Up to this many inputs the outer products of a piece of the batch are formed and met by one matrix product; above it
# a product a unit is as fast and needs no room.
_FLAT_INPUTS = 160
_FLAT_NUMBERS = 1 << 23


def augment(x: Float[Tensor, "n in"]) -> Float[Tensor, "n d"]:
    """Return x~ = (x, 1), the input in homogeneous coordinates."""
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)


def second_moment(augmented: Float[Tensor, "n d"]) -> Float[Tensor, "d d"]:
    """Return mean_n x~_n x~_n'."""
    return (augmented.T @ augmented).div_(augmented.shape[0])


def weighted_second_moments(weights: Float[Tensor, "n q"], augmented: Float[Tensor, "n d"]) -> Float[Tensor, "q d d"]:
    """Return mean_n w_nq x~_n x~_n' for every column q of the weights.

    Args:
        weights: nu of each unit, or any other weights of the samples.
        augmented: x~.

    Returns:
        One symmetric matrix a column, [q, d, d].
    """
    n, d = augmented.shape
    q = weights.shape[1]
    scaled = weights / n
    if d > _FLAT_INPUTS:
        return torch.stack([(augmented * scaled[:, unit, None]).T @ augmented for unit in range(q)])
    moments = augmented.new_zeros(q, d * d)
    pieces = 1 + n * d * d // _FLAT_NUMBERS
    for piece, weight in zip(augmented.tensor_split(pieces), scaled.tensor_split(pieces), strict=True):
        moments.addmm_(weight.T, (piece.unsqueeze(2) * piece.unsqueeze(1)).flatten(1))
    return moments.view(q, d, d)
