"""Metrics made of others: the mean over batches, the sum over groups of parameters, the same in other coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from relfisher.metric.base import Metric
from relfisher.shapes import Float
from relfisher.validation import check_matrix

__all__ = ["BatchedMetric", "GroupedMetric", "TransformedMetric"]

Result = TypeVar("Result")


class _Kind(NamedTuple):
    """What the metrics of all batches have in common."""

    parameter_shape: tuple[int, ...]
    blocks_shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


def _kind(metric: Metric) -> _Kind:
    return _Kind(metric.parameter_shape, metric._direct_sum_shape(), metric.dtype, metric.device)


class BatchedMetric(Metric):
    """The metric over all batches of a data set, of which one is in memory at a time.

    Every operation goes through the batches once, and weighs each by its samples.

    Args:
        make: the metric of one batch, such as `lambda x: layer_metric(x, weight, bias, response)`.
        batches: what can be iterated over again and again: a list or a `DataLoader` that does not shuffle, no iterator.

    Raises:
        TypeError: if `batches` is an iterator, which is empty after the first pass.
        ValueError: if there is no batch, or the metrics of two batches are of different parameters.
    """

    def __init__(self, make: Callable[[Any], Metric], batches: Iterable[Any]) -> None:
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches must allow more than one pass, got the iterator {type(batches).__name__}: give a list or a "
                "DataLoader"
            )
        self._make = make
        self._batches = batches
        kind: _Kind | None = None
        samples = 0
        for count, other in self._each(lambda metric: (metric.samples, _kind(metric))):
            if kind not in (None, other):
                raise ValueError(f"the metrics of all batches must be alike, got {kind} and {other}")
            kind, samples = other, samples + count
        if kind is None:
            raise ValueError("batches must not be empty, got no batch")
        super().__init__(kind.parameter_shape, samples, kind.dtype, kind.device)
        self._blocks_shape = kind.blocks_shape

    def _each(self, term: Callable[[Metric], Result]) -> Iterator[Result]:
        """Yield a term of the metric of every batch; a batch is let go before the next one is taken."""
        for batch in self._batches:
            result = term(self._make(batch))
            del batch
            yield result

    def _mean(self, term: Callable[[Metric], Tensor]) -> Tensor:
        parts = self._each(lambda metric: term(metric) * (metric.samples / self.samples))
        total = next(parts)
        for part in parts:
            total.add_(part)
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


class GroupedMetric(Metric):
    """The metric of groups of parameters that do not meet, block diagonal with a metric a group.

    Args:
        metrics: one a group, of parameters of the same shape and over as many samples.

    Raises:
        ValueError: if there is none, or two are not alike.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        kinds = {(_kind(metric), metric.samples) for metric in metrics}
        if len(kinds) != 1:
            raise ValueError(f"metrics must be alike and at least one, got {len(kinds)} kinds")
        first = metrics[0]
        super().__init__((len(metrics), *first.parameter_shape), first.samples, first.dtype, first.device)
        self.metrics = list(metrics)

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        pieces = vectors.chunk(len(self.metrics))
        return torch.cat([metric._product(piece) for metric, piece in zip(self.metrics, pieces, strict=True)])

    def _direct_sum_shape(self) -> tuple[int, int]:
        count, size = self.metrics[0]._direct_sum_shape()
        return len(self.metrics) * self._copies() * count, size

    def _copies(self) -> int:
        """Return how many blocks of a group are one: those that its units share are spelled out here."""
        count, size = self.metrics[0]._direct_sum_shape()
        return self.metrics[0].shape[0] // (count * size)

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        return torch.cat([metric._direct_sum().repeat(self._copies(), 1, 1) for metric in self.metrics])

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonals, one group after another."""
        return torch.cat([metric.diagonal() for metric in self.metrics])


class TransformedMetric(Metric):
    """The metric in other coordinates, J' G J. Equation (8).

    Args:
        metric: G, in the coordinates Lambda.
        jacobian: J = dLambda / dTheta, [D, K].

    Raises:
        ValueError: if J does not have D rows, or is not finite.
        TypeError: if J has another dtype than the metric.
    """

    def __init__(self, metric: Metric, jacobian: Tensor) -> None:
        check_matrix("jacobian", jacobian, metric.shape[0], None, "[D, K]")
        metric._check_dtype("jacobian", jacobian)
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
