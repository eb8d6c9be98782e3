"""A metric tensor: solves, spectra and natural gradients of a linear operator, for any subsystem.

A subclass defines how G acts on vectors and how G splits into a direct sum of dense blocks. Everything else is derived
here. A full metric is a direct sum of one block, so full and block-diagonal metrics share the same code.

Axes: `D` parameters of the subsystem, `b` parameters of a block, `q` distinct blocks, `k` columns.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from relfisher.metric.iterative import conjugate_residuals
from relfisher.metric.operator import Operator
from relfisher.metric.scaled import ScaledBlocks
from relfisher.shapes import Float
from relfisher.validation import check_integer, check_interval

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Metric", "SingularMetricError"]

# Blocks of up to this many parameters are factorized; larger ones are solved by conjugate residuals.
_DENSE_BLOCK = 4096


class SingularMetricError(ValueError):
    """The metric, with the damping that was given, is singular to working precision."""


class Metric(Operator):
    """A symmetric matrix G [D, D] that is applied without being formed.

    Expected metrics are positive semi-definite. Observed ones, such as `observed_fisher` returns, need not be. For
    these, inverses keep the signs of the eigenvalues, and determinants and condition numbers use their absolute values;
    what needs a positive metric raises `IndefiniteMetricError`.

    Which eigenvalues count as 0 is decided for each block, scaled to a unit diagonal: those up to 10 sqrt(b) machine
    epsilons, plus 10 b epsilons of float64, for a block of b parameters. `rank`, `solve`, `pinv_solve`,
    `natural_gradient`, `logdet` and `condition_number` follow this rule, which does not depend on the units of the
    parameters.

    Attributes:
        parameter_shape: the shape of the subsystem's parameters; D is its product. Methods accept vectors that are flat
            [D] or have this shape, and return results of the same shape.
        samples: the number of samples that the metric averages over.
        dtype: the dtype of its entries, float32 or float64.
        device: the device that holds it.
    """

    def eigvalsh(self, k: int | None = None) -> Float[Tensor, "k"]:
        """Return the eigenvalues of G, or the largest of them, in ascending order.

        Args:
            k: the number of largest eigenvalues to return; None for all. If the blocks have more than 4096 parameters,
                the k largest are computed by Lanczos iterations, which need scipy.

        Returns:
            All D eigenvalues, or the k largest.

        Raises:
            ValueError: if k is not in 1 ... D, or the blocks are too large to be formed and k is None.
        """
        if k is not None:
            check_integer("k", k, high=self.shape[0])
        few = k is not None and k < self.shape[0] - 2 * self._repeats()
        if k is not None and few and self._direct_sum_shape()[1] > _DENSE_BLOCK:
            return self._lanczos(k)
        values = self._block_values().flatten().repeat_interleave(self._repeats()).sort().values.to(self.dtype)
        return values if k is None else values[-k:]

    def rank(self, rtol: float | None = None) -> int:
        """Return the numerical rank: the number of eigenvalues that do not count as 0.

        Args:
            rtol: the threshold for blocks scaled to a unit diagonal; None for that of the class.

        Returns:
            The numerical rank.
        """
        return int((~self._scaled(rtol=rtol).null).sum()) * self._repeats()

    def condition_number(self, damping: float = 0.0) -> float:
        """Return the ratio of the largest to the smallest absolute eigenvalue of G + damping I.

        Args:
            damping: the damping, >= 0.

        Returns:
            The ratio; infinite for a singular metric without damping.
        """
        check_interval("damping", damping, 0, math.inf)
        scaled = self._scaled(damping)
        largest = float((self._block_values() + damping).abs().max())
        if not bool(scaled.null.any()):
            return largest / float(scaled.least_values().min())
        least = float((self._cleaned_values() + damping).abs().min())
        return largest / least if damping and least else math.inf

    def _condition_in_range(self) -> float:
        """Return the ratio of the largest absolute eigenvalue to the smallest that does not count as 0; NaN for 0."""
        least = float(self._scaled().least_values().min())
        return float(self._block_values().abs().max()) / least if math.isfinite(least) else math.nan

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """Return ln |det(G + damping I)|.

        Args:
            damping: the damping, >= 0.

        Returns:
            A scalar, -inf for a singular metric without damping.
        """
        check_interval("damping", damping, 0, math.inf)
        logdets = self._scaled(damping).logdets()
        if damping:
            # Without eigenvalues that are rounding errors, a damping below them counts, too.
            logdets = logdets.where(logdets.isfinite(), (self._cleaned_values() + damping).abs().log().sum(-1))
        return (logdets.sum() * self._repeats()).to(self.dtype)

    def solve(self, v: Tensor, damping: float = 0.0) -> Tensor:
        """Return (G + damping I)^-1 v.

        Blocks of up to 4096 parameters are factorized. Larger ones are solved by conjugate residuals, preconditioned by
        the diagonal, to a relative residual of 100 machine epsilons, with a `ConvergenceWarning` if that is not
        reached.

        Args:
            v: one vector, [D] or in the shape of the parameters, or several, [D, k].
            damping: the damping, >= 0.

        Returns:
            The solution, in the shape of v.

        Raises:
            ValueError: if damping is negative or v has the wrong shape.
            SingularMetricError: if a block of G + damping I has an eigenvalue that counts as 0; for a larger block, if
                v is not in its range.
            IndefiniteMetricError: if a block of more than 4096 parameters has a negative eigenvalue.
        """
        check_interval("damping", damping, 0, math.inf)
        columns = self._columns(v)
        if self._direct_sum_shape()[1] > _DENSE_BLOCK:
            units = (self.diagonal() + damping).abs().sqrt()
            units = units.where(units > 0, 1)
            solution, solved = conjugate_residuals(self._product, columns, units, damping)
        else:
            pieces = self._scaled(damping).regular_solve(self._pieces(columns))
            solution, solved = (columns, False) if pieces is None else (pieces.to(self.dtype), True)
        if not solved:
            raise SingularMetricError(
                f"the metric is singular with damping {damping}: give a larger damping, or use pinv_solve"
            )
        return solution.reshape(v.shape)

    def pinv_solve(self, v: Tensor, rtol: float | None = None) -> Tensor:
        """Return the Moore-Penrose pseudo-inverse of G times v, the natural gradient of a singular metric.

        Source: Thomas 2014, as cited in section 2.

        Args:
            v: one vector, [D] or in the shape of the parameters, or several, [D, k].
            rtol: the threshold for blocks scaled to a unit diagonal; None for that of the class.

        Returns:
            The least-norm solution, in the shape of v. Negative eigenvalues of an observed metric keep their sign.
        """
        pieces = self._pieces(self._columns(v))
        return self._scaled(rtol=rtol).pseudo_solve(pieces).to(self.dtype).reshape(v.shape)

    def natural_gradient(self, gradient: Tensor, damping: float = 0.0) -> Tensor:
        """Return the natural gradient G^-1 dL of a loss, the direction of equation (7).

        Args:
            gradient: the gradient dL, [D] or in the shape of the parameters.
            damping: the damping, >= 0. With 0, G^-1 is the pseudo-inverse (Thomas 2014); for blocks of more than 4096
                parameters it is computed by conjugate residuals, without a preconditioner.

        Returns:
            The direction, in the shape of the gradient; a step is the negative of it times the learning rate. For an
            observed metric with negative eigenvalues, it need not be a direction of ascent.

        Raises:
            SingularMetricError: as in `solve`, with damping.
            IndefiniteMetricError: as in `solve`.
        """
        if damping:
            return self.solve(gradient, damping)
        if self._direct_sum_shape()[1] <= _DENSE_BLOCK:
            return self.pinv_solve(gradient)
        columns = self._columns(gradient)
        solution, _ = conjugate_residuals(self._product, columns, torch.ones_like(columns[:, 0]))
        return solution.reshape(gradient.shape)

    def _scaled(self, damping: float = 0.0, rtol: float | None = None) -> ScaledBlocks:
        """Return the distinct blocks of G + damping I, scaled to a unit diagonal."""
        if rtol is not None:
            check_interval("rtol", rtol, 0, 1)
        return ScaledBlocks(self._checked_direct_sum(), damping, rtol)

    def _pieces(self, columns: Float[Tensor, "D k"]) -> Float[Tensor, "m b k"]:
        """Return the right-hand sides of each block, in float64."""
        return columns.double().reshape(-1, self._direct_sum_shape()[1], columns.shape[1])

    def _block_values(self) -> Float[Tensor, "q b"]:
        """Return the eigenvalues of each distinct block, in float64."""
        values: Tensor = torch.linalg.eigvalsh(self._checked_direct_sum("ask for the k largest eigenvalues").double())
        return values

    def _cleaned_values(self) -> Float[Tensor, "q b"]:
        """Return the eigenvalues of each distinct block; those that count as 0 are exactly 0."""
        values = self._block_values()
        order = values.abs().argsort(dim=-1).argsort(dim=-1)
        return values.masked_fill(order < self._scaled().null.sum(-1, keepdim=True), 0)

    def _lanczos(self, k: int) -> Float[Tensor, "k"]:
        """Return the k largest eigenvalues, from one copy of repeated blocks: Lanczos finds equal ones only once."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        repeats = self._repeats()
        size = self.shape[0] // repeats

        if not bool(self._product(self._probe()).any()):
            return torch.zeros(k, dtype=self.dtype, device=self.device)  # ARPACK has no vector to start from

        def product(vector: np.ndarray) -> np.ndarray:
            column = torch.zeros(self.shape[0], 1, dtype=self.dtype, device=self.device)
            column[:size, 0] = torch.as_tensor(vector.reshape(-1), device=self.device)
            return self._product(column)[:size, 0].cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        operator = LinearOperator((size, size), matvec=product, dtype=dtype)
        values = eigsh(operator, k=-(-k // repeats), which="LA", return_eigenvectors=False)
        found = torch.as_tensor(values.copy(), dtype=self.dtype, device=self.device)
        return found.repeat_interleave(repeats).sort().values[-k:]
