"""Turns: which layers have statistics, or are refreshed, in the same step, so that most steps have neither.

Turns follow from what is known before the first pass, so that all processes and a resumed run have the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from relfisher.layers import Layer
from relfisher.shards import class_of
from relfisher.structures import Structure

__all__ = ["Turns"]

T = TypeVar("T")

# A turn has at most this part of all layers: so many small operations take about as long as a plain step.
_PART = 4

# A forward and a backward pass take as many operations per parameter and sample.
_PASS = 6

# A refresh may take as long as a pass of as many samples.
_SAMPLES = 256


class Turns:
    """The turns of a model's layers.

    Layers of a kind and shape share a turn, and kinds of few layers share one, too. A turn has at most a quarter of all
    layers, and takes no more operations than a pass, unless it is a single layer.

    Attributes:
        statistics: the modules in turns; the layers of a module share computations.
        refreshes: the layers in turns.
    """

    def __init__(self) -> None:
        self.statistics: list[list[nn.Module]] = []
        self.refreshes: list[list[Layer]] = []
        self._kinds: dict[Layer, Hashable] = {}
        self._costs: dict[Layer, tuple[int, int, int]] = {}

    def add(self, structures: Mapping[Layer, Structure]) -> None:
        """Add layers, with the structures that they have as far as it is known."""
        for layer, structure in structures.items():
            cost = structure.cost(layer.shape)
            self._kinds[layer] = type(layer), layer.suffix, class_of(layer.module), layer.shape
            self._costs[layer] = cost.sample, cost.refresh, math.prod(layer.shape)
        of_pass = _PASS * sum(parameters for *_, parameters in self._costs.values())
        modules: dict[nn.Module, list[Layer]] = defaultdict(list)
        for layer in self._costs:
            modules[layer.module].append(layer)
        self.statistics = _turns(
            modules,
            lambda module: tuple(self._kinds[layer] for layer in modules[module]),
            lambda module: len(modules[module]),
            lambda module: sum(self._costs[layer][0] for layer in modules[module]),
            of_pass,
        )
        self.refreshes = _turns(
            self._costs, self._kinds.__getitem__, lambda _: 1, lambda layer: self._costs[layer][1], _SAMPLES * of_pass
        )


def _turns(
    items: Collection[T],
    kind: Callable[[T], Hashable],
    count: Callable[[T], int],
    cost: Callable[[T], int],
    limit: int,
) -> list[list[T]]:
    """Return items in turns.

    Args:
        items: the items.
        kind: returns what is equal for items that should share a turn.
        count: returns the number of layers of an item.
        cost: returns the operations that it takes.
        limit: the operations that a turn may take, unless a single item takes more.
    """
    most = sum(map(count, items)) // _PART
    longest = max([limit, *map(cost, items)])

    def fits(turn: Iterable[T], more: Sequence[T]) -> bool:
        joint = [*turn, *more]
        return sum(map(count, joint)) <= most and sum(map(cost, joint)) <= longest

    kinds: dict[Hashable, list[T]] = defaultdict(list)
    for item in items:
        kinds[kind(item)].append(item)
    found: list[list[T]] = []
    for alike in kinds.values():
        if not (found and fits(found[-1], alike)):
            found.append([])
        for item in alike:
            if found[-1] and not fits(found[-1], [item]):
                found.append([])
            found[-1].append(item)
    return found
