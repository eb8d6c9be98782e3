"""The check of a layer kind."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from relfisher.layers import Call, Layer, Rows, Sampling
from relfisher.testing.comparison import same

__all__ = ["check_layer"]


def check_layer(kind: type[Layer], module: nn.Module, inputs: Any, rtol: float = 1e-5) -> None:
    """Check that a kind's layers of a module are linear in their parameters, with the samples x~ that they return.

    Each layer must join its parameters to a matrix of its shape and split it again. Its pre-activations must be
    z = W x~, and must change by V x~ when its parameters change by V. If the activation after the layer determines its
    response, they must equal the module's outputs.

    Args:
        kind: the kind to check.
        module: a module of this kind, in float64 for the most accurate check.
        inputs: the module's inputs: a tensor, or a tuple of arguments.
        rtol: the relative tolerance.

    Raises:
        AssertionError: if a check fails; the message says which one, and by how much.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    layers = kind.found_in("module", module)
    if not layers:
        raise AssertionError(f"{kind.__name__}.found_in must return layers of a {type(module).__name__}, got none")
    names = [layer.name for layer in layers]
    if len(set(names)) < len(names):
        raise AssertionError(f"the layers of a module must have different names, got {names}")
    for layer in layers:
        _check_one(layer, module, arguments, rtol)


def _check_one(layer: Layer, module: nn.Module, arguments: tuple[Any, ...], rtol: float) -> None:
    with torch.no_grad():
        matrix = layer.matrix(layer.parameters)
        if tuple(matrix.shape) != layer.shape:
            raise AssertionError(
                f"{layer.name} must have the shape {layer.shape}, but its parts join to {matrix.shape}"
            )
        again = torch.cat([columns.flatten(len(layer.shape) - 1) for columns in layer.split(matrix)], dim=-1)
        same(f"{layer.name}: the matrix after split", again, matrix, rtol)
        before = _rows(layer, module, arguments)
        if before.x.shape[-1] != layer.d or before.z.shape[-1] != layer.out:
            raise AssertionError(f"{layer.name} needs rows of [n, {layer.d}] and [n, {layer.out}], got {before}")
        same(f"{layer.name}: z against W x~", before.z, before.x @ matrix.mT, rtol)
        if layer.followed:
            said = layer.pre_activation(Call(arguments, {}, module(*arguments))).flatten()
            if said.numel() != before.z.numel():
                raise AssertionError(f"{layer.name} must say followed = False: z is not what its module returns")
            same(f"{layer.name}: z against the module's output", before.z.flatten().sort()[0], said.sort()[0], rtol)
        step = torch.linspace(-1, 1, matrix.numel(), dtype=matrix.dtype).reshape(matrix.shape)
        _add(layer, step, 1.0)
        try:
            after = _rows(layer, module, arguments)
        finally:
            _add(layer, step, -1.0)
        same(f"{layer.name}: the change of z for a step V against V x~", after.z - before.z, before.x @ step.mT, rtol)


def _rows(layer: Layer, module: nn.Module, arguments: tuple[Any, ...]) -> Rows:
    return layer.spelled_out(layer.rows(Call(arguments, {}, module(*arguments)), Sampling()))


def _add(layer: Layer, step: Tensor, scale: float) -> None:
    for target, change in zip(layer.seen(layer.parameters), layer.steps(step, layer.parameters), strict=True):
        target.add_(change, alpha=scale)
