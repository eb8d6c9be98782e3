"""The operations that a step dispatches, which are launches on a GPU, and the waits of the host for the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counted", "fewest"]


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    """Counts dispatched operations, and those among them with which the host reads a number of the device."""

    operations = reads = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Count an operation, and run it."""
        self.operations += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def fewest(optimizer: torch.optim.Optimizer, run: Callable[[], object], iterations: int) -> tuple[int, int]:
    """Return the operations and the reads of the step that has the fewest operations, without infrequent work.

    Args:
        optimizer: the optimizer.
        run: performs an iteration with it.
        iterations: the number of iterations.
    """
    counts: list[tuple[int, int]] = []
    opened: list[Any] = []

    def before(*_: object) -> None:
        opened.append(Counted())  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        opened[-1].__enter__()

    def after(*_: object) -> None:
        mode = opened.pop()
        mode.__exit__(None, None, None)
        if not opened:  # torch calls the hooks of a step of a step's parts, too
            counts.append((mode.operations, mode.reads))

    handles = [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]
    for _ in range(iterations):
        run()
    for handle in handles:
        handle.remove()
    return min(counts)
