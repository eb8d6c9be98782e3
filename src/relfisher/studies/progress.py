"""The display of progress: live in a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from relfisher.studies.cells import Cell

__all__ = ["Display", "DownloadDisplay"]


class Display:
    """A bar for all runs and one for each active run, with its latest cost; a context manager."""

    def __init__(self, console: Console, planned: int) -> None:
        self._console = console
        self._planned = planned
        self._finished = 0
        self._tasks: dict[Cell, TaskID] = {}
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

    def progressed(self, cell: Cell, fraction: float, cost: float) -> None:
        """Move the cell's bar; the first report adds it."""
        if cell not in self._tasks:
            self._tasks[cell] = self._progress.add_task(str(cell), total=1.0, state="")
        state = "" if math.isnan(cost) else f"cost {cost:.3g}"
        self._progress.update(self._tasks[cell], completed=fraction, state=state)

    def finished(self, cell: Cell, ending: str) -> None:
        """Remove the cell's bar and print how the cell ended."""
        self._finished += 1
        self._progress.update(self._all, completed=self._finished, state=f"{self._finished}/{self._planned}")
        if cell in self._tasks:
            self._progress.remove_task(self._tasks.pop(cell))
        self._console.print(f"[{self._finished}/{self._planned}] {cell}: {ending}", markup=False, highlight=False)


class DownloadDisplay:
    """A progress bar for downloads."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console, transient=False
        )
        self._task = self._progress.add_task("downloading", total=None)
        self.total = 0

    def update(self, count: int) -> None:
        """Count additional downloaded bytes."""
        self._progress.start()
        self._progress.update(self._task, total=self.total, advance=count)

    def reset(self) -> None:
        """Restart from zero."""
        self._progress.reset(self._task)

    def close(self) -> None:
        """Close the display."""
        self._progress.stop()
