"""Hooks that stay with their module: copies and pickles of the model are not observed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch._compile import _disable_dynamo

__all__ = ["Hook", "unobserved"]

_HERE = threading.local()


@contextmanager
def unobserved() -> Iterator[None]:
    """Run a model for its own sake: only hooks that were made for this thread see the passes of this thread.

    Yields:
        Nothing.
    """
    before = getattr(_HERE, "unobserved", False)
    _HERE.unobserved = True
    try:
        yield
    finally:
        _HERE.unobserved = before


class Hook:
    """A hook that stays with its module: copies and pickles of the model are not observed.

    Args:
        call: the function that is called.
        own_thread: True ignores calls of the module in other threads than the one that makes the hook; False ignores
            calls inside `unobserved`.
    """

    def __init__(self, call: Callable[..., None], *, own_thread: bool = False) -> None:
        self._call = call
        self._thread = threading.get_ident() if own_thread else None

    @_disable_dynamo  # the data that a hook collects are not part of a compiled graph
    def __call__(self, *args: Any) -> None:
        """Call the wrapped function, if the thread is the one that is observed."""
        if self._thread == threading.get_ident() or (self._thread is None and not getattr(_HERE, "unobserved", False)):
            self._call(*args)

    def __deepcopy__(self, memo: object) -> _NoHook:
        return _NoHook()

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """The replacement for a copied hook."""

    def __call__(self, *args: object) -> None:
        """Do nothing."""
