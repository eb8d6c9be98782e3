"""Samples in, statistics out, in one of two forms: all rows as they stream by, or an even sample of a limited number.

Samples of a call count once its gradients have flowed back. Either form holds them until then, and gives what a layer
saw within one step as rows, or as statistics where these are smaller.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer, Rows, Sampling
from relfisher.layers.samples import Held, Reservoir
from relfisher.responses import UnitResponse
from relfisher.structures import Samples, State, Statistics, Structure

__all__ = ["Batch", "Reading", "Reserved", "Sampler", "Streamed"]


class Reading(NamedTuple):
    """What statistics are made with: the structure of a layer and the response of its units."""

    structure: Structure
    response: UnitResponse

    def statistics(self, layer: Layer, rows: Rows) -> Statistics:
        """Return the statistics of samples of a layer."""
        with torch.no_grad(), torch.autocast(rows.x.device.type, enabled=False):
            return self.structure.batch_statistics(self._read(layer, rows))

    def average_in(self, layer: Layer, batch: Rows | Statistics, state: State, decay: float) -> bool:
        """Add samples, or their statistics, to the moving average of a state; return whether they are finite."""
        if isinstance(batch, Statistics):
            return self.structure.ema_update(state, batch, decay)
        with torch.no_grad(), torch.autocast(batch.x.device.type, enabled=False):
            return self.structure.ema_update_from(state, self._read(layer, batch), decay)

    def _read(self, layer: Layer, rows: Rows) -> Samples:
        return Samples(*layer.cast(rows if self.structure.reads_sparse else layer.spelled_out(rows)), self.response)


class Batch:
    """The samples of one call of a layer, held until its gradients flow back.

    Attributes:
        layer: whose call it was.
        sampling: which of the samples were taken.
        due: whether they are for the statistics; else they only tell that the layer ran.
        content: rows, statistics once those are made, or None.
    """

    def __init__(self, layer: Layer, sampling: Sampling, content: Rows | Statistics | None, *, due: bool) -> None:
        self.layer = layer
        self.sampling = sampling
        self.content = content
        self.due = due


class Sampler(ABC):
    """What one layer saw within a step.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    @abstractmethod
    def sampling(self, mask: Tensor | None) -> Sampling:
        """Return which samples of the next call go into the statistics."""

    @abstractmethod
    def hold(self, rows: Rows, sampling: Sampling, reading: Reading | None, *, due: bool) -> Batch:
        """Hold the samples of a call until its gradients flow back.

        Args:
            rows: of the call; they may share memory with it.
            sampling: by which they were taken.
            reading: what statistics are made with, if that is known already.
            due: whether they are for the statistics.

        Returns:
            The batch.
        """

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Count a batch whose gradients have flowed back."""

    @abstractmethod
    def result(self, reading: Reading) -> Rows | Statistics | None:
        """Return what was counted, or None if that is nothing."""

    @abstractmethod
    def clear(self) -> None:
        """Forget what was held and counted."""

    @property
    @abstractmethod
    def counted(self) -> bool:
        """Whether anything was counted since the last step."""


class Streamed(Sampler):
    """All rows: statistics are made at each call, unless its rows take less memory than they would."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._counted: list[Rows | Statistics] = []

    def sampling(self, mask: Tensor | None) -> Sampling:
        """Return that all samples are taken."""
        return Sampling(None, mask)

    def hold(self, rows: Rows, sampling: Sampling, reading: Reading | None, *, due: bool) -> Batch:
        """Hold the statistics, or a copy of few rows."""
        if not due or rows.z.shape[-2] == 0:
            return Batch(self.layer, sampling, None, due=due)
        if reading is None or _is_light(rows):
            return Batch(self.layer, sampling, self.layer.copied(rows), due=due)
        return Batch(self.layer, sampling, reading.statistics(self.layer, rows), due=due)

    def add(self, batch: Batch) -> None:
        """Count a batch, once."""
        content, batch.content = batch.content, None
        if content is not None:
            self._counted.append(content)

    def result(self, reading: Reading) -> Rows | Statistics | None:
        """Return the rows of a single small call, else the sum of all statistics."""
        if len(self._counted) == 1 and isinstance(self._counted[0], Rows) and _is_light(self._counted[0]):
            return self._counted[0]
        total: Statistics | None = None
        for each in self._counted:
            one = reading.statistics(self.layer, each) if isinstance(each, Rows) else each
            total = one if total is None else total + one
        return total

    def clear(self) -> None:
        """Forget what was counted; what is held counts when its gradients flow back."""
        self._counted.clear()

    @property
    def counted(self) -> bool:
        """Whether anything was counted since the last step."""
        return bool(self._counted)


class Reserved(Sampler):
    """An even sample of a limited number of rows, of all that the layer saw within the step.

    Args:
        layer: the layer.
        limit: about so many rows.
    """

    def __init__(self, layer: Layer, limit: int) -> None:
        super().__init__(layer)
        self._limit = limit
        self._reservoir: Reservoir | None = None
        self._waiting: weakref.WeakSet[Batch] = weakref.WeakSet()  # for gradients, if those ever flow back

    def sampling(self, mask: Tensor | None) -> Sampling:
        """Return a sample whose numbers go on from all samples of the step so far, held ones included."""
        seen = 0 if self._reservoir is None else self._reservoir.seen
        return Sampling(self._limit, mask, seen + sum(batch.sampling.count or 0 for batch in self._waiting))

    def hold(self, rows: Rows, sampling: Sampling, reading: Reading | None, *, due: bool) -> Batch:
        """Hold a copy of the rows that were taken."""
        batch = Batch(self.layer, sampling, self.layer.copied(rows) if due else None, due=due)
        if due:
            self._waiting.add(batch)
        return batch

    def add(self, batch: Batch) -> None:
        """Count a batch, once."""
        rows, batch.content = batch.content, None
        if not isinstance(rows, Rows):
            return
        self._waiting.discard(batch)
        if self._reservoir is None:
            self._reservoir = Reservoir(self._limit)
        start, count = batch.sampling.start, batch.sampling.count or 0
        share = min(1.0, self._limit / max(start + count, 1))
        self._reservoir.add(Held(rows, start, count, share))

    def result(self, reading: Reading) -> Rows | Statistics | None:
        """Return the rows that were sampled."""
        return None if self._reservoir is None else self._reservoir.rows()

    def clear(self) -> None:
        """Forget what was held and counted."""
        self._reservoir = None
        self._waiting.clear()

    @property
    def counted(self) -> bool:
        """Whether anything was counted since the last step."""
        return self._reservoir is not None


def _is_light(rows: Rows) -> bool:
    """Return whether so few samples take less memory than their statistics."""
    return not rows.x.is_sparse and rows.x.shape[-2] < rows.x.shape[-1]
