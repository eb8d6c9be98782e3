"""Hooks that stay with their module: a copy of the model, or a pickled one, is not watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._compile import _disable_dynamo

__all__ = ["Hook"]


class Hook:
    """A hook that stays with its module: a copy of the model, or a pickled one, is not watched."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    @_disable_dynamo  # what a hook gathers is no part of a compiled graph
    def __call__(self, *args: Any) -> None:
        """Call what the hook is for."""
        self._call(*args)

    def __deepcopy__(self, memo: object) -> _NoHook:
        return _NoHook()

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class _NoHook:
    """What a copied hook becomes."""

    def __call__(self, *args: object) -> None:
        """Do nothing."""
