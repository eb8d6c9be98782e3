"""What running a model reveals of a layer: the activation that follows, the layer that takes its units, its scoring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from relfisher.layers import Layer, LinearLayer
from relfisher.observe.trace import Trace
from relfisher.responses import UnitResponse

__all__ = ["Role", "is_softmax_gradient", "needs_gradient", "roles_of"]

# What rounding may make of the sum of a row of gradients, in half precision and in others: a share of the largest row.
_HALF, _FULL = 0.05, 1e-3


@dataclass(frozen=True)
class Role:
    """What a layer is to the layers and functions around it.

    Args:
        response: of its units.
        following: the linear layer that takes its activated units and is the only one to do so; None without such.
        is_head: whether its outputs are the logits of a softmax; None as long as that is not known.
        reads_input: whether it reads the model's raw inputs: no parameter comes before it.
        refused: why it has no metric after all; None if nothing speaks against one.
    """

    response: UnitResponse
    following: Layer | None = None
    is_head: bool | None = None
    reads_input: bool = False
    refused: str | None = None


def roles_of(trace: Trace, layers: Iterable[Layer]) -> dict[Layer, Role]:
    """Return the roles of layers in a forward pass.

    Args:
        trace: of the pass; it saw the outputs of the layers.
        layers: that ran in it, or were refused by it.

    Returns:
        A role a layer.
    """
    return {layer: _role(trace, layer) for layer in layers}


def _role(trace: Trace, layer: Layer) -> Role:
    reads_input = trace.reads_input(layer)
    misused = trace.misused.get(layer)
    if misused is not None:
        return Role(layer.own_response, refused=f"tied: {misused} uses its parameters outside its own calls")
    if not layer.followed:
        return Role(layer.own_response, reads_input=reads_input)
    if not isinstance(layer, LinearLayer):
        return Role(trace.response(layer), reads_input=reads_input)
    is_head = None if trace.is_output(layer) else trace.is_softmax(layer)
    return Role(trace.response(layer), trace.following(layer), is_head, reads_input)


def needs_gradient(trace: Trace, layer: Layer, role: Role) -> bool:
    """Return whether only the gradients of a layer's outputs can tell how they are scored: outside the model."""
    unknown = role.refused is None and role.is_head is None and layer.out > 1
    return unknown and isinstance(layer, LinearLayer) and trace.is_output(layer)


def is_softmax_gradient(gradient: Tensor) -> bool:
    """Return whether a loss depends on outputs through their softmax alone, given its gradient [*, out].

    Such a loss stays as it is when all outputs of a sample grow alike, so that the gradient of each sample sums to 0;
    that of a squared error does not.
    """
    rows = gradient.detach().to(torch.float64)
    tolerance = _HALF if gradient.dtype in (torch.float16, torch.bfloat16) else _FULL
    largest = rows.abs().sum(-1).max()
    return bool(largest > 0) and bool((rows.sum(-1).abs() <= tolerance * largest).all())
