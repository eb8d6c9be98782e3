"""Common parts of all optimizers that observe a model: masks, and releasing the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

from relfisher.optim.curvature import Curvature

__all__ = ["Watching"]

Watched = TypeVar("Watched")


class Watching:
    """Observes a model through its `_curvature`."""

    _curvature: Curvature

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Exclude positions such as padding from the statistics of forward passes inside this context.

        Args:
            mask: True for positions that count. It applies to layers whose input has this leading shape, such as
                [batch, length] for inputs [batch, length, in], or [batch]. Convolutions apply it to images or output
                positions; recurrent layers and attention also accept [batch, length] if their input is
                [length, batch, in]. A warning names layers with positions that the mask does not fit.

        Yields:
            Nothing.
        """
        with self._curvature.observer.masked(mask):
            yield

    def close(self) -> None:
        """Remove the hooks from the model; the statistics no longer change."""
        self._curvature.observer.close()

    def __enter__(self: Watched) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
