"""One step: collect the gradients of layers with metrics, apply the step rule, and move the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.optim.curvature import Curvature
from relfisher.optim.fallback import Fallback
from relfisher.optim.groups import METRIC, check_options, rate
from relfisher.optim.health import all_finite
from relfisher.optim.momentum import Momentum
from relfisher.optim.options import Inversions
from relfisher.optim.record import Record
from relfisher.optim.rules import Move, StepRule
from relfisher.shards import held

__all__ = ["Moving", "moving_layers", "obstacle", "take", "take_fallback"]

Group = dict[str, Any]


class Moving(NamedTuple):
    """A layer that moves, with its group and its move."""

    record: Record
    group: Group
    move: Move


def moving_layers(
    curvature: Curvature, inversions: Inversions, place: Mapping[Layer, int], groups: Sequence[Group], rule: StepRule
) -> list[Moving]:
    """Return the layers that have a gradient and a metric, without changing their states.

    Args:
        curvature: the metrics.
        inversions: how they are inverted.
        place: the index of each layer's group.
        groups: all groups; their highest learning rates are updated.
        rule: the step rule that the moves are for.
    """
    for group in groups:
        # A scheduler that starts low announces its highest learning rate.
        highest = group.get("max_lr") or group.get("initial_lr") or 0.0
        group["peak_lr"] = max(group["peak_lr"], float(group["lr"]), float(highest))
    with curvature.whole_gradients():
        records = {layer: curvature.records[layer] for layer in place}
        gradients = {layer: record.gradient() for layer, record in records.items() if record.structure is not None}
    found = []
    for layer, index in place.items():
        record, group = records[layer], groups[index]
        structure, gradient = record.structure, gradients.get(layer)
        if structure is None or gradient is None:
            continue
        state = curvature.state(record, structure)
        last = state.get("momentum") if group["momentum"] else None
        latest = gradient.to(state["metric"].dtype)
        gradient, velocity = Momentum.added(latest, last, group["momentum"], nesterov=rule.nesterov)
        lr = rate(group)
        annealing = lr / group["peak_lr"] if group["peak_lr"] else 1.0
        flat = inversions.is_flat(layer, record.role)
        is_head = record.role is not None and bool(record.role.is_head)
        share = group["momentum"]
        move = Move(layer, structure, state, gradient, velocity, latest, share, lr, annealing, flat, is_head)
        found.append(Moving(record, group, move))
    return found


def take(moving: Sequence[Moving], groups: Sequence[Group], rule: StepRule) -> bool:
    """Move the layers; if a step is not finite, return False and leave everything unchanged."""
    steps = rule.steps([each.move for each in moving])
    if steps is None or not (rule.checks_finite or all_finite([step.direction for step in steps])):
        return False
    if len(steps) != len(moving):
        raise ValueError(f"{type(rule).__name__}.steps must return a step a move, got {len(steps)} for {len(moving)}")
    for group in groups:
        if group["weight_decay"] and group["kind"] == METRIC:
            moved = {p for each in moving for p in each.record.layer.parameters if p.grad is not None}
            if not group["decays_heads"]:
                moved -= {p for each in moving if each.move.is_head for p in each.record.layer.parameters}
            shrinking = [held(p) for p in group["params"] if p in moved]
            if shrinking:
                torch._foreach_mul_(shrinking, 1 - rate(group) * group["weight_decay"])
    for (record, group, move), step in zip(moving, steps, strict=True):
        if group["momentum"]:
            move.state["momentum"] = move.velocity
        record.add_(step.direction, -step.scale)
    return True


def obstacle(curvature: Curvature, groups: Sequence[Group], rule: StepRule) -> str | None:
    """Return why a step cannot be taken, if an option is out of range or a gradient is not finite; otherwise None.

    If no statistics are pending and the step rule checks its results, the layers' gradients need no other check, but
    for several processes, which must skip together.
    """
    try:
        for group in groups:
            check_options(group, running=True)
    except ValueError as error:
        return str(error)
    checked = rule.checks_finite and not curvature.observer.waiting and not curvature.ranks.together
    records = curvature.records.values() if checked else ()
    known = {id(p) for record in records if record.structure for p in record.layer.parameters}
    given = (p for group in groups for p in group["params"] if id(p) not in known)
    return None if all_finite([held(p.grad) for p in given if p.grad is not None]) else "a gradient is not finite"


def take_fallback(
    moving: Iterable[Moving], groups: Iterable[Group], states: Mapping[Tensor, dict[str, Tensor]]
) -> None:
    """Take an AdamW step on all parameters that have a gradient but no metric."""
    moved = {id(parameter) for each in moving for parameter in each.record.layer.parameters}
    for group in groups:
        rest = [p for p in group["params"] if p.grad is not None and id(p) not in moved]
        if rest:
            Fallback.step(rest, [states[p] for p in rest], rate(group) * group["fallback_ratio"], group)
