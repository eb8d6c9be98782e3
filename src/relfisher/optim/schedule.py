"""When the metric is updated, and when its inverse is refreshed."""

from __future__ import annotations

from dataclasses import dataclass

from relfisher.validation import check_integer

__all__ = ["WARMUP", "Schedule"]

#: The iterations of additional refreshes: the metric changes most while the first features form and the average is
#: young.
WARMUP = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Schedule:
    """Iterations, counted from 0, at which something is due.

    Args:
        stats_interval: from one update of the metric to the next.
        refresh_interval: from one refresh of a layer's inverse to the next.
        warmup_refreshes: at which the metric is updated and all inverses refreshed besides, while the average is
            young.
        staggered: True spreads the layers' updates and refreshes over the intervals, so that no step is slow.

    Raises:
        ValueError: if an interval is not a whole number of at least 1, or an iteration one of at least 0.
    """

    stats_interval: int
    refresh_interval: int
    warmup_refreshes: tuple[int, ...]
    staggered: bool = True

    def __post_init__(self) -> None:
        for name in ("stats_interval", "refresh_interval"):
            check_integer(name, getattr(self, name))
        for iteration in self.warmup_refreshes:
            check_integer("warmup_refreshes", iteration, 0)

    def statistics_due(self, iteration: int, place: int = 0, layers: int = 1) -> bool:
        """Return whether the forward pass of this iteration updates the metric of a layer; see `refresh_due`."""
        phase = self._phase(place, layers, self.stats_interval)
        return iteration % self.stats_interval == phase or iteration in self.warmup_refreshes

    def refresh_due(self, iteration: int, place: int = 0, layers: int = 1) -> bool:
        """Return whether the inverse of a layer is refreshed before this iteration's step.

        Args:
            iteration: counted from 0.
            place: of the layer, counted from 0.
            layers: how many there are.
        """
        if iteration in self.warmup_refreshes:
            return True
        phase = self._phase(place, layers, self.refresh_interval)
        if self.staggered and self.stats_interval > 1:
            phase = (phase + 1) % self.refresh_interval  # in no step that has the layer's statistics to gather
        return iteration >= phase and (iteration - phase) % self.refresh_interval == 0

    def _phase(self, place: int, layers: int, interval: int) -> int:
        """Return the place of a layer in an interval over which all are spread."""
        return place * interval // layers if self.staggered else 0
