"""A metric stored as a matrix, such as automatic differentiation returns."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relfisher.metric.base import Metric
from relfisher.metric.scaled import check_symmetric
from relfisher.shapes import Float
from relfisher.validation import check_floating, check_matrix

__all__ = ["DenseMetric"]


class DenseMetric(Metric):
    """A metric given by its matrix.

    Args:
        matrix: the symmetric matrix G, [D, D]; it is kept, not copied.
        parameter_shape: the shape of the subsystem's parameters; None for [D].
        samples: the number of samples that G averages over.
        standard_error: the standard error of each entry of G, if G was estimated by sampling.

    Raises:
        ValueError: if the matrix is not square, finite and symmetric, or its size does not match `parameter_shape`.
        TypeError: if the matrix does not have a floating-point dtype.
    """

    def __init__(
        self,
        matrix: Tensor,
        parameter_shape: tuple[int, ...] | None = None,
        samples: int = 1,
        standard_error: Float[Tensor, "D D"] | None = None,
    ) -> None:
        check_floating("matrix", matrix)
        check_matrix("matrix", matrix, matrix.shape[-1] if matrix.ndim else None, None, "[D, D]")
        if parameter_shape is not None and math.prod(parameter_shape) != matrix.shape[0]:
            raise ValueError(f"matrix must have shape [D, D] for parameters {parameter_shape}, got {[*matrix.shape]}")
        check_symmetric("matrix", matrix)
        super().__init__(parameter_shape or (matrix.shape[0],), samples, matrix.dtype, matrix.device)
        self.matrix = matrix
        self.standard_error = standard_error

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        return self.matrix @ vectors

    def _direct_sum_shape(self) -> tuple[int, int]:
        return 1, self.matrix.shape[0]

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        return self.matrix.unsqueeze(0)

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonal of G."""
        return torch.diagonal(self.matrix).clone()
