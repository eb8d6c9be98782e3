"""What happens to layers when their metrics are updated: batches that are dropped, and refreshes that fail."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from relfisher.layers import Layer
from relfisher.observe import Observer
from relfisher.optim.health import Health

__all__ = ["DROPPED", "FAILED", "Events"]

#: What happened to a layer is the sum of these: its batch was dropped, its refresh failed.
DROPPED, FAILED = 1, 2


class Events:
    """What happened to layers in the last update.

    Args:
        health: counts it.
        observer: is told which layers have statistics now.

    Attributes:
        own: what happened to the layers that this process keeps.
        possible: whether anything may have happened to the layers of any process, which all of them know.
    """

    def __init__(self, health: Health, observer: Observer) -> None:
        self.own: dict[Layer, int] = {}
        self.possible = False
        self._health = health
        self._observer = observer
        self._iteration = 0
        self._sampled: frozenset[Layer] = frozenset()

    def begin(self, iteration: int, sampled: Collection[Layer]) -> None:
        """Begin an update with the samples of some layers."""
        self.own, self.possible, self._iteration, self._sampled = {}, False, iteration, frozenset(sampled)

    def note(self, layer: Layer, event: int) -> None:
        """Note an event."""
        self.own[layer] = self.own.get(layer, 0) | event

    def count(self, events: Mapping[Layer, int]) -> None:
        """Count what happened to the layers of all processes."""
        dropped = {layer for layer, event in events.items() if event & DROPPED}
        self._observer.uninitialized -= self._sampled - dropped
        for layer, event in events.items():
            if layer in dropped:
                self._health.dropped(self._iteration, layer.name)
            if event & FAILED:
                self._health.failed(self._iteration, layer.name)
