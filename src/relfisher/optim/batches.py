"""Layers of equal shape are one batch, so that an operation of a step runs once for all of them.

Their gradients are copied into one tensor [L, *g, out, d]. Their factors, their momentum and what the step rule keeps
are stacked [L, ...] once; what the optimizer's state holds of a layer is a view of its part from then on. Where a state
is replaced, by loading, copying or another device, the tensors are stacked anew.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import cached_property
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.optim.record import Record, is_computed
from relfisher.shapes import Float
from relfisher.structures import State

__all__ = ["Batch", "Batches", "Facts", "Stack", "how_many"]

# The tensor of the gradients is kept from step to step if it has up to as many numbers.
_KEPT = 1 << 18

Moving = Sequence[Tensor | None]
View = Callable[[Tensor], Tensor]
Facts = tuple[Any, ...]


class Stack:
    """Tensors of several states in one, [L, ...], of which those in the states are views from then on."""

    def __init__(self) -> None:
        self._whole: Tensor | None = None
        self._views: list[Tensor] = []

    def of(self, states: Sequence[State], key: str) -> Tensor:
        """Return the tensors of this key, stacked; they are stacked anew if one of them was replaced."""
        own = [state[key] for state in states]
        if self._whole is None or not all(map(is_, own, self._views)):
            if len(own) == 1:
                self._whole, self._views = own[0].unsqueeze(0), own
            else:
                self._whole = torch.stack(own)
                self._views = [self._whole[place] for place in range(len(own))]
            for state, view in zip(states, self._views, strict=True):
                state[key] = view
        return self._whole


class Batch:
    """Layers whose steps are computed together.

    Args:
        records: of layers of equal shape, dtype and device. Several layers must not be computed from other parameters.
        keys: the keys of the tensors that are stacked.

    Attributes:
        layers: the layers.
        is_computed: whether the layer is computed from other parameters.
    """

    def __init__(self, records: Sequence[Record], keys: Sequence[str]) -> None:
        self.records = tuple(records)
        self.layers = tuple(record.layer for record in records)
        self.is_computed = is_computed(self.layers[0])
        self._stacks = {key: Stack() for key in keys}
        self._kept: _Matrix | None = None

    @property
    def gathers(self) -> bool:
        """Whether the gradient is computed from parameters that processes must make whole together."""
        return self.is_computed and self.records[0].is_in_parts

    def state(self, states: Sequence[State]) -> State:
        """Return the tensors of the layers' states, stacked [L, ...]; those of a state become views of them."""
        return {key: stack.of(states, key) for key, stack in self._stacks.items()}

    def gradient(
        self, moving: Sequence[Moving], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "l *g out d"], list[Tensor], list[Tensor]]:
        """Return a tensor for the gradients, with 0 for parts without any, its parts, and what belongs into them.

        It is the same tensor in each step, if it is small.

        Args:
            moving: the parameters of each layer; None for those that do not move.
            dtype: the dtype of the tensor.
        """
        if self.is_computed:
            found = self.records[0].gradient()
            assert found is not None  # something moves
            return found.to(dtype).unsqueeze(0), [], []
        matrix = self._matrix(dtype)
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        given = [record.gradients(own) for record, own in zip(self.records, moving, strict=True)]
        for columns, views, gradients in zip(matrix.columns, self._views, zip(*given, strict=True), strict=True):
            if gradients[0] is None:
                torch._foreach_zero_(list(columns))
            else:
                targets += columns
                sources += [view(gradient) for view, gradient in zip(views, gradients, strict=True)]
        return matrix.whole, targets, sources

    def room(self, dtype: torch.dtype) -> Tensor | None:
        """Return the tensor of the gradients, if it is kept, for the changes that follow from them."""
        return None if self._kept is None or self._kept.whole.dtype != dtype else self._kept.whole

    def changes(self, moving: Sequence[Moving], step: Float[Tensor, "l *g out d"]) -> tuple[list[Tensor], list[Tensor]]:
        """Return what this process holds of the parameters, or views of it, and its changes.

        Args:
            moving: the parameters of each layer; None for those that do not move.
            step: the changes of the layers' matrices.
        """
        if self.is_computed or self.records[0].is_in_parts:
            pairs = [pair for record, own in zip(self.records, step, strict=True) for pair in record.changes(own)]
            return [target for target, _ in pairs], [change for _, change in pairs]
        kept = self._kept
        parts = kept.columns if kept is not None and kept.whole is step else self._columns(step)
        targets: list[Tensor] = []
        changes: list[Tensor] = []
        for columns, views, parameters in zip(parts, self._views, zip(*moving, strict=True), strict=True):
            if parameters[0] is not None:
                targets += [view(parameter) for view, parameter in zip(views, parameters, strict=True)]
                changes += columns
        return targets, changes

    def _matrix(self, dtype: torch.dtype) -> _Matrix:
        """Return a matrix [L, *g, out, d] without values, and its columns."""
        if self._kept is not None and self._kept.whole.dtype == dtype:
            return self._kept
        shape = (len(self.layers), *self.layers[0].shape)
        whole = torch.empty(shape, dtype=dtype, device=self.layers[0].weight.device)
        made = _Matrix(whole, self._columns(whole))
        self._kept = made if whole.numel() <= _KEPT else None
        return made

    def _columns(self, matrix: Float[Tensor, "l *g out d"]) -> list[Sequence[Tensor]]:
        """Return the columns of each part, one tensor per layer, in the shapes of their views."""
        parts = zip(matrix.split_with_sizes(self.layers[0].widths, dim=-1), self._shapes, strict=True)
        return [columns.view(len(self.layers), *shape).unbind(0) for columns, shape in parts]

    @cached_property
    def _seen(self) -> list[list[tuple[View, tuple[int, ...]]]]:
        return [_views(layer) for layer in self.layers]

    @cached_property
    def _views(self) -> list[list[View]]:
        """The views of the layers, for each part."""
        return [[view for view, _ in own] for own in zip(*self._seen, strict=True)]

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        """The shape of each part's view."""
        return [shape for _, shape in self._seen[0]]


class _Matrix(NamedTuple):
    """A matrix for each layer, and the columns of each part, one tensor per layer."""

    whole: Tensor
    columns: Sequence[Sequence[Tensor]]


class Batches:
    """The batches of an optimizer's layers, which last as long as what they are made of."""

    def __init__(self) -> None:
        self._seen: list[tuple[Record, Facts]] = []
        self._families: list[Batch] = []
        self._alone: dict[Record, Batch] = {}

    def moving(
        self,
        seen: list[tuple[Record, Facts]],
        kind: Callable[[Record, Facts], tuple[Hashable, Sequence[str]]],
    ) -> list[tuple[Batch, list[Moving]]]:
        """Return the batches that move, with the parameters of each layer, and None for those that do not move.

        Layers whose parameters do not all move alike are batches of their own.

        Args:
            seen: each layer with what its kind depends on; as long as nothing of it changes, batches are the same.
            kind: returns what is equal for layers of one batch, and the keys of the tensors that are stacked.
        """
        if seen != self._seen:
            self._seen = seen
            self._group({record: kind(record, facts) for record, facts in seen})
        found: list[tuple[Batch, list[Moving]]] = []
        for family in self._families:
            moving: list[Moving] = [record.moving() for record in family.records]
            patterns = {tuple([parameter is None for parameter in each]) for each in moving}
            if len(patterns) == 1:
                found += [] if all(*patterns) else [(family, moving)]
            else:
                pairs = zip(family.records, moving, strict=True)
                found += [(self._alone[record], [own]) for record, own in pairs if any(p is not None for p in own)]
        return found

    def _group(self, kinds: Mapping[Record, tuple[Hashable, Sequence[str]]]) -> None:
        """Form the batches."""
        by_kind: dict[Hashable, list[Record]] = defaultdict(list)
        for record, (kind, _) in kinds.items():
            layer = record.layer
            if is_computed(layer):
                by_kind[record].append(record)
            else:
                shapes = tuple(shape for _, shape in _views(layer))
                by_kind[kind, layer.shape, shapes, layer.dtype, layer.weight.device].append(record)
        self._families = []
        for records in by_kind.values():
            layer = records[0].layer
            most = how_many(math.prod(layer.shape), layer.weight.device)
            parts = [records[start : start + most] for start in range(0, len(records), most)]
            self._families += [Batch(part, kinds[part[0]][1]) for part in parts]
        self._alone = {record: Batch([record], keys) for record, (_, keys) in kinds.items()}


def how_many(numbers: int, device: torch.device) -> int:
    """Return how many layers of so many numbers are computed together.

    On a CPU, more than four million numbers would take memory and save nothing. Elsewhere each operation is a launch,
    which is worth the memory of 16 times as many.

    Args:
        numbers: the numbers of a layer that one operation is for.
        device: where they are.
    """
    return max(1, (1 << (22 if device.type == "cpu" else 26)) // numbers)


def _views(layer: Layer) -> list[tuple[View, tuple[int, ...]]]:
    """Return the view of each part's parameter that is copied, and its shape: of the parameter itself, if possible."""
    found: list[tuple[View, tuple[int, ...]]] = []
    columns = torch.empty(layer.shape, device="meta").split_with_sizes(layer.widths, dim=-1)
    for part, own, seen, parameter in zip(layer.parts, columns, layer.views, layer.parameters, strict=True):
        view = part.view(torch.empty(parameter.shape, device="meta"))
        same = view.is_contiguous() and view.numel() == parameter.numel() and _has_view(own, parameter.shape)
        found.append((_whole, tuple(parameter.shape)) if same else (part.view, tuple(seen)))
    return found


def _has_view(columns: Tensor, shape: tuple[int, ...]) -> bool:
    """Return whether columns of a matrix can be seen in a shape without a copy."""
    try:
        columns.view(shape)
    except RuntimeError:  # a dimension would span several rows
        return False
    return True


def _whole(tensor: Tensor) -> Tensor:
    return tensor
