"""Run a model the way its metric needs: in evaluation mode, and by operations that have all derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["differentiable", "evaluation_mode", "undisturbed"]


@contextmanager
def differentiable() -> Iterator[None]:
    """Run attention and transformer layers without fused kernels, which lack derivatives of their derivatives.

    Yields:
        Nothing.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


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


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode, and leave its buffers, its modes and the state of the random numbers as they are.

    Args:
        model: the model.

    Yields:
        Nothing.
    """
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = {buffer.device for buffer, _ in before} | {parameter.device for parameter in model.parameters()}
    try:
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]), evaluation_mode(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, kept in before:
                if not buffer.is_meta and not torch.equal(buffer, kept):
                    buffer.copy_(kept)
