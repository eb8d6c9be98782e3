"""A model in evaluation mode for a while: its metric is that of the function which it computes when it is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of a model in evaluation mode, and back in its own mode at the end, whatever happens.

    Args:
        model: without dropout and with the running statistics of batch norm in the meantime.

    Yields:
        Nothing.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
