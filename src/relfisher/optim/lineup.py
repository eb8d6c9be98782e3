"""Which layers move together in a step: found once, and kept until something that it depends on changes."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor

from relfisher.layers import Layer
from relfisher.optim.batches import Batch, Batches, Facts, Stack
from relfisher.optim.curvature import Curvature
from relfisher.optim.groups import METRIC
from relfisher.optim.options import Inversions
from relfisher.optim.record import Record
from relfisher.optim.rules import StepRule
from relfisher.structures import State, Structure

__all__ = ["Group", "Lineup", "Team"]

Group = dict[str, Any]

# What a rule keeps of a layer is in one tensor for all teams if it is so many numbers; more would take memory.
_FEW = 16


class Team(NamedTuple):
    """Layers that move together.

    Attributes:
        batch: the layers.
        structure: a structure that applies the factors of each layer as its own does.
        group: their group.
        parameters: the parameters of each layer; None for those that do not move.
        is_flat: whether the metric leaves their gradients as they are.
        is_head: whether their outputs are the logits of a softmax.
        is_own: whether this process computes their step.
    """

    batch: Batch
    structure: Structure
    group: Group
    parameters: Sequence[Sequence[Tensor | None]]
    is_flat: bool
    is_head: bool
    is_own: bool


class Lineup:
    """The teams of an optimizer's layers, and the parameters outside of them.

    Args:
        curvature: the metrics.
        inversions: how metrics are inverted.
        rule: the step rule.

    Attributes:
        teams: the layers that have a gradient and a metric.
        rest: the other parameters of each group, with or without a gradient.
        of_rule: the tensors that the step rule keeps, as of the last call of `states`.
        decayed: the parameters of each group with metrics that move, and shrink if it has a weight decay.
    """

    def __init__(self, curvature: Curvature, inversions: Inversions, rule: StepRule) -> None:
        self.teams: list[Team] = []
        self.rest: list[tuple[Group, list[Tensor]]] = []
        self.decayed: list[tuple[Group, list[Tensor]]] = []
        self.of_rule: list[Tensor] = []
        self._curvature = curvature
        self._inversions = inversions
        self._rule = rule
        self._batches = Batches()
        self._place: Mapping[Layer, int] = {}
        self._records: list[Record] = []
        self._objects: list[object] = []
        self._values: list[object] = []
        self._of_rule: list[_OfRule] = []

    def settle(self, place: Mapping[Layer, int], groups: Sequence[Group]) -> None:
        """Find the teams anew if anything has changed.

        Args:
            place: the index of each layer's group.
            groups: all groups.
        """
        if place is not self._place:
            self._place, self._records = place, [self._curvature.records[layer] for layer in place]
        objects, values = self._facts(groups)
        if values != self._values or len(objects) != len(self._objects) or not all(map(is_, objects, self._objects)):
            self._find(groups)
            self._objects, self._values = objects, values

    def states(self) -> list[State]:
        """Return what is kept of the layers of each team of this process, [L, ...], and of other teams nothing."""
        curvature, found, own = self._curvature, [], []
        for team in self.teams:
            states: list[State] = []
            if team.is_own:
                states = [curvature.state(record, team.structure) for record in team.batch.records]
                if team.group["momentum"] and any("momentum" not in state for state in states):
                    for layer in team.batch.layers:
                        curvature.complete(layer, curvature.ownership.optional)
            own.append(states)
            found.append(team.batch.state(states) if states else {})
        self.of_rule = [of_rule.added(own, found) for of_rule in self._of_rule]
        return found

    def _facts(self, groups: Sequence[Group]) -> tuple[list[object], list[object]]:
        """Return all that the teams depend on: objects that must be the same, and values that must be equal."""
        records = self._records
        parameters = [parameter for record in records for parameter in record.layer.parameters]
        objects: list[object] = [self._place, *parameters, *groups]
        for record in records:
            objects += (record.structure, record.role, record.not_owned)
        values: list[object] = [parameter.grad is None for parameter in parameters]
        values += [(parameter.dtype, parameter.device) for parameter in parameters]
        values += [(bool(group["momentum"]), group["decays_heads"], len(group["params"])) for group in groups]
        values.append(dict(self._curvature.sharing.owner))
        return objects, values

    def _find(self, groups: Sequence[Group]) -> None:
        seen: list[tuple[Record, Facts]] = []
        for record in self._records:
            if record.structure is not None:
                layer, index = record.layer, self._place[record.layer]
                has_momentum, owner = bool(groups[index]["momentum"]), self._curvature.sharing.owner.get(layer)
                facts = record.structure, record.role, index, has_momentum, layer.weight.dtype, layer.weight.device
                seen.append((record, (*facts, owner)))
        self.teams = [
            self._team(batch, parameters, groups) for batch, parameters in self._batches.moving(seen, self._kind)
        ]
        inside = {id(p) for team in self.teams for layer in team.batch.layers for p in layer.parameters}
        rest = [(group, [p for p in group["params"] if id(p) not in inside]) for group in groups]
        self.rest = [(group, parameters) for group, parameters in rest if parameters]
        self._of_rule = self._kept_by_rule()
        decaying = [(group, self._decaying(group)) for group in groups if group["kind"] == METRIC]
        self.decayed = [(group, [p for p in group["params"] if id(p) in own]) for group, own in decaying]

    def _kind(self, record: Record, facts: Facts) -> tuple[Hashable, list[str]]:
        """Return what is equal for layers that move together, and the keys of what is stacked of them."""
        structure, role, index, has_momentum, *_, owner = facts
        layer, flat = record.layer, self._inversions.is_flat(record.layer, role)
        keys = [] if flat else structure.factors(layer.shape, root=self._rule.needs_root)
        owners = self._curvature.ownership.optional if has_momentum else ()
        keys += [key for each in owners for key in each.declares(layer.shape)]
        return (structure.alike, index, flat, _is_head(record), layer.fan_in, owner), keys

    def _team(self, batch: Batch, parameters: Sequence[Sequence[Tensor | None]], groups: Sequence[Group]) -> Team:
        record, layer, structure = batch.records[0], batch.layers[0], batch.records[0].structure
        assert structure is not None  # others have no batch
        assert record.role is not None  # as above
        return Team(
            batch,
            structure,
            groups[self._place[layer]],
            parameters,
            self._inversions.is_flat(layer, record.role),
            _is_head(record),
            self._curvature.sharing.owns(layer),
        )

    def _kept_by_rule(self) -> list[_OfRule]:
        """Return what the rule keeps: a few numbers of each layer in one tensor for all teams of a device."""
        found: dict[Hashable, _OfRule] = {}
        for place, team in enumerate(self.teams):
            layer = team.batch.layers[0]
            for key, kept in self._rule.declares(layer.shape).items() if team.is_own else ():
                is_small = math.prod(kept.shape) <= _FEW
                form = key, kept.shape, kept.dtype or layer.dtype, layer.weight.device, None if is_small else place
                found.setdefault(form, _OfRule(key)).add(place, len(team.batch.layers))
        return list(found.values())

    def _decaying(self, group: Group) -> set[int]:
        """Return the identities of parameters that move, and shrink if they are in this group."""
        moved = {id(p): team for team in self.teams for own in team.parameters for p in own if p is not None}
        return {each for each, team in moved.items() if group["decays_heads"] or not team.is_head}


class _OfRule:
    """What a step rule keeps of the layers of some teams, in one tensor."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._places: list[int] = []
        self._counts: list[int] = []
        self._stack = Stack()
        self._whole: Tensor | None = None
        self._parts: Sequence[Tensor] = ()

    def add(self, place: int, count: int) -> None:
        """Keep it of one more team, which has so many layers."""
        self._places.append(place)
        self._counts.append(count)

    def added(self, own: Sequence[Sequence[State]], found: Sequence[State]) -> Tensor:
        """Add its parts to what is kept of the teams.

        Args:
            own: the states of the layers of all teams.
            found: what is kept of each team.

        Returns:
            The whole.
        """
        whole = self._stack.of([state for place in self._places for state in own[place]], self._key)
        if whole is not self._whole:
            self._whole, self._parts = whole, whole.split_with_sizes(self._counts)
        for place, part in zip(self._places, self._parts, strict=True):
            found[place][self._key] = part
        return whole


def _is_head(record: Record) -> bool:
    return record.role is not None and bool(record.role.is_head)
