"""One step: collect the gradients of layers with metrics, apply the step rule, and move the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relfisher.optim.curvature import Curvature
from relfisher.optim.fallback import Fallback
from relfisher.optim.groups import OptionChecks, rate
from relfisher.optim.health import all_finite, finite, flags
from relfisher.optim.lineup import Group, Lineup, Team
from relfisher.optim.momentum import Momentum
from relfisher.optim.outcome import Outcome
from relfisher.optim.record import Record
from relfisher.optim.rounding import Rounding
from relfisher.optim.rules import Move, StepRule
from relfisher.optim.sharing import Sharing
from relfisher.shards import held

__all__ = ["Moving", "moving_layers", "obstacle", "take"]


class Moving(NamedTuple):
    """Layers that move together, and their move."""

    team: Team
    move: Move


def moving_layers(lineup: Lineup, curvature: Curvature, groups: Sequence[Group], rule: StepRule) -> list[Moving]:
    """Return the layers that have a gradient and a metric, without changing what they keep.

    Args:
        lineup: the teams of the layers, as of this step.
        curvature: the metrics.
        groups: all groups; their highest learning rates are updated.
        rule: the step rule that the moves are for.
    """
    for group in groups:
        # A scheduler that starts low announces its highest learning rate.
        highest = group.get("max_lr") or group.get("initial_lr") or 0.0
        group["peak_lr"] = max(group["peak_lr"], float(group["lr"]), float(highest))
    found: list[Moving] = []
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    with curvature.whole_gradients():
        for team, state in zip(lineup.teams, lineup.states(), strict=True):
            if not team.is_own:
                found.append(Moving(team, _of_another(team)))
                continue
            batch, group, lr = team.batch, team.group, rate(team.group)
            metric = batch.records[0].metric_in_use
            assert metric is not None  # the state was looked up
            latest, parts, own = batch.gradient(team.parameters, metric.dtype)
            targets += parts
            sources += own
            annealing = lr / group["peak_lr"] if group["peak_lr"] else 1.0
            tensors = state, latest, latest, latest
            move = Move(
                batch.layers, team.structure, *tensors, group["momentum"], lr, annealing, team.is_flat, team.is_head
            )
            found.append(Moving(team, move))
    if targets:
        torch._foreach_copy_(targets, sources)
    moves = Momentum.added([move for _, move in found], nesterov=rule.nesterov)
    return [Moving(team, move) for (team, _), move in zip(found, moves, strict=True)]


def take(
    moving: Sequence[Moving],
    lineup: Lineup,
    groups: Sequence[Group],
    rule: StepRule,
    states: Mapping[Tensor, dict[str, Tensor]],
    sharing: Sharing,
) -> Outcome:
    """Move the layers by the step rule, and all other parameters that have a gradient by AdamW.

    Args:
        moving: the layers.
        lineup: their teams, and the other parameters.
        groups: all groups.
        rule: the step rule.
        states: the states of single parameters.
        sharing: which processes own which layers.

    Returns:
        Whether the step is taken; if not, everything is as before.

    Raises:
        ValueError: if the rule does not return a step for each move.
    """
    rest = [(group, [p for p in parameters if p.grad is not None]) for group, parameters in lineup.rest]
    before = torch._foreach_clone(lineup.of_rule) if lineup.of_rule else []
    moves = [move for _, move in moving]
    steps = rule.checked_steps(moves)
    others = finite([held(p.grad) for _, given in rest for p in given])
    outcome = Outcome(flags(moves, steps) + others)
    for tensor, old in zip(lineup.of_rule, before, strict=True):
        outcome.restore(tensor, old)
    for group, parameters in lineup.decayed:
        if group["weight_decay"]:
            outcome.multiply([held(p) for p in parameters], 1 - rate(group) * group["weight_decay"])
    rounding = Rounding(2 * groups[0]["iteration"])
    targets: list[Tensor] = []
    changes: list[Tensor] = []
    returned: list[tuple[Record, Tensor]] = []
    for (team, move), step in zip(moving, steps, strict=True):
        batch, momentum = team.batch, move.state.get("momentum")
        if momentum is not None:
            outcome.replace(momentum, rounding.rounded(move.velocity, momentum.dtype))
        change = outcome.change(step.direction, step.scale, batch.room(step.direction.dtype))
        if batch.layers[0] in sharing.returned:
            returned += zip(batch.records, change if len(change) else [change] * len(batch.records), strict=True)
            continue
        its, own_changes = batch.changes(team.parameters, change)
        targets += its
        changes += own_changes
    its, own_changes = sharing.parts(returned)
    targets += its
    changes += own_changes
    if targets:
        torch._foreach_sub_(targets, changes)
    for group, given in rest:
        if given:
            Fallback.step(given, [states[p] for p in given], rate(group) * group["fallback_ratio"], group, outcome)
    return outcome


def _of_another(team: Team) -> Move:
    """Return the move of layers that another process owns, which computes it."""
    batch, layer = team.batch, team.batch.layers[0]
    nothing = torch.empty(0, dtype=layer.dtype, device=layer.weight.device)
    if batch.gathers:
        batch.gradient(team.parameters, layer.dtype)  # sends the owner what it needs
    return Move(batch.layers, team.structure, {}, nothing, nothing, nothing, 0.0, 0.0, is_head=team.is_head)


def obstacle(curvature: Curvature, groups: Sequence[Group], checks: OptionChecks) -> str | None:
    """Return why a step cannot be taken, if an option is out of range or a gradient is not finite; otherwise None.

    Gradients are checked here, which the host waits for, if samples are to enter the metric, which must not be those of
    such a gradient, or if several processes must skip together. Otherwise `take` checks them.
    """
    try:
        checks.check(groups)
    except ValueError as error:
        return str(error)
    if not curvature.observer.waiting and not curvature.ranks.together:
        return None
    given = [held(p.grad) for group in groups for p in group["params"] if p.grad is not None]
    return None if all_finite(given) else "a gradient is not finite"
