"""Blocks scaled to a unit diagonal: which of their eigenvalues count as zero, and inverses of the others.

A threshold relative to the largest eigenvalue of a matrix depends on the units of the parameters, and loses those whose
entries are small. A block B is therefore written as S C S with a diagonal S, such that the diagonal of C is 1 and no
entry of C is larger. Rounding errors of C have the size of the machine epsilon, whatever the units are.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from relfisher.shapes import Float

__all__ = ["ScaledBlocks", "check_symmetric", "rounding", "units_of"]

# Numbers of a matrix whose symmetry is checked at a time.
_CHUNK = 1 << 22


def rounding(size: int, dtype: torch.dtype) -> float:
    """Return up to which size an eigenvalue of C may be due to rounding errors.

    Errors of the entries, of some machine epsilons, change eigenvalues by sqrt(size) times as much. Errors of the
    decomposition are epsilons of float64 times the largest eigenvalue, which is at most the size.
    """
    return 10 * (math.sqrt(size) * torch.finfo(dtype).eps + size * torch.finfo(torch.float64).eps)


def units_of(blocks: Float[Tensor, "*q b b"], dtype: torch.dtype) -> Float[Tensor, "*q b"]:
    """Return S, with B_ij at most S_i S_j: the roots of the diagonal for a positive semi-definite B.

    In general S_i^2 is the largest B_ij^2 / max(|B_ii|, |B_jj|, |B_ij|) over j. It is infinite for rows of zeros, or of
    numbers that are too small to have all digits in the dtype that they come from.
    """
    tiny = torch.finfo(dtype).tiny
    size = blocks.abs()
    diagonal = size.diagonal(dim1=-2, dim2=-1)
    larger = torch.maximum(diagonal.unsqueeze(-1), diagonal.unsqueeze(-2)).maximum(size)
    squares = (size / larger.clamp(min=tiny)).mul_(size).amax(-1)
    return torch.where(squares >= tiny, squares.sqrt(), torch.inf)


def check_symmetric(name: str, blocks: Tensor) -> None:
    """Raise ValueError unless blocks are square, and entries (i, j) and (j, i) differ by at most sqrt(eps) S_i S_j."""
    if blocks.shape[-1] != blocks.shape[-2]:
        raise ValueError(f"{name} must be square, got shape {list(blocks.shape)}")
    size = blocks.shape[-1]
    for some in torch.split(blocks.reshape(-1, size, size), max(1, _CHUNK // size**2)):
        units = units_of((some.abs() + some.mT.abs()) / 2, some.dtype).unsqueeze(-1)
        difference = float(((some - some.mT) / units / units.mT).abs().max())
        if difference > torch.finfo(blocks.dtype).eps ** 0.5:
            raise ValueError(
                f"{name} must be symmetric, but entries (i, j) and (j, i) differ by up to {difference:.1e} of the "
                "roots of entries (i, i) and (j, j)"
            )


class ScaledBlocks:
    """The decomposition S C S of symmetric blocks plus damping, in float64.

    Args:
        blocks: [q, b, b].
        damping: added to the diagonal.
        rtol: eigenvalues of C up to this count as 0; None for `rounding`.
    """

    def __init__(self, blocks: Float[Tensor, "q b b"], damping: float = 0.0, rtol: float | None = None) -> None:
        damped = blocks.to(torch.float64, copy=True)
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
        self.units = units_of(damped, blocks.dtype)
        self.matrix = damped / self.units.unsqueeze(-1) / self.units.unsqueeze(-2)
        self.rtol = rounding(blocks.shape[-1], blocks.dtype) if rtol is None else rtol

    @cached_property
    def _eigen(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.matrix)
        return values, vectors

    @property
    def null(self) -> Tensor:
        """Which eigenvalues of C count as 0."""
        return self._eigen[0].abs() <= self.rtol

    def logdets(self) -> Float[Tensor, "q"]:
        """Return ln |det B| of each block, -inf if it is singular."""
        values = self._eigen[0].abs().masked_fill(self.null, 0)
        return (values.log() + 2 * self.units.log()).nan_to_num(neginf=-torch.inf, nan=-torch.inf).sum(-1)

    def least_values(self) -> Float[Tensor, "q"]:
        """Return the smallest absolute eigenvalue of each block that does not count as 0; infinite if all do.

        It is found from the largest one of the pseudo-inverse. Those of the block have the rounding errors of its
        largest one.
        """
        unit = torch.eye(self.units.shape[-1], dtype=self.units.dtype, device=self.units.device)
        inverse = self.pseudo_solve(unit.expand_as(self.matrix))
        values: Tensor = torch.linalg.eigvalsh((inverse + inverse.mT) / 2)
        return 1 / values.abs().amax(-1)

    def regular_solve(self, right: Float[Tensor, "m b k"]) -> Float[Tensor, "m b k"] | None:
        """Return B^-1 times the columns; None if a block is singular, or not positive and singular."""
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        if bool((info == 0).all()):
            if bool((_least_eigenvalues(factor) <= self.rtol).any()):
                return None
            units = self.units.unsqueeze(-1)
            return torch.cholesky_solve(right / units, factor) / units
        return None if bool(self.null.any()) else self.pseudo_solve(right)

    def pseudo_solve(self, right: Float[Tensor, "m b k"]) -> Float[Tensor, "m b k"]:
        """Return the Moore-Penrose pseudo-inverse of B times the columns, P S^-1 C^+ S^-1 P with P onto B's range."""
        values, vectors = self._eigen
        inverse = (1 / values).masked_fill(self.null, 0).unsqueeze(-1)
        units, basis = self.units.unsqueeze(-1), self._null_basis()
        right = right - basis @ (basis.mT @ right)
        solution = vectors @ (inverse * (vectors.mT @ (right / units))) / units
        return solution - basis @ (basis.mT @ solution)

    def _null_basis(self) -> Float[Tensor, "q b r"]:
        """Return an orthonormal basis of the null space of each block, followed by columns of zeros."""
        first = self.null.sort(dim=-1, descending=True, stable=True)
        count = int(first.values.sum(-1).max())
        chosen = first.indices[:, None, :count].expand(*self.units.shape, count)
        vectors = self._eigen[1].gather(-1, chosen)
        # A vector of the null space equals (1 - C) times itself. The product has correct digits in small entries, too.
        vectors = vectors - self.matrix @ vectors
        units, order = self.units.where(self.units < torch.inf, 1).unsqueeze(-1).sort(dim=-2)
        # Householder reflections of rows in descending order are accurate in each row (Cox & Higham 1998).
        rows = order.expand_as(vectors)
        basis: Tensor = torch.linalg.qr(vectors.gather(-2, rows) / units)[0]
        return torch.zeros_like(basis).scatter(-2, rows, basis) * first.values[:, None, :count]


def _least_eigenvalues(factors: Float[Tensor, "q b b"]) -> Float[Tensor, "q"]:
    """Estimate the least eigenvalue of each matrix from its Cholesky factor, by two inverse iterations.

    Rounding errors can make the last pivot of a singular matrix positive, so that its factorization succeeds.

    Args:
        factors: the Cholesky factors.

    Returns:
        The estimates, which are never below the true eigenvalues.
    """
    start = torch.randn(factors.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = (start / start.norm()).to(factors).expand(*factors.shape[:-1], 1)
    for _ in range(2):
        image = torch.cholesky_solve(vector, factors)
        growth: Tensor = torch.linalg.vector_norm(image, dim=1, keepdim=True)
        vector = image / growth
    return 1 / growth.flatten()
