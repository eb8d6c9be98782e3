"""Inversion: factors from damping, power and rank, with a flag for each block that says whether it is good.

A factor of G is (G + damping)^-power, or its root R with R'R = (G + damping)^-power for rules that whiten the gradient
first. It is a full matrix or of low rank. Below the damping, an inverse is nearly the same in all directions. For a
wide block, the leading eigenvectors and one number for all other directions are therefore enough, and a product costs
4 d r per row instead of 2 d^2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from relfisher.shapes import Float
from relfisher.structures.sketch import is_low_rank, leading
from relfisher.validation import check_bool, check_integer, check_interval, check_one_of

__all__ = ["Factor", "Inversion", "LowRank", "check_rank", "times", "transposed_times"]


class LowRank(NamedTuple):
    """The symmetric matrix `scale * (I - V V')`.

    Args:
        basis: V, [*q, d, r]; its columns are orthogonal and have length at most 1.
        scale: [*q].
    """

    basis: Tensor
    scale: Tensor


Factor = Tensor | LowRank


@dataclass(frozen=True)
class Inversion:
    """How a metric is inverted: (G + damping)^-power.

    Args:
        damping: the amount added to the diagonal, >= 0, in the unit given by `relative_to`.
        power: in [0, 1]: 1 inverts, 0 leaves the gradient unchanged, 1/2 is in between (Amari et al. 2021).
        rank: the number of leading eigenvectors used for blocks at least eight times as wide; None for full inverses.
        relative_to: "mean" for the mean eigenvalue of a block, "trace" for its trace, "absolute" for neither.
        pooled: True takes the mean or the trace over all blocks of a layer, so that a block near 0, such as that of a
            dead unit, is damped as much as its neighbors; False uses each block's own.

    Raises:
        ValueError: if an argument lies outside what is allowed.
    """

    damping: float = 0.1
    power: float = 1.0
    rank: int | None = None
    relative_to: Literal["mean", "trace", "absolute"] = "mean"
    pooled: bool = True

    def __post_init__(self) -> None:
        check_interval("damping", self.damping, 0, math.inf)
        check_interval("power", self.power, 0, 1, closed="both")
        check_rank(self.rank)
        check_one_of("relative_to", self.relative_to, ("mean", "trace", "absolute"))
        check_bool("pooled", self.pooled)

    def is_low_rank(self, d: int) -> bool:
        """Return whether a block of this width is inverted along its leading eigenvectors."""
        return is_low_rank(self.rank, d)

    def amounts(self, diagonals: Float[Tensor, "*q d"]) -> Float[Tensor, "*q"]:
        """Return the amount added to the diagonal of each block, given the diagonals."""
        if self.relative_to == "absolute":
            return torch.full_like(diagonals[..., 0], self.damping)
        trace = diagonals.sum(-1)
        if self.pooled:
            trace = trace.mean().expand(trace.shape)
        return trace * (self.damping / diagonals.shape[-1] if self.relative_to == "mean" else self.damping)

    def halved(self) -> Inversion:
        """Return the inversion of each of two Kronecker factors whose product has this damping and power."""
        return replace(self, damping=math.sqrt(self.damping))

    def diagonal(
        self, blocks: Float[Tensor, "*q d"], amounts: Float[Tensor, "*q"], *, root: bool
    ) -> tuple[Float[Tensor, "*q d"], Tensor]:
        """Return the factors of diagonal blocks, and a flag for each block: whether it is good."""
        damped = blocks + amounts.unsqueeze(-1)
        if self.power == 1:
            factor = damped.rsqrt() if root else damped.reciprocal()
        else:
            factor = damped.pow(-self.power / 2 if root else -self.power)
        return factor, ((damped > 0) & torch.isfinite(factor)).all(-1)

    def full(
        self, blocks: Float[Tensor, "*q d d"], amounts: Float[Tensor, "*q"], *, root: bool
    ) -> tuple[Float[Tensor, "*q d d"], Tensor]:
        """Return the factors of symmetric blocks, and a flag for each block: whether it is good.

        Power 1 uses Cholesky factors, whose root is triangular; other powers use eigenvectors.

        Args:
            blocks: the matrices.
            amounts: the amount added to the diagonal of each block.
            root: True for the root of the inverse.

        Returns:
            The factors, with undefined values where a block is not good, and one flag per block.
        """
        if self.power == 0:
            eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
            return eye.expand(blocks.shape).clone(), blocks.new_ones(blocks.shape[:-2], dtype=torch.bool)
        damped = blocks.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(amounts.unsqueeze(-1))
        if self.power != 1:
            return self._by_eigenvectors(damped, root=root)
        factor, info = torch.linalg.cholesky_ex(damped)
        good = info == 0
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        factor = torch.where(good[..., None, None], factor, eye)  # invalid factors would raise an error
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False) if root else torch.cholesky_inverse(factor)
        return inverse, good & torch.isfinite(inverse).all(-1).all(-1)

    def _by_eigenvectors(self, damped: Float[Tensor, "*q d d"], *, root: bool) -> tuple[Tensor, Tensor]:
        finite = torch.isfinite(damped).all(-1).all(-1)
        try:
            values, vectors = torch.linalg.eigh(damped.where(finite[..., None, None], torch.zeros_like(damped)))
        except RuntimeError:  # the eigendecomposition did not converge
            return damped, torch.zeros_like(finite)
        scales = values.pow(-self.power / 2 if root else -self.power)
        factor = (vectors * scales.unsqueeze(-2)) @ vectors.mT
        return factor, finite & (values > 0).all(-1) & torch.isfinite(scales).all(-1)

    def leading(
        self,
        sketches: Float[Tensor, "*q d columns"],
        amounts: Float[Tensor, "*q"],
        *,
        root: bool,
        frozen: Tensor | None = None,
    ) -> tuple[LowRank, Tensor]:
        """Return the factors of symmetric blocks along their r leading eigenvectors, and a flag for each block.

        All other directions share one eigenvalue, the mean of theirs. If the remaining eigenvalues of G lie between a
        and b, the result equals the inverse of G + damping up to a factor between (a + damping) / (b + damping) and its
        reciprocal, and up to the error of the eigenvectors.

        Args:
            sketches: the sketches of the matrices.
            amounts: the amount added to the diagonal of each block.
            root: True for the symmetric root of the inverse.
            frozen: True for rows and columns [d] that do not count.

        Returns:
            The factors, with undefined values where a block is not good, and one flag per block.
        """
        d, rank = sketches.shape[-2], int(self.rank or 0)
        diagonals = sketches[..., -1] if frozen is None else sketches[..., -1].masked_fill(frozen, 0.0)
        try:
            values, vectors = leading(sketches, rank, frozen)
        except RuntimeError:  # the eigendecomposition did not converge
            nothing = LowRank(sketches[..., :rank], torch.ones_like(amounts))
            return nothing, torch.zeros_like(amounts, dtype=torch.bool)
        rest = (diagonals.sum(-1) - values.sum(-1)).clamp(min=0) / (d - rank)
        floor = (rest + amounts).unsqueeze(-1)
        shares = floor / torch.maximum(values + amounts.unsqueeze(-1), floor)
        scale = floor.squeeze(-1).reciprocal()
        if self.power != 1:
            shares, scale = shares.pow(self.power), scale.pow(self.power)
        if root:
            shares, scale = shares.sqrt(), scale.sqrt()
        factor = LowRank(vectors * (1 - shares).sqrt().unsqueeze(-2), scale)
        return factor, torch.isfinite(factor.scale) & torch.isfinite(factor.basis).all(-1).all(-1)


def check_rank(rank: int | None) -> None:
    """Raise ValueError if a rank is given and is not a whole number >= 1."""
    if rank is not None:
        check_integer("rank", rank)


def times(field: Float[Tensor, "*g m d"], factor: Factor) -> Float[Tensor, "*g m d"]:
    """Multiply the rows of a field by a matrix [*g, d, d] from the right."""
    if isinstance(factor, Tensor):
        return _product(field, factor)
    rest = _less(field, _product(field, factor.basis), factor.basis.mT)
    return rest.mul_(factor.scale[..., None, None])


def transposed_times(factor: Factor, field: Float[Tensor, "*g m d"]) -> Float[Tensor, "*g m d"]:
    """Multiply the columns of a field by the transpose of a matrix [*g, m, m] from the left."""
    if isinstance(factor, Tensor):
        return _product(factor.mT, field)
    rest = _less(field, factor.basis, _product(factor.basis.mT, field))
    return rest.mul_(factor.scale[..., None, None])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return a product of matrices or of batches of them; `@` does the same in five operations where this is one."""
    return torch.bmm(left, right) if left.ndim == right.ndim == 3 else left @ right


def _less(field: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return a field less a product."""
    if field.ndim == 3:
        return torch.baddbmm(field, left, right, alpha=-1)
    return field - left @ right
