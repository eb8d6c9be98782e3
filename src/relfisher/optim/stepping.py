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
from relfisher.optim.health import all_finite, finite, flags
from relfisher.optim.momentum import Momentum
from relfisher.optim.options import Inversions
from relfisher.optim.outcome import Outcome
from relfisher.optim.record import Record
from relfisher.optim.rounding import Rounding
from relfisher.optim.rules import Move, StepRule
from relfisher.optim.sharing import Sharing
from relfisher.shards import held
from relfisher.structures import Structure

__all__ = ["Moving", "moving_layers", "obstacle", "take"]

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
    seen: list[tuple[Record, tuple[Any, ...]]] = []
    for layer, index in place.items():
        record = curvature.records[layer]
        if record.structure is not None:
            weight, has_momentum = layer.weight, bool(groups[index]["momentum"])
            owner = curvature.sharing.owner.get(layer)
            facts = record.structure, record.role, index, has_momentum, weight.dtype, weight.device, owner
            seen.append((record, facts))

    def kind(record: Record, facts: tuple[Any, ...]) -> tuple[Hashable, list[str]]:
        structure, role, index, has_momentum, *_, owner = facts
        layer, flat = record.layer, inversions.is_flat(record.layer, role)
        keys = [] if flat else structure.factors(layer.shape, root=rule.needs_root)
        owners = (rule, *curvature.ownership.optional) if has_momentum else (rule,)
        keys += [key for each in owners for key in each.declares(layer.shape)]
        return (structure.alike, index, flat, _is_head(record), layer.fan_in, owner), keys

    found, targets, sources = [], [], []
    with curvature.whole_gradients():
        for batch, parameters in batches.moving(seen, kind):
            record, structure = batch.records[0], batch.records[0].structure
            assert structure is not None  # others have no batch
            group = groups[place[record.layer]]
            if not curvature.sharing.owns(record.layer):
                found.append(Moving(batch, group, parameters, _of_another(batch, structure, parameters)))
                continue
            states = [curvature.state(each, structure) for each in batch.records]
            if group["momentum"] and any("momentum" not in state for state in states):
                for layer in batch.layers:
                    curvature.complete(layer, curvature.ownership.optional)
            latest, parts, own = batch.gradient(parameters, states[0]["metric"].dtype)
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


def take(
    moving: Sequence[Moving],
    groups: Sequence[Group],
    rule: StepRule,
    states: Mapping[Tensor, dict[str, Tensor]],
    sharing: Sharing,
) -> Outcome:
    """Move the layers by the step rule, and all other parameters that have a gradient by AdamW.

    Args:
        moving: the layers.
        groups: all groups.
        rule: the step rule.
        states: the states of single parameters.
        sharing: which processes own which layers.

    Returns:
        Whether the step is taken; if not, everything is as before.

    Raises:
        ValueError: if the rule does not return a step for each move.
    """
    rest = _without_metric(moving, groups)
    moves = [each.move for each in moving]
    kept = [(move.state, rule.declares(move.layers[0].shape)) for move in moves]
    own = [state[key] for state, keys in kept for key in keys if key in state]
    before = torch._foreach_clone(own) if own else []
    steps = rule.checked_steps(moves)
    others = finite([held(p.grad) for _, given in rest for p in given if p.grad is not None])
    outcome = Outcome(flags(moves, steps) + others)
    for tensor, old in zip(own, before, strict=True):
        outcome.restore(tensor, old)
    for group in groups:
        if group["weight_decay"] and group["kind"] == METRIC:
            fixed = {id(p) for each in moving if each.move.is_head and not group["decays_heads"] for p in each.moved}
            moved = {id(p) for each in moving for p in each.moved} - fixed
            outcome.multiply(
                [held(p) for p in group["params"] if id(p) in moved], 1 - rate(group) * group["weight_decay"]
            )
    rounding = Rounding(2 * groups[0]["iteration"])
    targets, changes = [], []
    returned: list[tuple[Record, Tensor]] = []
    for (batch, _, parameters, move), step in zip(moving, steps, strict=True):
        if "momentum" in move.state:
            momentum = move.state["momentum"]
            outcome.replace(momentum, rounding.rounded(move.velocity, momentum.dtype))
        change = outcome.change(step.direction, step.scale, batch.room(step.direction.dtype))
        if batch.layers[0] in sharing.returned:
            returned += zip(batch.records, change if len(change) else [change] * len(batch.records), strict=True)
            continue
        its, own_changes = batch.changes(parameters, change)
        targets += its
        changes += own_changes
    its, own_changes = sharing.parts(returned)
    targets += its
    changes += own_changes
    if targets:
        torch._foreach_sub_(targets, changes)
    for group, given in rest:
        Fallback.step(given, [states[p] for p in given], rate(group) * group["fallback_ratio"], group, outcome)
    return outcome


def _of_another(batch: Batch, structure: Structure, parameters: Sequence[Sequence[Tensor | None]]) -> Move:
    """Return the move of layers that another process owns, which computes it."""
    layer = batch.layers[0]
    nothing = torch.empty(0, dtype=layer.dtype, device=layer.weight.device)
    if batch.gathers:
        batch.gradient(parameters, layer.dtype)  # sends the owner what it needs
    is_head = _is_head(batch.records[0])
    return Move(batch.layers, structure, {}, nothing, nothing, nothing, 0.0, 0.0, is_head=is_head)


def _is_head(record: Record) -> bool:
    return record.role is not None and bool(record.role.is_head)


def obstacle(curvature: Curvature, groups: Sequence[Group]) -> str | None:
    """Return why a step cannot be taken, if an option is out of range or a gradient is not finite; otherwise None.

    Gradients are checked here, which the host waits for, if samples are to enter the metric, which must not be those of
    such a gradient, or if several processes must skip together. Otherwise `take` checks them.
    """
    try:
        for group in groups:
            check_options(group, running=True)
    except ValueError as error:
        return str(error)
    if not curvature.observer.waiting and not curvature.ranks.together:
        return None
    given = [held(p.grad) for group in groups for p in group["params"] if p.grad is not None]
    return None if all_finite(given) else "a gradient is not finite"


def _without_metric(moving: Iterable[Moving], groups: Iterable[Group]) -> list[tuple[Group, list[Tensor]]]:
    """Return the parameters that have a gradient but no metric, by group."""
    moved = {id(p) for each in moving for layer in each.batch.layers for p in layer.parameters}
    rest = [(group, [p for p in group["params"] if p.grad is not None and id(p) not in moved]) for group in groups]
    return [(group, parameters) for group, parameters in rest if parameters]
