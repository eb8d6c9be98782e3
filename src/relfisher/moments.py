"""Weighted second moments of the augmented input x~ = (x, 1), from which all exact metric blocks are built."""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.shapes import Float

__all__ = [
    "add_product",
    "add_second_moments",
    "add_weighted_second_moments",
    "augment",
    "has_finite_moments",
    "weighted_second_moments",
]

# Up to this many inputs, the outer products of a chunk of the batch are formed and reduced by one matrix product. Above
# it, one product per unit is as fast and needs no extra memory.
_FLAT_INPUTS = 160
_FLAT_NUMBERS = 1 << 23


def augment(x: Float[Tensor, "*g n in"], ones: int = 1) -> Float[Tensor, "*g n d"]:
    """Return x~ = (x, 1), the input in homogeneous coordinates: a column of ones for each bias."""
    return torch.cat([x, x.new_ones(*x.shape[:-1], ones)], dim=-1) if ones else x


def weighted_second_moments(weights: Float[Tensor, "n q"], augmented: Float[Tensor, "n d"]) -> Float[Tensor, "q d d"]:
    """Return sum_n w_nq x~_n x~_n' for every column q of the weights.

    Args:
        weights: the weights of the samples, such as nu of each unit.
        augmented: the augmented input x~.

    Returns:
        One symmetric matrix per column, [q, d, d].
    """
    q, d = weights.shape[1], augmented.shape[1]
    moments = augmented.new_empty(q, d, d)
    add_weighted_second_moments(moments, weights, augmented, keep=0.0)
    return moments


def add_weighted_second_moments(
    moments: Float[Tensor, "q d d"],
    weights: Float[Tensor, "n q"],
    augmented: Float[Tensor, "n d"],
    *,
    keep: float = 1.0,
    share: float = 1.0,
) -> None:
    """Replace moments by keep * moments + share * sum_n w_nq x~_n x~_n', in place; see `weighted_second_moments`."""
    n, d = augmented.shape
    if d > _FLAT_INPUTS:
        for moment, weight in zip(moments, weights.unbind(1), strict=True):
            add_product(moment, (augmented * weight.unsqueeze(1)).T, augmented, keep=keep, share=share)
        return
    flat = moments.view(len(moments), d * d)
    rows = max(1, _FLAT_NUMBERS // (d * d))
    for start in range(0, n, rows):
        outer = _outer_products(augmented[start : start + rows])
        flat.addmm_(weights[start : start + rows].T, outer, beta=1.0 if start else keep, alpha=share)


def add_second_moments(
    moments: Float[Tensor, "*g d d"], augmented: Float[Tensor, "*g n d"], *, keep: float, share: float
) -> bool:
    """Replace moments by keep * moments + share * sum_n x~_n x~_n', in place, if the sum is finite.

    Args:
        moments: one matrix, or one per group.
        augmented: the augmented input x~.
        keep: the factor of the old moments.
        share: the factor of the sum.

    Returns:
        Whether the sum is finite; if False, the moments are unchanged.
    """
    if not has_finite_moments(augmented):
        return False
    add_product(moments, augmented.mT, augmented, keep=keep, share=share)
    return True


def has_finite_moments(augmented: Float[Tensor, "*g n d"]) -> bool:
    """Return whether sum_n x~_n x~_n' is finite."""
    # An entry of a positive semi-definite matrix is bounded by its trace.
    length = float(torch.linalg.vector_norm(augmented))
    return length * length <= float(torch.finfo(augmented.dtype).max)


def add_product(
    moments: Float[Tensor, "*g d columns"],
    left: Float[Tensor, "*g d n"],
    right: Float[Tensor, "*g n columns"],
    *,
    keep: float,
    share: float,
) -> None:
    """Replace moments by keep * moments + share * left @ right, in place."""
    add = moments.addmm_ if moments.ndim == 2 else moments.baddbmm_
    add(left, right, beta=keep, alpha=share)


def _outer_products(augmented: Float[Tensor, "n d"]) -> Float[Tensor, "n dd"]:
    return (augmented.unsqueeze(2) * augmented.unsqueeze(1)).flatten(1)
