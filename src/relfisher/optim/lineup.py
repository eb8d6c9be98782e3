"""Which layers move together in a step: found once, and kept until something that it depends on changes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from operator import is_
from typing import Any, NamedTuple

from torch import Tensor

from relfisher.layers import Layer
from relfisher.optim.batches import Batch, Batches, Facts
from relfisher.optim.curvature import Curvature
from relfisher.optim.groups import METRIC
from relfisher.optim.options import Inversions
from relfisher.optim.record import Record
from relfisher.optim.rules import StepRule
from relfisher.structures import Structure

__all__ = ["Group", "Lineup", "Team"]

Group = dict[str, Any]


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
        of_rule: the keys of what the step rule keeps of a layer.
    """

    batch: Batch
    structure: Structure
    group: Group
    parameters: Sequence[Sequence[Tensor | None]]
    is_flat: bool
    is_head: bool
    is_own: bool
    of_rule: tuple[str, ...]


class Lineup:
    """The teams of an optimizer's layers, and the parameters outside of them.

    Args:
        curvature: the metrics.
        inversions: how metrics are inverted.
        rule: the step rule.

    Attributes:
        teams: the layers that have a gradient and a metric.
        rest: the other parameters of each group, with or without a gradient.
        decayed: the parameters of each group with metrics that move, and shrink if it has a weight decay.
    """

    def __init__(self, curvature: Curvature, inversions: Inversions, rule: StepRule) -> None:
        self.teams: list[Team] = []
        self.rest: list[tuple[Group, list[Tensor]]] = []
        self.decayed: list[tuple[Group, list[Tensor]]] = []
        self._curvature = curvature
        self._inversions = inversions
        self._rule = rule
        self._batches = Batches()
        self._place: Mapping[Layer, int] = {}
        self._records: list[Record] = []
        self._objects: list[object] = []
        self._values: list[object] = []

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
        decaying = [(group, self._decaying(group)) for group in groups if group["kind"] == METRIC]
        self.decayed = [(group, [p for p in group["params"] if id(p) in own]) for group, own in decaying]

    def _kind(self, record: Record, facts: Facts) -> tuple[Hashable, list[str]]:
        """Return what is equal for layers that move together, and the keys of what is stacked of them."""
        structure, role, index, has_momentum, *_, owner = facts
        layer, flat = record.layer, self._inversions.is_flat(record.layer, role)
        keys = [] if flat else structure.factors(layer.shape, root=self._rule.needs_root)
        owners = (self._rule, *self._curvature.ownership.optional) if has_momentum else (self._rule,)
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
            tuple(self._rule.declares(layer.shape)),
        )

    def _decaying(self, group: Group) -> set[int]:
        """Return the identities of parameters that move, and shrink if they are in this group."""
        moved = {id(p): team for team in self.teams for own in team.parameters for p in own if p is not None}
        return {each for each, team in moved.items() if group["decays_heads"] or not team.is_head}


def _is_head(record: Record) -> bool:
    return record.role is not None and bool(record.role.is_head)
