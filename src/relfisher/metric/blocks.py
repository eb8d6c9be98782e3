"""Metrics that are held as blocks, as running averages are: a direct sum of blocks, or a Kronecker product."""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.metric.base import Metric
from relfisher.metric.scaled import check_symmetric
from relfisher.shapes import Float
from relfisher.validation import check_finite

__all__ = ["BlockMetric", "DiagonalMetric", "KroneckerMetric"]


class BlockMetric(Metric):
    """A direct sum of blocks of one size: a block a unit, equation (23), or one that all units share, equation (22).

    Args:
        blocks: [q, b, b]; one block (q = 1) stands for all D / b of them.
        parameter_shape: the shape of the parameters, whose last axis is that of a block.
        samples: how many samples the metric is a mean over.

    Raises:
        ValueError: if a block is not finite and symmetric.
    """

    def __init__(self, blocks: Float[Tensor, "q b b"], parameter_shape: tuple[int, ...], samples: int = 1) -> None:
        super().__init__(parameter_shape, samples, blocks.dtype, blocks.device)
        check_finite("blocks", blocks)
        check_symmetric("blocks", blocks)
        self._blocks = blocks

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        pieces = vectors.reshape(-1, self._blocks.shape[-1], vectors.shape[1])
        return (self._blocks @ pieces).reshape(vectors.shape)

    def _direct_sum_shape(self) -> tuple[int, int]:
        return self._blocks.shape[0], self._blocks.shape[-1]

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        return self._blocks

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonals of the blocks, one after another."""
        diagonals = self._blocks.diagonal(dim1=-2, dim2=-1).reshape(-1)
        return diagonals.repeat(self.shape[0] // diagonals.numel())


class DiagonalMetric(Metric):
    """A diagonal metric.

    Args:
        diagonal: [D].
        parameter_shape: the shape of the parameters.
        samples: how many samples the metric is a mean over.

    Raises:
        ValueError: if an entry is not finite.
    """

    def __init__(self, diagonal: Float[Tensor, "D"], parameter_shape: tuple[int, ...], samples: int = 1) -> None:
        super().__init__(parameter_shape, samples, diagonal.dtype, diagonal.device)
        check_finite("diagonal", diagonal)
        self._diagonal = diagonal

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        return self._diagonal.unsqueeze(1) * vectors

    def _direct_sum_shape(self) -> tuple[int, int]:
        return self.shape[0], 1

    def _direct_sum(self) -> Float[Tensor, "D b b"]:
        return self._diagonal.reshape(-1, 1, 1)

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonal."""
        return self._diagonal.clone()


class KroneckerMetric(Metric):
    """The Kronecker product B (x) A of a factor of the outputs and one of the inputs, for parameters [out, d].

    Args:
        outputs: B, [out, out].
        inputs: A, [d, d].
        samples: how many samples the factors are means over.

    Raises:
        ValueError: if a factor is not finite and symmetric.
    """

    def __init__(self, outputs: Float[Tensor, "out out"], inputs: Float[Tensor, "d d"], samples: int = 1) -> None:
        super().__init__((outputs.shape[-1], inputs.shape[-1]), samples, inputs.dtype, inputs.device)
        for name, factor in {"outputs": outputs, "inputs": inputs}.items():
            check_finite(name, factor)
            check_symmetric(name, factor)
        self.outputs = outputs
        self.inputs = inputs

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        fields = vectors.T.reshape(-1, *self.parameter_shape)
        return (self.outputs @ fields @ self.inputs).reshape(vectors.shape[1], -1).T

    def _direct_sum_shape(self) -> tuple[int, int]:
        return 1, self.shape[0]

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        return torch.kron(self.outputs, self.inputs).unsqueeze(0)

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the products of the diagonals."""
        return torch.outer(self.outputs.diagonal(), self.inputs.diagonal()).reshape(-1)
