"""Metrics made of other metrics: the mean over a data set's batches, and the same metric in other coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from relfisher.metric.base import Metric
from relfisher.shapes import Float
from relfisher.validation import check_matrix

__all__ = ["BatchedMetric", "TransformedMetric"]

Batch = TypeVar("Batch")


class BatchedMetric(Metric):
    """The metric over all batches of a data set, of which one is in memory at a time.

    Every operation goes through the batches once, and weighs each by its samples.

    Args:
        make: the metric of one batch, such as `lambda x: layer_metric(x, weight, bias, response)`.
        batches: what can be iterated over again and again: a list or a `DataLoader` that does not shuffle, no iterator.

    Raises:
        TypeError: if `batches` is an iterator, which is empty after the first pass.
        ValueError: if there is no batch.
    """

    def __init__(self, make: Callable[[Batch], Metric], batches: Iterable[Batch]) -> None:
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches must allow more than one pass, got the iterator {type(batches).__name__}: give a list or a "
                "DataLoader"
            )
        self._make = make
        self._batches = batches
        first, samples = None, 0
        for metric in self._metrics():
            first = first or metric
            samples += metric.samples
        if first is None:
            raise ValueError("batches must not be empty, got no batch")
        super().__init__(first.parameter_shape, samples, first.dtype, first.device)
        self._blocks_shape = first._direct_sum_shape()

    def _metrics(self) -> Iterator[Metric]:
        for batch in self._batches:
            yield self._make(batch)

    def _mean(self, term: Callable[[Metric], Tensor]) -> Tensor:
        total: Tensor | None = None
        for metric in self._metrics():
            part = term(metric) * (metric.samples / self.samples)
            total = part if total is None else total.add_(part)
        assert total is not None  # the constructor saw a batch
        return total

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        return self._mean(lambda metric: metric._product(vectors))

    def _direct_sum_shape(self) -> tuple[int, int]:
        return self._blocks_shape

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        return self._mean(lambda metric: metric._direct_sum())

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonal of G."""
        return self._mean(lambda metric: metric.diagonal())


class TransformedMetric(Metric):
    """The metric in other coordinates, J' G J. Equation (8).

    Args:
        metric: G, in the coordinates Lambda.
        jacobian: J = dLambda / dTheta, [D, K].

    Raises:
        ValueError: if J does not have D rows.
    """

    def __init__(self, metric: Metric, jacobian: Float[Tensor, "D K"]) -> None:
        check_matrix("jacobian", jacobian, metric.shape[0], None, "[D, K]")
        super().__init__((jacobian.shape[1],), metric.samples, metric.dtype, metric.device)
        self.metric = metric
        self.jacobian = jacobian

    def _product(self, vectors: Float[Tensor, "K k"]) -> Float[Tensor, "K k"]:
        return self.jacobian.T @ self.metric._product(self.jacobian @ vectors)

    def _direct_sum_shape(self) -> tuple[int, int]:
        return 1, self.jacobian.shape[1]

    def _direct_sum(self) -> Float[Tensor, "q K K"]:
        return self._product(torch.eye(self.shape[0], dtype=self.dtype, device=self.device)).unsqueeze(0)

    def diagonal(self) -> Float[Tensor, "K"]:
        """Return the diagonal of J' G J."""
        return (self.jacobian * self.metric._product(self.jacobian)).sum(0)
