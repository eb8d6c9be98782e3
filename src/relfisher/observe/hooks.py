"""Hooks that stay with their module: copies and pickles of the model are not observed."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch._C._dynamo import eval_frame
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling

__all__ = ["Hook", "OutsideHook", "apart", "callers", "inner_hook", "is_compiled", "unobserved"]

Given = ParamSpec("Given")
T = TypeVar("T")

_HERE = threading.local()

# What dynamo does with frames, None for nothing; anything else where torch does not say.
_running: Callable[[], object] = getattr(eval_frame, "get_eval_frame_callback", lambda: False)


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


def callers() -> Iterator[FrameType]:
    """Yield the frames that are being run, from the innermost on."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def apart(function: Callable[Given, T]) -> Callable[Given, T]:
    """Keep dynamo away from a function, which takes longer than most calls, and is only done where dynamo runs."""
    kept_away: Callable[Given, T] = _disable_dynamo(function)

    @wraps(function)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> T:
        if is_dynamo_compiling() or _running() is not None:
            return kept_away(*args, **kwargs)
        return function(*args, **kwargs)

    return call


class Hook:
    """A hook that stays with its module: copies and pickles of the model are not observed.

    Args:
        call: the function that is called.
        own_thread: True ignores calls of the module in other threads than the one that makes the hook; False ignores
            calls inside `unobserved`.
        trains: True ignores calls without gradients.
    """

    def __init__(self, call: Callable[..., None], *, own_thread: bool = False, trains: bool = False) -> None:
        self._call = call
        self._trains = trains
        self._thread = threading.get_ident() if own_thread else None

    def __call__(self, *args: Any) -> None:
        """Call the wrapped function, if the thread is the one that is observed."""
        if not self._trains or torch.is_grad_enabled():
            self._called(*args)

    @apart  # the data that a hook collects are not part of a compiled graph
    def _called(self, *args: Any) -> None:
        if self._thread == threading.get_ident() or (self._thread is None and not getattr(_HERE, "unobserved", False)):
            self._call(*args)

    def __deepcopy__(self, memo: object) -> _NoHook:
        return _NoHook()

    def __reduce__(self) -> tuple[type[_NoHook], tuple[()]]:
        return _NoHook, ()


class OutsideHook(Hook):
    """A hook inside of a compiled model that is not called by what is compiled, so that this stays one graph.

    What observes the model from outside lets the passes that it needs run without their compiled form.
    """

    def __call__(self, *args: Any) -> None:
        """Call the wrapped function, as above, if this is not compiled."""
        if not is_dynamo_compiling():
            super().__call__(*args)


def is_compiled(model: nn.Module | None) -> bool:
    """Return whether this is what `torch.compile` returned for a model, whose hooks see its passes from outside."""
    return hasattr(model, "_orig_mod")


def inner_hook(model: nn.Module | None) -> type[Hook]:
    """Return the class of the hooks of modules inside of a model."""
    return OutsideHook if is_compiled(model) else Hook


class _NoHook:
    """The replacement for a copied hook."""

    def __call__(self, *args: object) -> None:
        """Do nothing."""
