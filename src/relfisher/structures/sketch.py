"""Sketches of wide blocks: products of a symmetric matrix G [d, d] with 2r fixed vectors of signs, and its diagonal.

The sketch of a sum or of an average is the sum or the average of sketches, so that it takes the place of G in a moving
average, in 2r + 1 instead of d numbers per row. The leading eigenvectors come from the Nystrom approximation

    G ~ Y (W'Y)^+ Y',  Y = G W

(Tropp, Yurtsever, Udell & Cevher 2017), which is exact for a G of rank up to 2r with signs W in general position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.moments import add_product, has_finite_moments
from relfisher.shapes import Float

__all__ = ["add_sketch", "is_low_rank", "is_sketch", "leading", "reconstructed", "sketch", "sketch_columns", "sketched"]

# A low rank pays off if it is at most this share of a block's width.
_NARROWEST = 8

# Products with signs, per eigenvector that is sought.
_SPARE = 2

# Odd numbers with well mixed bits (Steele, Lea & Flood 2014), as signed integers.
_MIX = (-7046029254386353131, -4658895280553007687, -7723592293110705685)


def is_low_rank(rank: int | None, d: int) -> bool:
    """Return whether a block of this width is kept as a sketch, and inverted along its `rank` leading eigenvectors."""
    return rank is not None and d >= _NARROWEST * rank


def sketch_columns(rank: int) -> int:
    """Return the number of columns of a sketch."""
    return _SPARE * rank + 1


def is_sketch(size: tuple[int, ...], rank: int | None) -> bool:
    """Return whether a tensor of this shape is a sketch, which is never square."""
    return rank is not None and len(size) > 1 and size[-1] == sketch_columns(rank) and is_low_rank(rank, size[-2])


def sketch(blocks: Float[Tensor, "*q d d"], rank: int) -> Float[Tensor, "*q d columns"]:
    """Return the sketch of symmetric matrices."""
    products = blocks @ _signs(blocks.shape[-1], rank, blocks)
    return torch.cat([products, blocks.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)], -1)


def sketched(d: int, rank: int, like: Tensor) -> Float[Tensor, "d columns"]:
    """Return the sketch of the identity."""
    return torch.cat([_signs(d, rank, like), like.new_ones(d, 1)], -1)


def add_sketch(
    total: Float[Tensor, "*g d columns"], augmented: Float[Tensor, "*g n d"], *, keep: float, share: float
) -> bool:
    """Replace a sketch by keep * sketch + share * that of sum_n x~_n x~_n', in place, if the sum is finite.

    Args:
        total: one sketch, or one per group.
        augmented: the augmented input x~.
        keep: the factor of the old sketch.
        share: the factor of the sum.

    Returns:
        Whether the sum is finite; if False, the sketch is unchanged.
    """
    if not has_finite_moments(augmented):
        return False
    rank, diagonal = total.shape[-1] // _SPARE, total[..., -1]
    products = augmented @ _signs(total.shape[-2], rank, total)
    add_product(total[..., :-1], augmented.mT, products, keep=keep, share=share)
    squares = augmented.square().sum(-2) * share
    diagonal.copy_(squares if keep == 0 else diagonal * keep + squares)
    return True


def leading(
    sketch: Float[Tensor, "*q d columns"], rank: int, frozen: Tensor | None = None
) -> tuple[Float[Tensor, "*q r"], Float[Tensor, "*q d r"]]:
    """Return the approximate leading eigenvalues and eigenvectors; NaN where the sketch is not finite.

    Args:
        sketch: the sketch.
        rank: the number of eigenvectors.
        frozen: True for rows and columns [d] of G that do not count.
    """
    finite = torch.isfinite(sketch).all(-1, keepdim=True).all(-2, keepdim=True)
    root = _root(sketch.where(finite, 0.0))
    if frozen is not None:
        root = root.masked_fill(frozen.unsqueeze(-1), 0.0)
    values, turned = torch.linalg.eigh(root.mT @ root)
    values, turned = values[..., -rank:].clamp(min=0), turned[..., -rank:]
    lengths = values.clamp(min=torch.finfo(values.dtype).tiny).rsqrt().unsqueeze(-2)
    return values.where(finite.squeeze(-1), torch.nan), (root @ turned) * lengths


def reconstructed(sketch: Float[Tensor, "*q d columns"]) -> Float[Tensor, "*q d d"]:
    """Return the approximation of G that a sketch stands for, with the diagonal of G."""
    root = _root(sketch)
    blocks = root @ root.mT
    blocks.diagonal(dim1=-2, dim2=-1).copy_(sketch[..., -1])
    return blocks


def _root(sketch: Float[Tensor, "*q d columns"]) -> Float[Tensor, "*q d k"]:
    """Return B with B B' = Y (W'Y)^+ Y'."""
    d, columns = sketch.shape[-2:]
    products = sketch[..., :-1]
    inner = _signs(d, columns // _SPARE, sketch).mT @ products
    values, vectors = torch.linalg.eigh((inner + inner.mT) / 2)
    smallest = values[..., -1:].clamp(min=0) * (d * torch.finfo(values.dtype).eps)
    scales = torch.where(values > smallest, values, torch.inf).rsqrt()
    root: Tensor = (products @ vectors) * scales.unsqueeze(-2)
    return root


def _signs(d: int, rank: int, like: Tensor) -> Float[Tensor, "d k"]:
    """Return the signs W, the same on all devices and in all versions: bits of mixed integers."""
    first, second, third = _MIX
    mixed = torch.arange(1, d * _SPARE * rank + 1, device=like.device) * first
    mixed = (mixed ^ (mixed >> 30)) * second
    mixed = (mixed ^ (mixed >> 27)) * third
    bits = ((mixed ^ (mixed >> 31)) & 1).to(like.dtype)
    return (2 * bits - 1).view(d, _SPARE * rank)
