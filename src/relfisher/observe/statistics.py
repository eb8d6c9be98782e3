"""Collection of a layer's statistics in one of two forms: all rows as a stream, or an even sample of limited size.

The samples of a call count after its gradients have flowed back; until then they are held. A sample of limited size is
returned as rows. A stream is returned as statistics, unless it is a single call whose rows take less memory.
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
    """The ingredients of a layer's statistics.

    Attributes:
        structure: its structure.
        response: the response of its units.
        waits: whether the statistics can be computed only in the step, since they need the whole weight of a layer of
            which each process holds a part.
    """

    structure: Structure
    response: UnitResponse
    waits: bool = False

    def statistics(self, layer: Layer, rows: Rows) -> Statistics:
        """Return the statistics of samples of a layer."""
        with torch.no_grad(), torch.autocast(rows.x.device.type, enabled=False):
            return self.structure.batch_statistics(self._read(layer, rows))

    def average_in(self, layer: Layer, batch: Rows | Statistics, state: State, decay: float) -> bool:
        """Add samples or their statistics to a moving average; return whether they are finite."""
        if isinstance(batch, Statistics):
            return self.structure.ema_update(state, batch, decay)
        with torch.no_grad(), torch.autocast(batch.x.device.type, enabled=False):
            return self.structure.ema_update_from(state, self._read(layer, batch), decay)

    def _read(self, layer: Layer, rows: Rows) -> Samples:
        return Samples(*layer.cast(rows if self.structure.reads_sparse else layer.spelled_out(rows)), self.response)


class Batch:
    """The samples of one call of a layer, held until its gradients flow back.

    Attributes:
        layer: the layer that was called.
        sampling: the selection of samples.
        due: whether the samples are for the statistics; otherwise they only show that the layer ran.
        content: rows, their statistics once computed, or None.
    """

    def __init__(self, layer: Layer, sampling: Sampling, content: Rows | Statistics | None, *, due: bool) -> None:
        self.layer = layer
        self.sampling = sampling
        self.content = content
        self.due = due


class Sampler(ABC):
    """Collects the samples of one layer within a step.

    Args:
        layer: the layer.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    @abstractmethod
    def sampling(self, mask: Tensor | None) -> Sampling:
        """Return the selection of samples for the next call."""

    @abstractmethod
    def hold(self, rows: Rows, sampling: Sampling, reading: Reading | None, *, due: bool) -> Batch:
        """Hold the samples of a call until its gradients flow back.

        Args:
            rows: the rows of the call; they may share memory with it.
            sampling: the selection that produced them.
            reading: the structure and response, if they are known already.
            due: whether the samples are for the statistics.

        Returns:
            The batch.
        """

    @abstractmethod
    def add(self, batch: Batch) -> None:
        """Count a batch whose gradients have flowed back."""

    @abstractmethod
    def result(self, reading: Reading) -> Rows | Statistics | None:
        """Return the counted samples; None if there are none."""

    @abstractmethod
    def clear(self) -> None:
        """Discard held and counted samples."""

    @property
    @abstractmethod
    def counted(self) -> bool:
        """Whether anything was counted since the last step."""


class Streamed(Sampler):
    """Uses all rows: computes statistics at each call, unless the rows take less memory."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self._counted: list[Rows | Statistics] = []

    def sampling(self, mask: Tensor | None) -> Sampling:
        """Return a selection of all samples."""
        return Sampling(None, mask)

    def hold(self, rows: Rows, sampling: Sampling, reading: Reading | None, *, due: bool) -> Batch:
        """Hold the statistics, or a copy of the rows if there are few."""
        if not due or rows.z.shape[-2] == 0:
            return Batch(self.layer, sampling, None, due=due)
        if reading is None or reading.waits or _is_light(rows):
            return Batch(self.layer, sampling, self.layer.copied(rows), due=due)
        return Batch(self.layer, sampling, reading.statistics(self.layer, rows), due=due)

    def add(self, batch: Batch) -> None:
        """Count a batch, once."""
        content, batch.content = batch.content, None
        if content is not None:
            self._counted.append(content)

    def result(self, reading: Reading) -> Rows | Statistics | None:
        """Return the rows of a single small call, or else the sum of all statistics."""
        if len(self._counted) == 1 and isinstance(self._counted[0], Rows) and _is_light(self._counted[0]):
            return self._counted[0]
        total: Statistics | None = None
        for each in self._counted:
            one = reading.statistics(self.layer, each) if isinstance(each, Rows) else each
            total = one if total is None else total + one
        return total

    def clear(self) -> None:
        """Discard counted samples; held samples still count once their gradients flow back."""
        self._counted.clear()

    @property
    def counted(self) -> bool:
        """Whether anything was counted since the last step."""
        return bool(self._counted)


class Reserved(Sampler):
    """Keeps an even sample of limited size from all rows of the layer within the step.

    Args:
        layer: the layer.
        limit: the approximate number of rows.
    """

    def __init__(self, layer: Layer, limit: int) -> None:
        super().__init__(layer)
        self._limit = limit
        self._reservoir: Reservoir | None = None
        self._waiting: weakref.WeakSet[Batch] = weakref.WeakSet()  # batches whose gradients may still flow back

    def sampling(self, mask: Tensor | None) -> Sampling:
        """Return a selection whose numbering continues after all samples of the step so far, held ones included."""
        seen = 0 if self._reservoir is None else self._reservoir.seen
        return Sampling(self._limit, mask, seen + sum(batch.sampling.count or 0 for batch in self._waiting))

    def hold(self, rows: Rows, sampling: Sampling, reading: Reading | None, *, due: bool) -> Batch:
        """Hold a copy of the taken rows."""
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
        """Return the sampled rows."""
        return None if self._reservoir is None else self._reservoir.rows()

    def clear(self) -> None:
        """Discard held and counted samples."""
        self._reservoir = None
        self._waiting.clear()

    @property
    def counted(self) -> bool:
        """Whether anything was counted since the last step."""
        return self._reservoir is not None


def _is_light(rows: Rows) -> bool:
    """Return whether the rows take less memory than their statistics."""
    return not rows.x.is_sparse and rows.x.shape[-2] < rows.x.shape[-1]
