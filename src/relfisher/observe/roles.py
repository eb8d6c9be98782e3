"""The role of a layer in the model: the activation after it, the layer that takes its units, and its scoring."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from relfisher.layers import EmbeddingLayer, Layer, LinearOperation, is_table
from relfisher.observe.trace import Trace
from relfisher.responses import UnitResponse

__all__ = ["Role", "is_softmax_gradient", "needs_gradient", "roles_of"]

# Tolerances for rounding in the sum of a row of gradients, relative to the largest row: in half and other precision.
_HALF, _FULL = 0.05, 1e-3

# The same for gradients that are orthogonal to the outputs, but for the small number in the variance of a layer norm.
_TURNED = 0.01

# The gradient of a softmax grows with its logits, divided by a temperature; this is of the highest, 20.
_LEAST_GROWTH = 0.05


@dataclass(frozen=True)
class Role:
    """The role of a layer among the layers and functions around it.

    Args:
        response: the response of its units.
        following: the linear layer that takes its activated units, if nothing else does; otherwise None.
        is_head: whether its outputs are the logits of a softmax; None if that is not known yet.
        reads_input: whether it reads the model's raw inputs, that is, no parameter comes before it.
        refused: the reason why it cannot have a metric after all; None if it can.
    """

    response: UnitResponse
    following: Layer | None = None
    is_head: bool | None = None
    reads_input: bool = False
    refused: str | None = None


def roles_of(trace: Trace, layers: Iterable[Layer]) -> dict[Layer, Role]:
    """Return the roles of layers in a forward pass.

    Args:
        trace: the trace of the pass, which saw the outputs of the layers.
        layers: layers that ran in the pass, or that it refused.

    Returns:
        One role per layer.
    """
    return {layer: _role(trace, layer) for layer in layers}


def _role(trace: Trace, layer: Layer) -> Role:
    reads_input = trace.reads_input(layer)
    misused = trace.misused.get(layer)
    if misused is not None:
        reason = f"tied: {misused} uses its parameters outside its own calls"
        if isinstance(layer, EmbeddingLayer):
            reason += f": make the head a Linear, and write head.weight = {layer.name}.weight"
        elif isinstance(layer, LinearOperation) and is_table(layer):
            reason += ": use nn.Embedding, by which a function may multiply as well"
        return Role(layer.own_response, refused=reason)
    if not layer.followed:
        return Role(layer.own_response, reads_input=reads_input)
    if not layer.is_linear:
        return Role(trace.takers.response(layer), reads_input=reads_input)
    is_head = None if trace.takers.is_output(layer) else trace.takers.is_softmax(layer)
    following = trace.takers.following(layer)
    if following in trace.misused:  # what took the units may have been computed from its weight
        following = None
    return Role(trace.takers.response(layer), following, is_head, reads_input)


def needs_gradient(trace: Trace, layer: Layer, role: Role) -> bool:
    """Return whether a layer is scored outside the model, so that only its gradients show how."""
    unknown = role.refused is None and role.is_head is None and layer.out > 1
    return unknown and layer.is_linear and trace.takers.is_output(layer)


def is_softmax_gradient(gradient: Tensor, outputs: Tensor) -> bool:
    """Return whether a loss depends on outputs through their softmax alone, as far as one gradient tells.

    Such a loss does not change if the same number is added to all outputs of a sample, so that the gradient of each
    sample sums to 0. The gradient of a squared error does not. A loss of normalized outputs does not change either if
    they are multiplied: its gradient is orthogonal to them. In the gradient p - q of a softmax p for the label q, that
    of the other classes grows with their outputs; the hinge loss pushes all alike. A squared error of differences of
    outputs has the gradient of a softmax for some q, and is not told apart.

    Args:
        gradient: the gradient, [*, out].
        outputs: the outputs, [*, out].
    """
    rows, z = (each.detach().to(torch.float64).reshape(-1, each.shape[-1]) for each in (gradient, outputs))
    tolerance = _HALF if gradient.dtype in (torch.float16, torch.bfloat16) else _FULL
    largest = rows.abs().sum(-1).max()
    if not largest > 0 or bool((rows.sum(-1).abs() > tolerance * largest).any()):
        return False
    moves = rows * (z - z.mean(-1, keepdim=True)).nan_to_num(0.0, 0.0, 0.0)  # outputs may be masked by -inf
    if moves.any() and bool((moves.sum(-1).abs() <= max(tolerance, _TURNED) * moves.abs().sum(-1)).all()):
        return False
    pushed = (rows > 0) & z.isfinite() & ((rows < 0).sum(-1, keepdim=True) == 1)
    spread, growth = (_variance(each, pushed) for each in (z, rows.log()))
    return spread <= tolerance**2 or growth > _LEAST_GROWTH**2 * spread


def _variance(rows: Tensor, chosen: Tensor) -> float:
    """Return the variance of the chosen entries around the means of their rows."""
    entries, count = rows.where(chosen, 0.0), chosen.sum(-1, keepdim=True).clamp(min=1)
    centred = (entries - entries.sum(-1, keepdim=True) / count).where(chosen, 0.0)
    return float(centred.square().sum() / chosen.sum().clamp(min=1))
