"""The running metric of any structure as one linear operator, given only its product."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from relfisher.metric import BlockMetric, GroupedMetric, KroneckerMetric, Metric
from relfisher.shapes import Float

__all__ = ["AppliedMetric", "block_operator", "kronecker_operator"]


class AppliedMetric(Metric):
    """A metric whose product is a structure's `apply`; its matrix is computed from products with unit vectors.

    Args:
        apply: multiplies a field [*g, out, d] by the metric's tensors.
        tensors: the tensors of the metric.
        parameter_shape: the shape [*g, out, d].
    """

    def __init__(
        self,
        apply: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
        tensors: Mapping[str, Tensor],
        parameter_shape: tuple[int, ...],
    ) -> None:
        first = tensors["metric"]
        super().__init__(parameter_shape, 1, first.dtype, first.device)
        self._apply = apply
        self._tensors = tensors

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        fields = [self._apply(column.reshape(self.parameter_shape), self._tensors) for column in vectors.T]
        return torch.stack([field.reshape(-1) for field in fields], dim=1)

    def _direct_sum_shape(self) -> tuple[int, int]:
        return 1, self.shape[0]

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        return self._product(torch.eye(self.shape[0], dtype=self.dtype, device=self.device)).unsqueeze(0)

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonal of G."""
        return self._direct_sum()[0].diagonal().clone()


def block_operator(blocks: Float[Tensor, "*q d d"], shape: tuple[int, ...]) -> Metric:
    """Return the metric of parameters [*g, out, d] with blocks [*g, d, d] or [*g, out, d, d]."""
    if len(shape) == 3:
        return GroupedMetric([block_operator(group, shape[1:]) for group in blocks])
    return BlockMetric(blocks.reshape(-1, *blocks.shape[-2:]), shape)


def kronecker_operator(outputs: Float[Tensor, "*g out out"], inputs: Float[Tensor, "*g d d"]) -> Metric:
    """Return the metric of parameters [*g, out, d] with the two given factors."""
    if inputs.ndim == 3:
        return GroupedMetric([kronecker_operator(*group) for group in zip(outputs, inputs, strict=True)])
    return KroneckerMetric(outputs, inputs)
