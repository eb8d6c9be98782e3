"""A metric tensor as one linear operator: products, solves, spectra and lengths, for any subsystem.

A subclass defines how G acts on vectors and how G splits into a direct sum of dense blocks. Everything else is derived
here. A full metric is a direct sum of one block, so full and block-diagonal metrics share the same code.

Axes: `D` parameters of the subsystem, `b` parameters of a block, `q` distinct blocks, `k` columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from relfisher.memory import check_fits
from relfisher.metric.iterative import conjugate_gradients, least_correlation_eigenvalues
from relfisher.shapes import Float
from relfisher.validation import check_finite, check_floating, check_interval

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

__all__ = ["Metric", "SingularMetricError"]

# Blocks of up to this many parameters are factorized; larger ones are solved by conjugate gradients.
_DENSE_BLOCK = 4096


class SingularMetricError(ValueError):
    """The metric, with the damping that was given, is singular to working precision."""


class Metric(ABC):
    """A symmetric positive semi-definite matrix G [D, D] that is applied without being formed.

    Attributes:
        parameter_shape: the shape of the subsystem's parameters; D is its product. Methods accept vectors that are flat
            [D] or have this shape, and return results of the same shape.
        samples: the number of samples that the metric averages over.
        dtype: the dtype of its entries.
        device: the device that holds it.
    """

    def __init__(
        self, parameter_shape: tuple[int, ...], samples: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.parameter_shape = parameter_shape
        self.samples = samples
        self.dtype = dtype
        self.device = device

    # A subclass implements these.

    @abstractmethod
    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """Return G times the vectors."""

    @abstractmethod
    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        """Return the blocks whose direct sum is G; a single block (q = 1) may stand for D / b equal ones."""

    @abstractmethod
    def _direct_sum_shape(self) -> tuple[int, int]:
        """Return q and b."""

    @abstractmethod
    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonal of G."""

    # Derived operations.

    @property
    def shape(self) -> tuple[int, int]:
        """The shape (D, D)."""
        size = math.prod(self.parameter_shape)
        return (size, size)

    def matvec(self, vector: Tensor) -> Tensor:
        """Return G v for one vector.

        Args:
            vector: v, [D] or in the shape of the parameters.

        Returns:
            G v, in the shape of v.

        Raises:
            ValueError: if v has the wrong shape.
            TypeError: if the dtype of v is not the metric's.
        """
        flat = self._flat("vector", vector)
        return self._product(flat.unsqueeze(1)).squeeze(1).reshape(vector.shape)

    def matmat(self, vectors: Tensor) -> Float[Tensor, "D k"]:
        """Return G V for a matrix of columns.

        Args:
            vectors: V, [D, k].

        Returns:
            G V.

        Raises:
            ValueError: if V does not have D rows.
            TypeError: if the dtype of V is not the metric's.
        """
        self._check_dtype("vectors", vectors)
        if vectors.ndim != 2 or vectors.shape[0] != self.shape[0]:
            raise ValueError(f"vectors must have shape [D, k] = [{self.shape[0]}, k], got {list(vectors.shape)}")
        return self._product(vectors)

    def __matmul__(self, other: Tensor) -> Tensor:
        check_floating("the right side of @", other)
        one = other.ndim == 1 or tuple(other.shape) == self.parameter_shape
        return self.matvec(other) if one else self.matmat(other)

    def __repr__(self) -> str:
        count, size = self._direct_sum_shape()
        return (
            f"{type(self).__name__}(shape={self.shape}, parameters={list(self.parameter_shape)}, "
            f"samples={self.samples}, blocks={self.shape[0] // size} of {size}x{size} ({count} distinct), "
            f"dtype={self.dtype}, device={self.device})"
        )

    def to_dense(self) -> Float[Tensor, "D D"]:
        """Return the matrix G.

        Returns:
            G, with the parameters in the order of the flattened parameter shape.

        Raises:
            ValueError: if it would take more than half of the free memory.
        """
        size = self.shape[0]
        check_fits(
            "the dense metric", size**2, self.dtype, self.device, "use @, solve or blocks(), which do not form it"
        )
        blocks = self.blocks()
        if blocks.shape[0] == 1:
            return blocks[0].clone()
        dense = blocks.new_zeros(self.shape).reshape(-1, blocks.shape[-1], blocks.shape[0], blocks.shape[-1])
        diagonal = torch.arange(blocks.shape[0], device=self.device)
        dense[diagonal, :, diagonal, :] = blocks
        return dense.reshape(self.shape)

    def blocks(self) -> Float[Tensor, "blocks b b"]:
        """Return the blocks whose direct sum is G: one per unit if units are independent, else G itself.

        Returns:
            The D / b blocks; equal blocks may share memory.

        Raises:
            ValueError: if the blocks would take more than half of the free memory.
        """
        distinct = self._checked_direct_sum()
        return distinct.expand(self.shape[0] // distinct.shape[-1], *distinct.shape[1:])

    def trace(self) -> Float[Tensor, ""]:
        """Return the trace of G."""
        return self.diagonal().sum()

    def inner(self, u: Tensor, v: Tensor) -> Float[Tensor, ""]:
        """Return u' G v, the inner product of two steps. Equations (6), (10).

        Args:
            u: a step, [D] or in the shape of the parameters.
            v: another step.

        Returns:
            A scalar.
        """
        return torch.dot(self._flat("u", u), self.matvec(v).reshape(-1))

    def norm(self, u: Tensor) -> Float[Tensor, ""]:
        """Return the length of a step, sqrt(u' G u): how much it changes the response. Equations (6), (10).

        Args:
            u: a step, [D] or in the shape of the parameters.

        Returns:
            A scalar.
        """
        return self.inner(u, u).clamp(min=0).sqrt()

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

    def to_scipy(self) -> LinearOperator:
        """Return the metric as a `scipy.sparse.linalg.LinearOperator` on NumPy arrays.

        Returns:
            The operator, with the metric's shape and dtype.

        Raises:
            ModuleNotFoundError: if scipy is not installed.
        """
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def product(columns: np.ndarray) -> np.ndarray:
            tensor = torch.as_tensor(columns, dtype=self.dtype, device=self.device)
            matrix = tensor.reshape(self.shape[0], -1)
            return self._product(matrix).reshape(tensor.shape).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype)

    # Internals.

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        check_floating(name, tensor)
        if tensor.dtype != self.dtype:
            raise TypeError(f"{name} must have the metric's dtype {self.dtype}, got {tensor.dtype}")

    def _flat(self, name: str, vector: Tensor) -> Float[Tensor, "D"]:
        self._check_dtype(name, vector)
        flat = (self.shape[0],)
        if tuple(vector.shape) not in (flat, self.parameter_shape):
            raise ValueError(
                f"{name} must have shape [{self.shape[0]}] or that of the parameters "
                f"{list(self.parameter_shape)}, got {list(vector.shape)}"
            )
        return vector.reshape(-1)

    def _columns(self, v: Tensor) -> Float[Tensor, "D k"]:
        """Check the right-hand sides and return them as columns."""
        self._check_dtype("v", v)
        one = v.ndim == 1 or tuple(v.shape) == self.parameter_shape
        if one:
            columns = self._flat("v", v).unsqueeze(1)
        elif v.ndim == 2 and v.shape[0] == self.shape[0]:
            columns = v
        else:
            raise ValueError(
                f"v must have shape [{self.shape[0]}], [{self.shape[0]}, k] or that of the parameters "
                f"{list(self.parameter_shape)}, got {list(v.shape)}"
            )
        check_finite("v", columns)
        return columns

    def _checked_direct_sum(self, instead: str = "use @ and solve, which do not form them") -> Float[Tensor, "q b b"]:
        count, size = self._direct_sum_shape()
        check_fits(f"{count} dense blocks of {size}x{size}", count * size**2, self.dtype, self.device, instead)
        return self._direct_sum()

    def _threshold(self, values: Tensor, rtol: float | None) -> float:
        if rtol is None:
            rtol = self.shape[0] * torch.finfo(self.dtype).eps
        else:
            check_interval("rtol", rtol, 0, 1)
        return rtol * max(float(values.max()), 0.0)

    def _lanczos(self, k: int) -> Float[Tensor, "k"]:
        """Return the k largest eigenvalues, from one copy of repeated blocks: Lanczos finds equal ones only once."""
        import numpy as np
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

    def _repeats(self) -> int:
        """Return how many copies of the direct sum make up G: D / b if all blocks are equal, else 1."""
        count, size = self._direct_sum_shape()
        return self.shape[0] // (count * size)
