"""What a person sees while the runs go on: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from relfisher.studies.runs import Record, Run
from relfisher.studies.tables import TAUS, Row

__all__ = ["RESUMED", "Display", "DownloadDisplay", "summary"]

RESUMED = "already finished"


class Display:
    """One bar for all runs and one for each that is going on, with its latest cost; a context manager."""

    def __init__(self, console: Console, planned: int) -> None:
        self._console = console
        self._planned = planned
        self._finished = 0
        self._tasks: dict[Hashable, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description:<34}"),
            BarColumn(),
            TextColumn("{task.fields[state]:>16}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._all = self._progress.add_task("all runs", total=planned, state=f"0/{planned}")

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def started(self, run: Hashable) -> None:
        """Adds the run's bar."""
        self._tasks[run] = self._progress.add_task(str(run), total=1.0, state="")

    def progressed(self, run: Hashable, fraction: float, cost: float) -> None:
        """Moves the run's bar."""
        self._progress.update(self._tasks[run], completed=fraction, state=f"cost {cost:.3g}")

    def finished(self, run: Run, record: Record, *, resumed: bool) -> None:
        """Removes the run's bar and says how it ended."""
        if resumed:
            how = RESUMED
        elif record.diverged:
            how = f"diverged at iteration {len(record.cost)}"
        else:
            how = f"cost {record.cost[-100:].mean():.3g} in {record.seconds[-1]:.1f} s"
        self.ended(run, how)

    def ended(self, run: Hashable, how: str) -> None:
        """Removes a run's bar and prints how it ended."""
        self._finished += 1
        self._progress.update(self._all, completed=self._finished, state=f"{self._finished}/{self._planned}")
        if run in self._tasks:
            self._progress.remove_task(self._tasks.pop(run))
        self._console.print(f"[{self._finished}/{self._planned}] {run}: {how}", markup=False, highlight=False)


class DownloadDisplay:
    """A progress bar with the methods that pooch calls."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console, transient=False
        )
        self._task = self._progress.add_task("downloading", total=None)
        self.total = 0

    def update(self, count: int) -> None:
        """Counts further bytes as downloaded."""
        self._progress.start()
        self._progress.update(self._task, total=self.total, advance=count)

    def reset(self) -> None:
        """Starts again from nothing."""
        self._progress.reset(self._task)

    def close(self) -> None:
        """Ends the display."""
        self._progress.stop()


def summary(table: Sequence[Row]) -> Table:
    """The table as a person at the terminal sees it.

    Args:
        table: The rows.

    Returns:
        A table whose lowest cost stands out.
    """
    # Without lines it fits into 80 characters; where it does not, names go on below.
    shown = Table(Column("method", overflow="fold"), title="Training cost", box=None, pad_edge=False)
    for name in ("lr", "last 10%", "all images", "validation", "s/epoch"):
        shown.add_column(name, justify="right")
    costs = [row.final_cost for row in table if row.final_cost is not None]
    for row in table:
        if row.learning_rate is None or row.final_cost is None:
            shown.add_row(row.method, "all candidates diverged", style="red")
            continue
        mean, std = row.sharp_ratios[TAUS.index(0.1)]
        shown.add_row(
            row.method,
            f"{row.learning_rate:g}",
            f"{mean:.2g} ± {std:.1g}",
            f"{row.final_cost:.3g}",
            f"{row.best_validation:.2%}",
            f"{row.seconds_per_epoch:.2f}",
            style="bold green" if row.final_cost == min(costs) else "",
        )
    return shown
