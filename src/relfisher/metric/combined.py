"""Metrics built from other metrics: a mean over batches, a direct sum over groups, a change of coordinates."""

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
    """The properties that metrics must share to be combined."""

    parameter_shape: tuple[int, ...]
    blocks_shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


def _kind(metric: Metric) -> _Kind:
    return _Kind(metric.parameter_shape, metric._direct_sum_shape(), metric.dtype, metric.device)


class BatchedMetric(Metric):
    """The metric over all batches of a data set, with one batch in memory at a time.

    Every operation makes one pass over the batches, and weights each batch by its number of samples.

    Args:
        make: a function that returns the metric of one batch, such as
            `lambda x: layer_metric(x, weight, bias, response)`.
        batches: an iterable that allows repeated passes, such as a list or a `DataLoader` that does not shuffle; not an
            iterator.

    Raises:
        TypeError: if `batches` is an iterator, which would be empty after the first pass.
        ValueError: if there is no batch, or the metrics of two batches differ in parameters, blocks, dtype or device.
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
        """Yield a term of each batch's metric, releasing each batch before taking the next one."""
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
    """The block-diagonal metric of independent groups of parameters, with one metric per group.

    Args:
        metrics: one metric per group, all of the same parameter shape and number of samples.

    Raises:
        ValueError: if there is no metric, or two of them are not alike.
    """

    def __init__(self, metrics: Sequence[Metric]) -> None:
        kinds = {(_kind(metric), metric.samples) for metric in metrics}
        if len(kinds) != 1:
            raise ValueError(f"metrics must not be empty and must be alike, got {len(kinds)} kinds")
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
        """Return how many equal blocks of a group each distinct block stands for; `_direct_sum` repeats them."""
        count, size = self.metrics[0]._direct_sum_shape()
        return self.metrics[0].shape[0] // (count * size)

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        return torch.cat([metric._direct_sum().repeat(self._copies(), 1, 1) for metric in self.metrics])

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return the diagonals of the groups, concatenated."""
        return torch.cat([metric.diagonal() for metric in self.metrics])


class TransformedMetric(Metric):
    """A metric in other coordinates, J' G J. Equation (8).

    Args:
        metric: the metric G in the coordinates Lambda.
        jacobian: the Jacobian J = dLambda / dTheta, [D, K].

    Raises:
        ValueError: if J does not have D rows, or J or the metric is not finite.
        TypeError: if the dtype of J is not the metric's.
    """

    def __init__(self, metric: Metric, jacobian: Tensor) -> None:
        check_matrix("jacobian", jacobian, metric.shape[0], None, "[D, K]")
        metric._check_dtype("jacobian", jacobian)
        super().__init__((jacobian.shape[1],), metric.samples, metric.dtype, metric.device)
        self.metric = metric
        self.jacobian = jacobian
        self._check_products()

    def _product(self, vectors: Float[Tensor, "K k"]) -> Float[Tensor, "K k"]:
        return self.jacobian.T @ self.metric._product(self.jacobian @ vectors)

    def _direct_sum_shape(self) -> tuple[int, int]:
        return 1, self.jacobian.shape[1]

    def _direct_sum(self) -> Float[Tensor, "q K K"]:
        return self._product(torch.eye(self.shape[0], dtype=self.dtype, device=self.device)).unsqueeze(0)

    def diagonal(self) -> Float[Tensor, "K"]:
        """Return the diagonal of J' G J."""
        return (self.jacobian * self.metric._product(self.jacobian)).sum(0)
