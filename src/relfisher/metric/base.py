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

from relfisher.metric.iterative import conjugate_gradients, least_correlation_eigenvalues
from relfisher.metric.operator import Operator
from relfisher.shapes import Float
from relfisher.validation import check_interval

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Metric", "SingularMetricError"]

# Blocks of up to this many parameters are factorized; larger ones are solved by conjugate gradients.
_DENSE_BLOCK = 4096


class SingularMetricError(ValueError):
    """The metric, with the damping that was given, is singular to working precision."""


class Metric(Operator):
    """A symmetric positive semi-definite matrix G [D, D] that is applied without being formed.

    Attributes:
        parameter_shape: the shape of the subsystem's parameters; D is its product. Methods accept vectors that are flat
            [D] or have this shape, and return results of the same shape.
        samples: the number of samples that the metric averages over.
        dtype: the dtype of its entries.
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
        if k is not None and not 1 <= k <= self.shape[0]:
            raise ValueError(f"k must lie in [1, {self.shape[0]}], got {k}")
        few = k is not None and k < self.shape[0] - 2 * self._repeats()
        if k is not None and few and self._direct_sum_shape()[1] > _DENSE_BLOCK:
            return self._lanczos(k)
        distinct = self._checked_direct_sum("ask for the k largest eigenvalues")
        values: Tensor = torch.linalg.eigvalsh(distinct)
        values = values.flatten().repeat_interleave(self._repeats()).sort().values
        return values if k is None else values[-k:]

    def rank(self, rtol: float | None = None) -> int:
        """Return the numerical rank: the number of eigenvalues above `rtol` times the largest.

        Args:
            rtol: the relative threshold; None for D times the machine epsilon.

        Returns:
            The numerical rank.
        """
        values = self.eigvalsh()
        return int((values > self._threshold(values, rtol)).sum())

    def condition_number(self, damping: float = 0.0) -> float:
        """Return the ratio of the largest to the smallest eigenvalue of G + damping I.

        Args:
            damping: the damping, >= 0.

        Returns:
            The ratio; infinite for a singular metric without damping.
        """
        check_interval("damping", damping, 0, math.inf)
        values = self.eigvalsh().clamp(min=0)
        if damping == 0 and values[0] <= self._threshold(values, None):
            return math.inf
        return float((values[-1] + damping) / (values[0] + damping))

    def logdet(self, damping: float = 0.0) -> Float[Tensor, ""]:
        """Return ln det(G + damping I).

        Args:
            damping: the damping, >= 0.

        Returns:
            A scalar, -inf for a singular metric without damping; eigenvalues below the threshold of `rank` count as 0.
        """
        check_interval("damping", damping, 0, math.inf)
        values = self.eigvalsh()
        values = values.where(values > self._threshold(values, None), torch.zeros_like(values))
        return (values + damping).log().sum()

    def solve(self, v: Tensor, damping: float = 0.0) -> Tensor:
        """Return (G + damping I)^-1 v.

        Blocks of up to 4096 parameters are factorized (Cholesky). Larger ones are solved by conjugate gradients,
        preconditioned by the diagonal, to a relative residual of 100 machine epsilons, with a `ConvergenceWarning` if
        that is not reached.

        Args:
            v: one vector, [D] or in the shape of the parameters, or several, [D, k].
            damping: the damping, >= 0.

        Returns:
            The solution, in the shape of v.

        Raises:
            ValueError: if damping is negative or v has the wrong shape.
            SingularMetricError: if a factorized block is singular to working precision, damping included.
        """
        check_interval("damping", damping, 0, math.inf)
        columns = self._columns(v)
        if self._direct_sum_shape()[1] > _DENSE_BLOCK:
            return conjugate_gradients(self._product, columns, self.diagonal(), damping).reshape(v.shape)
        damped = self._checked_direct_sum().clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping)
        factor, info = torch.linalg.cholesky_ex(damped)
        regular = bool((info == 0).all())
        if regular:
            least = least_correlation_eigenvalues(factor, damped.diagonal(dim1=-2, dim2=-1))
            regular = bool((least > 10 * torch.finfo(self.dtype).eps).all())
        if not regular:
            raise SingularMetricError(
                f"the metric is singular with damping {damping}: give a larger damping, or use pinv_solve"
            )
        pieces = columns.reshape(-1, damped.shape[-1], columns.shape[1])
        solution = torch.cholesky_solve(pieces, factor)
        return solution.reshape(v.shape)

    def pinv_solve(self, v: Tensor, rtol: float | None = None) -> Tensor:
        """Return the Moore-Penrose pseudo-inverse of G times v, the natural gradient of a singular metric.

        Source: Thomas 2014, as cited in section 2.

        Args:
            v: one vector, [D] or in the shape of the parameters, or several, [D, k].
            rtol: eigenvalues up to `rtol` times the largest count as 0; None for D times the machine epsilon.

        Returns:
            The least-norm solution, in the shape of v.
        """
        columns = self._columns(v)
        values, vectors = torch.linalg.eigh(self._checked_direct_sum())
        kept = values > self._threshold(values, rtol)
        inverse = torch.where(kept, 1 / values.where(kept, torch.ones_like(values)), torch.zeros_like(values))
        pieces = columns.reshape(-1, values.shape[-1], columns.shape[1])
        solution: Tensor = vectors @ (inverse.unsqueeze(-1) * (vectors.mT @ pieces))
        return solution.reshape(v.shape)

    def natural_gradient(self, gradient: Tensor, damping: float = 0.0) -> Tensor:
        """Return the natural gradient G^-1 dL of a loss, the direction of equation (7).

        Args:
            gradient: the gradient dL, [D] or in the shape of the parameters.
            damping: the damping, >= 0. With 0, G^-1 is the pseudo-inverse (Thomas 2014), or, for blocks of more than
                4096 parameters, a solve by conjugate gradients.

        Returns:
            The direction, in the shape of the gradient; a step is the negative of it times the learning rate.
        """
        if damping == 0 and self._direct_sum_shape()[1] <= _DENSE_BLOCK:
            return self.pinv_solve(gradient)
        return self.solve(gradient, damping)

    def _threshold(self, values: Tensor, rtol: float | None) -> float:
        if rtol is None:
            rtol = self.shape[0] * torch.finfo(self.dtype).eps
        else:
            check_interval("rtol", rtol, 0, 1)
        return rtol * max(float(values.max()), 0.0)

    def _lanczos(self, k: int) -> Float[Tensor, "k"]:
        """Return the k largest eigenvalues, from one copy of repeated blocks: Lanczos finds equal ones only once."""
        from scipy.sparse.linalg import LinearOperator, eigsh

        repeats = self._repeats()
        size = self.shape[0] // repeats

        def product(vector: np.ndarray) -> np.ndarray:
            column = torch.zeros(self.shape[0], 1, dtype=self.dtype, device=self.device)
            column[:size, 0] = torch.as_tensor(vector.reshape(-1), device=self.device)
            return self._product(column)[:size, 0].cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        operator = LinearOperator((size, size), matvec=product, dtype=dtype)
        values = eigsh(operator, k=-(-k // repeats), which="LA", return_eigenvectors=False)
        found = torch.as_tensor(values.copy(), dtype=self.dtype, device=self.device)
        return found.repeat_interleave(repeats).sort().values[-k:]
