"""One step: collect the gradients of layers with metrics, apply the step rule, and move the weights."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.optim.batches import Batch, Batches
from relfisher.optim.curvature import Curvature
from relfisher.optim.fallback import Fallback
from relfisher.optim.groups import METRIC, check_options, rate
from relfisher.optim.health import all_finite
from relfisher.optim.momentum import Momentum
from relfisher.optim.options import Inversions
from relfisher.optim.record import Record
from relfisher.optim.rules import Move, Step, StepRule
from relfisher.shards import held

__all__ = ["Moving", "moving_layers", "obstacle", "take", "take_fallback"]

Group = dict[str, Any]


class Moving(NamedTuple):
    """Layers that move together, with their group, their parameters that move, and their move."""

    batch: Batch
    group: Group
    parameters: Sequence[Sequence[Tensor | None]]
    move: Move

    @property
    def moved(self) -> list[Tensor]:
        """The parameters that move."""
        return [parameter for own in self.parameters for parameter in own if parameter is not None]


def moving_layers(
    curvature: Curvature,
    batches: Batches,
    inversions: Inversions,
    place: Mapping[Layer, int],
    groups: Sequence[Group],
    rule: StepRule,
) -> list[Moving]:
    """Return the layers that have a gradient and a metric, in batches, without changing what they keep.

    Args:
        curvature: the metrics.
        batches: the batches of its layers.
        inversions: how metrics are inverted.
        place: the index of each layer's group.
        groups: all groups; their highest learning rates are updated.
        rule: the step rule that the moves are for.
    """
    for group in groups:
        # A scheduler that starts low announces its highest learning rate.
        highest = group.get("max_lr") or group.get("initial_lr") or 0.0
        group["peak_lr"] = max(group["peak_lr"], float(group["lr"]), float(highest))
    seen = {}
    for layer, index in place.items():
        record = curvature.records[layer]
        if record.structure is not None:
            weight, has_momentum = layer.weight, bool(groups[index]["momentum"])
            seen[record] = (record.structure, record.role, index, has_momentum, weight.dtype, weight.device)

    def kind(record: Record) -> tuple[Hashable, list[str]]:
        structure, role, index, has_momentum, *_ = seen[record]
        layer, flat = record.layer, inversions.is_flat(record.layer, role)
        keys = [] if flat else structure.factors(layer.shape, root=rule.needs_root)
        keys += [*rule.declares(layer.shape), *(Momentum.declares(layer.shape) if has_momentum else ())]
        return (structure.alike, index, flat, _is_head(record), layer.fan_in), keys

    found, targets, sources = [], [], []
    with curvature.whole_gradients():
        for batch, parameters in batches.moving(seen, kind):
            record, structure = batch.records[0], batch.records[0].structure
            assert structure is not None  # others have no batch
            group = groups[place[record.layer]]
            states = [curvature.state(each, structure) for each in batch.records]
            if group["momentum"] and any("momentum" not in state for state in states):
                for layer in batch.layers:
                    curvature.complete(layer, [Momentum])
            latest, parts, own = batch.gradient(states[0]["metric"].dtype)
            targets += parts
            sources += own
            lr = rate(group)
            annealing = lr / group["peak_lr"] if group["peak_lr"] else 1.0
            flat = inversions.is_flat(record.layer, record.role)
            state, share = batch.state(states), group["momentum"]
            move = Move(
                batch.layers, structure, state, latest, latest, latest, share, lr, annealing, flat, _is_head(record)
            )
            found.append(Moving(batch, group, parameters, move))
    if targets:
        torch._foreach_copy_(targets, sources)
    return [each._replace(move=Momentum.added(each.move, nesterov=rule.nesterov)) for each in found]


def take(moving: Sequence[Moving], groups: Sequence[Group], rule: StepRule) -> bool:
    """Move the layers; if a step is not finite, return False and leave everything unchanged."""
    steps = rule.steps([each.move for each in moving])
    if steps is None or not (rule.checks_finite or all_finite([step.direction for step in steps])):
        return False
    if len(steps) != len(moving):
        raise ValueError(f"{type(rule).__name__}.steps must return a step a move, got {len(steps)} for {len(moving)}")
    for group in groups:
        if group["weight_decay"] and group["kind"] == METRIC:
            kept = {id(p) for each in moving if each.move.is_head and not group["decays_heads"] for p in each.moved}
            moved = {id(p) for each in moving for p in each.moved} - kept
            shrinking = [held(p) for p in group["params"] if id(p) in moved]
            if shrinking:
                torch._foreach_mul_(shrinking, 1 - rate(group) * group["weight_decay"])
    targets, changes = [], []
    for (batch, _, parameters, move), step in zip(moving, steps, strict=True):
        if "momentum" in move.state:
            move.state["momentum"].copy_(move.velocity)
        own, its = batch.changes(parameters, _scaled(step))
        targets += own
        changes += its
    if targets:
        torch._foreach_sub_(targets, changes)
    return True


def _scaled(step: Step) -> Tensor:
    """Return what is subtracted from the layers' matrices."""
    scale = step.scale
    if isinstance(scale, Tensor):
        scale = scale.to(step.direction.dtype).view(-1, *(1,) * (step.direction.ndim - 1))
    return step.direction * scale


def _is_head(record: Record) -> bool:
    return record.role is not None and bool(record.role.is_head)


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
    moved = {id(p) for each in moving for layer in each.batch.layers for p in layer.parameters}
    for group in groups:
        rest = [p for p in group["params"] if p.grad is not None and id(p) not in moved]
        if rest:
            Fallback.step(rest, [states[p] for p in rest], rate(group) * group["fallback_ratio"], group)
