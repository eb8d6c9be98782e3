"""The schedule of metric updates and inverse refreshes."""

from __future__ import annotations

from dataclasses import dataclass

from relfisher.validation import check_integer

__all__ = ["WARMUP", "Schedule"]

#: The iterations of additional refreshes: the metric changes most while the first features form and the average has
#: few batches.
WARMUP = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)


@dataclass(frozen=True)
class Schedule:
    """The iterations, counted from 0, at which updates and refreshes are due.

    Args:
        stats_interval: the number of iterations between updates of the metric.
        refresh_interval: the number of iterations between refreshes of a layer's inverse.
        warmup_refreshes: additional iterations at which the metric is updated and all inverses are refreshed, while the
            average has few batches.
        staggered: True spreads the turns of layers over the intervals, so that no single step is slow.

    Raises:
        ValueError: if an interval is not a whole number >= 1, or a warm-up iteration is not a whole number >= 0.
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

    def statistics_due(self, iteration: int, place: int = 0, turns: int = 1) -> bool:
        """Return whether the forward pass of this iteration updates the metric of a layer; see `refresh_due`."""
        phase = self._phase(place, turns, self.stats_interval)
        return iteration % self.stats_interval == phase or iteration in self.warmup_refreshes

    def refresh_due(self, iteration: int, place: int = 0, turns: int = 1) -> bool:
        """Return whether the inverse of a layer is refreshed before this iteration's step.

        Args:
            iteration: the iteration, counted from 0.
            place: the index of the layer's turn, counted from 0.
            turns: the number of turns.
        """
        if iteration in self.warmup_refreshes:
            return True
        phase = self._phase(place, turns, self.refresh_interval)
        if self.staggered and self.stats_interval > 1:
            phase = (phase + 1) % self.refresh_interval  # avoid the steps that collect the layer's statistics
        return iteration >= phase and (iteration - phase) % self.refresh_interval == 0

    def _phase(self, place: int, turns: int, interval: int) -> int:
        """Return the offset of a turn in an interval over which all turns are spread."""
        return place * interval // turns if self.staggered else 0
