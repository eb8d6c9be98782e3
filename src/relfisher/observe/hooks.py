"""Hooks that stay with their module: copies and pickles of the model are not observed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._compile import _disable_dynamo

__all__ = ["Hook"]


class Hook:
    """A hook that stays with its module: copies and pickles of the model are not observed."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    @_disable_dynamo  # the data that a hook collects are not part of a compiled graph
    def __call__(self, *args: Any) -> None:
        """Call the wrapped function."""
        self._call(*args)

    def __deepcopy__(self, memo: object) -> _NoHook:
        return _NoHook()

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """The replacement for a copied hook."""

    def __call__(self, *args: object) -> None:
        """Do nothing."""
