"""Samples of layers: select the rows of a call that count, and sample evenly from the rows of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Held", "Reservoir", "Rows", "Sampling"]

#: Its multiples modulo 1 are evenly distributed.
_GOLDEN = (5**0.5 - 1) / 2


class Rows(NamedTuple):
    """Samples of a layer: augmented inputs x [*g, n, d] and pre-activations z [*g, n, out]."""

    x: Tensor
    z: Tensor


@dataclass
class Sampling:
    """Select the samples of a call that go into its statistics.

    The samples of a layer within one step are numbered, and sample i has the priority i * golden ratio modulo 1. Of N
    samples, those with a priority below `limit` / N are taken: about `limit` of them, evenly spread, and a subset of
    those that would be taken if N were smaller.

    Args:
        limit: the approximate maximum number of samples per step; None for all.
        mask: True for samples that count. It applies to all tensors whose shape begins with the mask's shape, such as
            [batch, length] for [batch, length, in].
        start: the number of samples of the layer before this call.

    Attributes:
        count: the number of samples of the call, taken or not; None if there is no limit.
        masked: whether the mask fitted any samples.
        unmasked: the shape of samples that the mask was meant for but did not fit.
    """

    limit: int | None = None
    mask: Tensor | None = None
    start: int = 0
    count: int | None = field(default=None, init=False)
    masked: bool = field(default=False, init=False)
    unmasked: tuple[int, ...] | None = field(default=None, init=False)

    def rows(self, *tensors: Tensor, trailing: int = 1) -> list[Tensor]:
        """Return tensors [*, k...] of the same leading shape as rows [n, k...], only those that count and are taken.

        Args:
            tensors: one or more tensors.
            trailing: the number of trailing axes that belong to one sample.

        Returns:
            One tensor per argument, in its own dtype.
        """
        return self.taken(*self.real(*tensors, trailing=trailing))

    def taken(self, *flat: Tensor) -> list[Tensor]:
        """Select the taken rows from tensors [n, k...] of equally many rows."""
        chosen = self.chosen(flat[0].shape[0], flat[0].device)
        return list(flat) if chosen is None else [tensor[chosen] for tensor in flat]

    def real(self, *tensors: Tensor, trailing: int = 1) -> list[Tensor]:
        """Return tensors [*, k...] of the same leading shape as rows [n, k...], only those that count."""
        keep = self.kept(tensors[0].shape[: tensors[0].ndim - trailing])
        flat = [tensor.reshape(-1, *tensor.shape[tensor.ndim - trailing :]) for tensor in tensors]
        return flat if keep is None else [tensor[keep] for tensor in flat]

    def turn(self, length: int, batch: int) -> None:
        """Transpose a mask [length, batch] to [batch, length]; a mask that could be either is taken as the latter."""
        if self.mask is not None and length != batch and tuple(self.mask.shape) == (length, batch):
            self.mask = self.mask.T

    def kept(self, leading: Sequence[int]) -> Tensor | None:
        """Return a flag [n] for each sample of a leading shape: whether it counts. Return None if no mask applies."""
        mask = self.mask
        if mask is None:
            return None
        if tuple(mask.shape) != tuple(leading[: mask.ndim]):
            if _is_for(mask, leading):
                self.unmasked = tuple(leading)
            return None
        self.masked = True
        return mask.reshape(*mask.shape, *(1 for _ in leading[mask.ndim :])).expand(*leading).reshape(-1)

    def chosen(self, samples: int, device: torch.device) -> Tensor | None:
        """Return the indices of the taken samples among those that count; None for all of them."""
        if self.limit is None:
            return None
        self.count = samples
        seen = self.start + samples
        return None if seen <= self.limit else _places(self.start, samples, 1.0, self.limit / seen, device)


@dataclass
class Held:
    """Rows of one call that are held until the end of the step.

    Args:
        rows: the taken rows.
        start: the number of samples of the layer before the call.
        count: the number of samples of the call.
        share: the priority below which rows were taken.
    """

    rows: Rows
    start: int
    count: int
    share: float

    def thin(self, share: float) -> None:
        """Drop the rows whose priority is not below a smaller threshold."""
        if share < self.share:
            places = _places(self.start, self.count, self.share, share, self.rows.x.device)
            self.rows = Rows(self.rows.x.index_select(-2, places), self.rows.z.index_select(-2, places))
            self.share = share


class Reservoir:
    """An even sample of the rows of one layer, from the calls of this step whose gradients have flowed back.

    Args:
        limit: the approximate size of the sample.

    Attributes:
        seen: the number of samples of those calls.
    """

    def __init__(self, limit: int) -> None:
        self.seen = 0
        self._limit = limit
        self._held: list[Held] = []
        self._share = 1.0

    def add(self, held: Held) -> None:
        """Add the rows that were held for a call."""
        self.seen += held.count
        self._held.append(held)
        # Calls that never flowed back make sampling sparser; the rows of one sample must all have the same weight.
        self._share = min(self._share, held.share, self._limit / max(self.seen, 1))
        if len(self._held) > 1 and sum(each.rows.z.shape[-2] for each in self._held) > 2 * self._limit:
            self._thin()

    def rows(self) -> Rows | None:
        """Return the sample, or None if it is empty."""
        if self._share < 1:
            self._thin()
        held = [each.rows for each in self._held if each.rows.z.shape[-2]]
        if len(held) < 2:
            return held[0] if held else None
        return Rows(torch.cat([rows.x for rows in held], dim=-2), torch.cat([rows.z for rows in held], dim=-2))

    def _thin(self) -> None:
        for each in self._held:
            each.thin(self._share)


def _is_for(mask: Tensor, leading: Sequence[int]) -> bool:
    """Return whether samples of this leading shape look as if a mask that does not fit was meant for them.

    Samples with fewer axes were pooled, unless there are equally many; an axis of size 1 is shared by all sequences.
    """
    if len(leading) < mask.ndim:
        return math.prod(leading) == mask.numel()
    return any(size not in (1, wanted) for size, wanted in zip(leading, mask.shape, strict=False))


@lru_cache(maxsize=1024)
def _places(start: int, count: int, before: float, share: float, device: torch.device) -> Tensor:
    """Return the places of rows with a priority below `share`, among those with a priority below `before`."""
    numbers = torch.arange(start, start + count, dtype=torch.float64, device="cpu")
    priorities = (numbers * _GOLDEN).frac()
    return (priorities[priorities < before] < share).nonzero().squeeze(1).to(device)
