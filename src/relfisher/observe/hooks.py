"""Hooks that stay with their module: copies and pickles of the model are not observed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch._compile import _disable_dynamo

__all__ = ["Hook"]


class Hook:
    """A hook that stays with its module: copies and pickles of the model are not observed.

    Args:
        call: the function that is called.
        own_thread: True ignores calls of the module in other threads than the one that makes the hook.
    """

    def __init__(self, call: Callable[..., None], *, own_thread: bool = False) -> None:
        self._call = call
        self._thread = threading.get_ident() if own_thread else None

    @_disable_dynamo  # the data that a hook collects are not part of a compiled graph
    def __call__(self, *args: Any) -> None:
        """Call the wrapped function, if the thread is the one that is observed."""
        if self._thread in (None, threading.get_ident()):
            self._call(*args)

    def __deepcopy__(self, memo: object) -> _NoHook:
        return _NoHook()

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """The replacement for a copied hook."""

    def __call__(self, *args: object) -> None:
        """Do nothing."""
