"""Put a model in evaluation mode temporarily, since its metric is that of the function used for inference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluation_mode"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of a model in evaluation mode, and restore each module's mode at the end, even after an error.

    Args:
        model: the model; meanwhile it has no dropout, and its batch norm uses the running statistics.

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
