"""The inverse of a wide block by its leading eigenvectors, with one number for all other directions.

Damping makes an inverse nearly the same in all directions whose eigenvalues are below it. What remains is a few
directions, and a product with them costs 4 d r for each row instead of 2 d^2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from relfisher.shapes import Float
from relfisher.validation import check_positive

__all__ = ["LowRank", "check_rank", "invert_leading", "times", "transposed_times"]

# Directions besides those asked for, and passes: what the range finder of Halko, Martinsson & Tropp (2011) needs where
# eigenvalues decay slowly. The last refresh's eigenvectors are a start that saves a pass.
_SPARE = 8
_PASSES = 2
_PASSES_FROM_LAST = 1

# A column of a basis that is shorter than this, squared, is of rounding, not of data.
_NOTHING = 1e-6


class LowRank(NamedTuple):
    """The symmetric matrix `scale * (I - V V')`.

    Args:
        basis: V, [*q, d, r]; its columns are orthogonal, and none is longer than 1.
        scale: [*q].
    """

    basis: Tensor
    scale: Tensor


def check_rank(rank: int | None) -> None:
    """Raise ValueError if a rank is given that is not positive."""
    if rank is not None:
        check_positive("rank", rank)


def times(field: Float[Tensor, "*g m d"], factor: Tensor | LowRank) -> Float[Tensor, "*g m d"]:
    """Multiply the rows of a field by a matrix [*g, d, d], from the right."""
    if isinstance(factor, Tensor):
        return field @ factor
    rest = _product(field)(field, field @ factor.basis, factor.basis.mT, alpha=-1)
    return rest.mul_(factor.scale[..., None, None])


def transposed_times(factor: Tensor | LowRank, field: Float[Tensor, "*g m d"]) -> Float[Tensor, "*g m d"]:
    """Multiply the columns of a field by the transpose of a matrix [*g, m, m], from the left."""
    if isinstance(factor, Tensor):
        return factor.mT @ field
    rest = _product(field)(field, factor.basis, factor.basis.mT @ field, alpha=-1)
    return rest.mul_(factor.scale[..., None, None])


def _product(field: Tensor) -> Callable[..., Tensor]:
    return torch.addmm if field.ndim == 2 else torch.baddbmm


def invert_leading(
    blocks: Float[Tensor, "*q d d"],
    damping: Float[Tensor, "*q"],
    last: Float[Tensor, "*q d r"],
    *,
    root: bool = False,
) -> tuple[LowRank, bool]:
    """Invert symmetric positive semi-definite blocks along their r leading eigenvectors.

    All other directions count as one eigenvalue, the mean of theirs. Where the eigenvalues of G behind the leading ones
    are between a and b, the inverse is that of G + damping up to a factor between (a + damping) / (b + damping) and its
    reciprocal.

    Args:
        blocks: the matrices.
        damping: what is added to the diagonal of each.
        last: the basis of an earlier inverse, from which the eigenvectors are sought; zeros where there is none.
        root: True for the symmetric root of the inverse.

    Returns:
        The inverses, and whether all of them are good: False, and anything, if a value is not finite or an
        eigendecomposition failed.
    """
    d, rank = last.shape[-2:]
    values, vectors, found = _leading(blocks, last)
    rest = (blocks.diagonal(dim1=-2, dim2=-1).sum(-1) - values.sum(-1)).clamp(min=0) / (d - rank)
    floor = (rest + damping).unsqueeze(-1)
    shares = floor / torch.maximum(values + damping.unsqueeze(-1), floor)
    scale = floor.squeeze(-1).reciprocal()
    if root:
        shares, scale = shares.sqrt(), scale.sqrt()
    inverse = LowRank(vectors * (1 - shares).sqrt().unsqueeze(-2), scale)
    return inverse, found and all(bool(torch.isfinite(part).all()) for part in inverse)


def _leading(
    blocks: Float[Tensor, "*q d d"], last: Float[Tensor, "*q d r"]
) -> tuple[Float[Tensor, "*q r"], Float[Tensor, "*q d r"], bool]:
    """Return about the leading eigenvalues and eigenvectors, by subspace iteration, and whether there are any."""
    rank = last.shape[-1]
    known = last.square().sum(-2, keepdim=True)
    warm = bool((known > _NOTHING).all())
    # The same numbers each time, so that an interrupted run goes on as it would have.
    fresh = torch.randn(
        last.shape[-2], _SPARE if warm else _SPARE + rank, generator=torch.Generator().manual_seed(0)
    ).to(last)
    start = last * known.clamp(min=torch.finfo(last.dtype).tiny).rsqrt()
    if not warm:
        start = torch.where(known > _NOTHING, start, fresh[:, _SPARE:])
    space = torch.cat([start, fresh[:, :_SPARE].expand(*last.shape[:-1], _SPARE)], -1)
    try:
        for _ in range(_PASSES_FROM_LAST if warm else _PASSES):
            space, _ = torch.linalg.qr(blocks @ space)
        values, turned = torch.linalg.eigh(space.mT @ blocks @ space)
    except RuntimeError:  # an eigendecomposition that did not converge
        return last[..., 0, :], last, False
    return values[..., -rank:].clamp(min=0), space @ turned[..., -rank:], True
