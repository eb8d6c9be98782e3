"""A metric as a linear operator: products, lengths and blocks.

Axes: `D` parameters of the subsystem, `b` parameters of a block, `q` distinct blocks, `k` columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from relfisher.memory import check_fits
from relfisher.metric.scaled import rounding
from relfisher.shapes import Float
from relfisher.validation import check_finite, check_floating

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator

__all__ = ["IndefiniteMetricError", "Operator"]


class IndefiniteMetricError(ValueError):
    """The metric, with the damping that was given, has a negative eigenvalue where it must not have one."""


class Operator(ABC):
    """A symmetric matrix G [D, D] that is applied without being formed; see `Metric` for its attributes."""

    # True if G cannot have negative eigenvalues, other than by rounding errors.
    _semidefinite = False

    def __init__(
        self, parameter_shape: tuple[int, ...], samples: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"a metric must be of torch.float32 or torch.float64, got {dtype}: convert with .float()")
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

        Raises:
            IndefiniteMetricError: if u' G u is negative beyond rounding errors.
        """
        flat = self._flat("u", u)
        size = flat.detach().abs().max()
        size = size.where(size > 0, 1)
        unit = flat / size  # squares of u itself may be too large or too small for the dtype
        square = torch.dot(unit, self.matvec(unit))
        if square < 0 and not self._semidefinite:
            bound = (unit.abs() @ self.diagonal().abs().sqrt()).square()
            if square < -rounding(self.shape[0], self.dtype) * bound:
                length = float(square) * float(size) * float(size)
                raise IndefiniteMetricError(f"u must have a length, but u' G u is {length:.3g} in this metric")
        return square.clamp(min=0).sqrt() * size

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
            if np.iscomplexobj(columns):
                return product(columns.real) + 1j * product(columns.imag)
            given = np.ascontiguousarray(columns)  # torch has no negative strides
            tensor = torch.as_tensor(given, dtype=self.dtype, device=self.device)
            matrix = tensor.reshape(self.shape[0], -1)
            return self._product(matrix).reshape(tensor.shape).cpu().numpy()

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=product, rmatvec=product, matmat=product, rmatmat=product, dtype=dtype)

    def _probe(self) -> Float[Tensor, "D one"]:
        """Return a vector with different entries whose sum is not larger than 2."""
        return torch.linspace(1, 2, self.shape[0], dtype=self.dtype, device=self.device).unsqueeze(1) / self.shape[0]

    def _check_products(self) -> None:
        """Raise ValueError if a product with the probe, of the size of a mean over columns, is not finite."""
        check_finite("the metric", self._product(self._probe()))

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
        blocks = self._direct_sum()
        check_finite("the metric", blocks)
        return blocks

    def _repeats(self) -> int:
        """Return how many copies of the direct sum make up G: D / b if all blocks are equal, else 1."""
        count, size = self._direct_sum_shape()
        return self.shape[0] // (count * size)
