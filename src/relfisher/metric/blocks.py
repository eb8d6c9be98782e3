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
        ValueError: if a block is not finite and symmetric, or the blocks do not make up the parameters.
    """

    def __init__(self, blocks: Tensor, parameter_shape: tuple[int, ...], samples: int = 1) -> None:
        super().__init__(parameter_shape, samples, blocks.dtype, blocks.device)
        check_finite("blocks", blocks)
        check_symmetric("blocks", blocks)
        size, rows = self.shape[0], blocks[..., 0].numel()
        if blocks.ndim != 3 or (size != rows if len(blocks) > 1 else size % rows):
            raise ValueError(
                f"blocks must be [q, b, b] with q b = {size} parameters, or one that is repeated, got shape "
                f"{list(blocks.shape)}"
            )
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
        ValueError: if an entry is not finite, or there is not one per parameter.
    """

    def __init__(self, diagonal: Tensor, parameter_shape: tuple[int, ...], samples: int = 1) -> None:
        super().__init__(parameter_shape, samples, diagonal.dtype, diagonal.device)
        check_finite("diagonal", diagonal)
        if tuple(diagonal.shape) != self.shape[:1]:
            raise ValueError(f"diagonal must have shape [{self.shape[0]}], got {list(diagonal.shape)}")
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
        ValueError: if a factor is not finite and symmetric, or their product is not finite.
        TypeError: if the dtypes differ.
    """

    def __init__(self, outputs: Tensor, inputs: Tensor, samples: int = 1) -> None:
        super().__init__((outputs.shape[-1], inputs.shape[-1]), samples, inputs.dtype, inputs.device)
        for name, factor in {"outputs": outputs, "inputs": inputs}.items():
            check_finite(name, factor)
            check_symmetric(name, factor)
        if outputs.dtype != inputs.dtype:
            raise TypeError(f"outputs and inputs must have one dtype, got {outputs.dtype} and {inputs.dtype}")
        check_finite("the product of the largest entries", outputs.abs().max() * inputs.abs().max())
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
