"""What every optimizer that watches a model does alike: masks, and letting the model go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

from relfisher.optim.curvature import Curvature

__all__ = ["Watching"]

Watched = TypeVar("Watched")


class Watching:
    """Watches a model through its `_curvature`."""

    _curvature: Curvature

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Leave positions out of the statistics, such as padding, in forward passes inside this context.

        Args:
            mask: True for what counts. It applies to layers whose input has this leading shape, such as
                [batch, length] if inputs are [batch, length, in], or [batch]. Convolutions take it for images or
                output positions; recurrent layers and attention take [batch, length] also if their input is
                [length, batch, in]. A layer with positions that the mask does not fit is named in a warning.

        Yields:
            Nothing.
        """
        with self._curvature.observer.masked(mask):
            yield

    def close(self) -> None:
        """Take the hooks off the model; the statistics stay as they are from then on."""
        self._curvature.observer.close()

    def __enter__(self: Watched) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        name = type(self).__name__
        raise TypeError(
            f"{name} is tied to its model by hooks and cannot be pickled: save its state_dict(), make a new {name} for "
            "the model and load the state there"
        )
