"""The metric that residuals give a layer, in the eigenvectors of its factors, and the inverse of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from relfisher.optim.health import all_finite
from relfisher.optim.rowwise import RowDerivatives

__all__ = ["preconditioned", "update_diagonal", "update_layer"]


def update_layer(
    state: dict[str, Any], found: Sequence[RowDerivatives], samples: int, decay: float, generator: torch.Generator
) -> None:
    """Update the metric of a layer.

    Args:
        state: the state of the layer.
        found: the derivatives of all rows, which change nothing if they are not finite.
        samples: the largest number of rows of each part that count.
        decay: the share of the metric that is kept.
        generator: draws these rows.
    """
    parts = [_drawn(each, samples, generator).dense() for each in found]
    if not parts or not all_finite(parts):
        return
    rows = torch.cat(parts)
    outputs, inputs = torch.einsum("nib,njb->ij", rows, rows), torch.einsum("nib,nic->bc", rows, rows)
    if not all_finite([outputs, inputs]):
        return
    for name, new in (("outputs", outputs), ("inputs", inputs)):
        _average(state, name, new, decay)
        state[f"{name}_basis"] = torch.linalg.eigh(state[name].double())[1].to(rows)
    turned = state["outputs_basis"].mT @ rows @ state["inputs_basis"]
    _average(state, "metric", turned.square().sum(0), decay)


def update_diagonal(state: dict[str, Any], derivative: Tensor, decay: float) -> None:
    """Update the diagonal metric of a parameter by the derivative of residuals with random signs."""
    squares = derivative.square()
    if all_finite([squares]):
        _average(state, "metric", squares, decay)


def preconditioned(field: Tensor, state: dict[str, Any], damping: float) -> Tensor:
    """Return the inverse metric times a field; the field itself for a metric of 0."""
    metric: Tensor | None = state.get("metric")
    if metric is None or not bool(metric.any()):
        return field
    damped = (metric + damping * metric.mean()).clamp(min=torch.finfo(metric.dtype).tiny)
    if "outputs_basis" not in state:
        return field / damped
    left: Tensor = state["outputs_basis"]
    right: Tensor = state["inputs_basis"]
    return left @ ((left.mT @ field @ right) / damped) @ right.mT


def _drawn(rows: RowDerivatives, samples: int, generator: torch.Generator) -> RowDerivatives:
    count = len(rows.left)
    if count <= samples:
        return rows
    chosen = torch.randperm(count, generator=generator)[:samples].to(rows.left.device)
    return rows.picked(chosen, math.sqrt(count / samples))


def _average(state: dict[str, Any], name: str, new: Tensor, decay: float) -> None:
    state[name] = new.lerp(state[name], decay) if name in state else new
