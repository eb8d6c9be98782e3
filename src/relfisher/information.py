"""The Fisher information F_n of a response about its pre-activation z_n, as a batched operator.

F(z) = E_y[d ln p(y|z)/dz d ln p(y|z)/dz'] is an [out, out] matrix for each of n samples. The matrices are not stored:
each kind of response has its own class here, which applies F to a field r of shape [..., n, out].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from relfisher.shapes import Float, Num

__all__ = ["Diagonal", "Information", "Isotropic", "Joined", "PulledBack", "Softmax"]


class Information(ABC):
    """One symmetric positive semi-definite [out, out] matrix F_n for each of n samples."""

    #: Whether every F_n is diagonal, which makes the metric block diagonal with one block per unit.
    is_diagonal: bool = False

    @property
    @abstractmethod
    def out(self) -> int:
        """The number of units."""

    @abstractmethod
    def apply(self, field: Float[Tensor, "*k n out"]) -> Float[Tensor, "*k n out"]:
        """Apply each F_n to the vector of its sample: row n of the result is F_n r_n."""

    @abstractmethod
    def diagonal(self) -> Float[Tensor, "n out"]:
        """Return the diagonal of each F_n."""

    @abstractmethod
    def dense(self) -> Float[Tensor, "n out out"]:
        """Return the matrices F_n, which take n * out^2 numbers."""

    @abstractmethod
    def total(self) -> Float[Tensor, "out out"]:
        """Return the sum of F_n over the samples."""

    def contrasts(self, field: Float[Tensor, "*k n out"]) -> Float[Tensor, "*k n out"]:
        """Return the field less a part to which each F_n is blind, so that this part leaves no rounding errors."""
        return field

    def common(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "one in"]:
        """Return a row that can be subtracted from all rows of the weight, because every F_n is blind to it."""
        return weight.new_zeros(1, weight.shape[1])

    def overlaps(self, other: Information) -> Float[Tensor, "n m"]:
        """Return tr(F_n F'_m) in float64 for each pair of samples of two kinds of information about the same units."""
        if self.is_diagonal and other.is_diagonal:
            return self.diagonal().double() @ other.diagonal().double().T
        return self.dense().flatten(1).double() @ other.dense().flatten(1).double().T


class _Diagonal(Information):
    """F_n is a diagonal matrix for every sample."""

    is_diagonal = True

    def dense(self) -> Float[Tensor, "n out out"]:
        """Return a diagonal matrix for each sample."""
        return torch.diag_embed(self.diagonal())

    def total(self) -> Float[Tensor, "out out"]:
        """Return the diagonal matrix of the sums over the samples."""
        return torch.diag(self.diagonal().sum(0))


@dataclass(frozen=True)
class Isotropic(_Diagonal):
    """F_n = value * I for all samples: a linear Gaussian layer, equation (22).

    Args:
        value: the scalar 1 / sigma^2.
        like: a tensor [n, out] with the shape, dtype and device; its values are not used.
    """

    value: float
    like: Float[Tensor, "n out"]

    @property
    def out(self) -> int:
        """The number of units."""
        return self.like.shape[-1]

    def apply(self, field: Float[Tensor, "*k n out"]) -> Float[Tensor, "*k n out"]:
        """Scale the field."""
        return field if self.value == 1.0 else field * self.value

    def diagonal(self) -> Float[Tensor, "n out"]:
        """Return the scalar everywhere."""
        return torch.full_like(self.like, self.value)


@dataclass(frozen=True)
class Diagonal(_Diagonal):
    """F_n = diag(nu_n): units with independent responses, equation (23)."""

    nu: Float[Tensor, "n out"]

    @property
    def out(self) -> int:
        """The number of units."""
        return self.nu.shape[-1]

    def apply(self, field: Float[Tensor, "*k n out"]) -> Float[Tensor, "*k n out"]:
        """Scale each unit by its own information."""
        return field * self.nu

    def diagonal(self) -> Float[Tensor, "n out"]:
        """Return nu."""
        return self.nu


@dataclass(frozen=True)
class Softmax(Information):
    """F_n = diag(eta_n) - eta_n eta_n': a categorical response with probabilities eta_n, equation (25).

    A probability near 1 leaves no digits for 1 - eta. All operations therefore take it as the sum of the other
    probabilities, and fields as differences from their value at the likeliest class. Otherwise the information about a
    class that is almost certain would be pure rounding error, and the matrices not positive semi-definite.
    """

    eta: Float[Tensor, "n out"]

    @property
    def out(self) -> int:
        """The number of units."""
        return self.eta.shape[-1]

    def apply(self, field: Float[Tensor, "*k n out"]) -> Float[Tensor, "*k n out"]:
        """Return eta (r - <eta, r>)."""
        relative = self.contrasts(field)
        return self.eta * (relative - (self.eta * relative).sum(-1, keepdim=True))

    def contrasts(self, field: Float[Tensor, "*k n out"]) -> Float[Tensor, "*k n out"]:
        """Return the differences from the value at the likeliest class: a shift of all classes changes nothing."""
        return field - field.gather(-1, self._likeliest.expand(*field.shape[:-1], 1))

    def common(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "one in"]:
        """Return the median of the rows, from which a class that is far from all others does not move it."""
        return weight.median(0, keepdim=True).values

    @cached_property
    def _likeliest(self) -> Num[Tensor, "n 1"]:
        return self.eta.argmax(-1, keepdim=True)

    def diagonal(self) -> Float[Tensor, "n out"]:
        """Return eta (1 - eta), as for a sigmoid unit, equation (14)."""
        return self.eta * (1 - self.eta).scatter(-1, self._likeliest, self._others.sum(-1, keepdim=True))

    @property
    def _others(self) -> Float[Tensor, "n out"]:
        """The probabilities, with 0 for the likeliest class."""
        return self.eta.scatter(-1, self._likeliest, 0)

    def dense(self) -> Float[Tensor, "n out out"]:
        """Return diag(eta) - eta eta' for each sample."""
        return _laplacian(self.eta.unsqueeze(-1) * self.eta.unsqueeze(-2))

    def total(self) -> Float[Tensor, "out out"]:
        """Return diag(sum_n eta_n) - sum_n eta_n eta_n'."""
        return _laplacian(self.eta.T @ self.eta)

    def overlaps(self, other: Information) -> Float[Tensor, "n m"]:
        """Return tr(F_n F'_m) in float64, for softmax responses without the matrices."""
        if not isinstance(other, Softmax):
            return super().overlaps(other)
        # Off the diagonal, the sum of a_i a_j with a = eta eta' is taken apart at the likeliest class of F_n.
        others, theirs = self._others.double(), other.eta.double()
        rest = others @ theirs.T
        likeliest = self.eta.gather(-1, self._likeliest).double() * theirs[:, self._likeliest[:, 0]].T
        off_diagonal = 2 * likeliest * rest + rest.square() - others.square() @ theirs.square().T
        return self.diagonal().double() @ other.diagonal().double().T + off_diagonal


def _laplacian(weights: Float[Tensor, "*n out out"]) -> Float[Tensor, "*n out out"]:
    """Return D - A, where A is the off-diagonal part of the weights and D the diagonal matrix of A's row sums."""
    off_diagonal = weights - torch.diag_embed(weights.diagonal(dim1=-2, dim2=-1))
    return torch.diag_embed(off_diagonal.sum(-1)) - off_diagonal


@dataclass(frozen=True)
class PulledBack(Information):
    """F_n = J_n' F_n^next J_n with J_n = C diag(f'(z_n)): the next layer's information, pulled back. Equation (26).

    Args:
        following: the information of the next layer about its own pre-activation, with F_n [next, next].
        weight: C, the next layer's weight [next, out].
        slope: f'(z) of this layer's units, [n, out].
    """

    following: Information
    weight: Float[Tensor, "next out"]
    slope: Float[Tensor, "n out"]

    @property
    def out(self) -> int:
        """The number of units."""
        return self.slope.shape[-1]

    def apply(self, field: Float[Tensor, "*k n out"]) -> Float[Tensor, "*k n out"]:
        """Push the field forward through J_n, apply the next layer's information, and pull the result back."""
        forward = (field * self.slope) @ self._weight.T
        return (self.following.apply(forward) @ self._weight) * self.slope

    @cached_property
    def _weight(self) -> Float[Tensor, "next out"]:
        """C, less what its rows have in common if the next layer's information is blind to that."""
        return self.weight - self.following.common(self.weight)

    def _columns(self) -> Float[Tensor, "out n next"]:
        """Return the columns of J_n of each sample, as fields on the next layer."""
        return self.following.contrasts((self._weight * self.slope.unsqueeze(-2)).permute(2, 0, 1))

    def diagonal(self) -> Float[Tensor, "n out"]:
        """Return slope^2 * diag(C' F^next C)."""
        if self.following.is_diagonal:
            return (self.following.diagonal() @ self.weight.square()) * self.slope.square()
        columns = self._columns()
        return (columns * self.following.apply(columns)).sum(-1).T

    def dense(self) -> Float[Tensor, "n out out"]:
        """Return J_n' F_n^next J_n for each sample."""
        columns = self._columns()
        return torch.einsum("ink,jnk->nij", columns, self.following.apply(columns))

    def total(self) -> Float[Tensor, "out out"]:
        """Return sum_n J_n' F_n^next J_n."""
        if isinstance(self.following, Isotropic):
            return self.following.value * (self.weight.T @ self.weight) * (self.slope.T @ self.slope)
        return self.dense().sum(0)


@dataclass(frozen=True)
class Joined(Information):
    """The matrices of several batches of samples, one batch after another, about the same units.

    Args:
        parts: the information of each batch.
        sizes: the number of samples of each batch.
    """

    parts: tuple[Information, ...]
    sizes: tuple[int, ...]

    @property
    def is_diagonal(self) -> bool:  # type: ignore[override]  # known once the parts are
        """Whether the matrices of all batches are diagonal."""
        return all(part.is_diagonal for part in self.parts)

    @property
    def out(self) -> int:
        """The number of units."""
        return self.parts[0].out

    def apply(self, field: Float[Tensor, "*k n out"]) -> Float[Tensor, "*k n out"]:
        """Apply the matrices of each batch to its samples."""
        pieces = zip(self.parts, torch.split(field, list(self.sizes), dim=-2), strict=True)
        return torch.cat([part.apply(piece) for part, piece in pieces], dim=-2)

    def diagonal(self) -> Float[Tensor, "n out"]:
        """Return the diagonals of all batches."""
        return torch.cat([part.diagonal() for part in self.parts])

    def dense(self) -> Float[Tensor, "n out out"]:
        """Return the matrices of all batches."""
        return torch.cat([part.dense() for part in self.parts])

    def total(self) -> Float[Tensor, "out out"]:
        """Return the sum over all batches."""
        return torch.stack([part.total() for part in self.parts]).sum(0)
