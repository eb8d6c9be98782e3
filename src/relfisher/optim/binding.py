"""The binding of layers to parameter groups: the group of each layer, and which of its parts are trained here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from relfisher.layers import Layer, discover
from relfisher.optim.assignment import FALLBACK, Rule, check_rules, rule_for
from relfisher.optim.groups import METRIC, named, names_of, split
from relfisher.optim.options import MetricOptions

__all__ = ["Binding"]


class Binding:
    """The layers of a model in the groups of an optimizer.

    Args:
        model: the model.
        options: of the metric.

    Attributes:
        known: all layers of the model.
        rules: by which each layer chooses its structure.
        place: of each layer's group, for the layers that have one.
    """

    def __init__(self, model: nn.Module, options: MetricOptions) -> None:
        self.known = discover(model, options.layers).layers
        self.rules: dict[Layer, Rule] = {}
        self.place: dict[Layer, int] = {}
        self._options = options
        options.check(self.known)

    def halves(self, group: Any, model: nn.Module | None, *, again: bool) -> list[dict[str, Any]]:
        """Return a new group as one of parameters with a metric and one of others, either of which may be left out.

        Args:
            group: "params", with or without names, and any options.
            model: what is trained, if it is still there.
            again: True looks for layers that the model has got since.

        Returns:
            The groups, with named parameters.

        Raises:
            ValueError: if its structure is none, or cannot be kept.
            TypeError: if it is no group of tensors.
        """
        names = {} if model is None else names_of(model)
        if model is not None and again:
            known = {id(layer.weight) for layer in self.known}
            self.known += [new for new in discover(model, self._options.layers).layers if id(new.weight) not in known]
        if isinstance(group, dict) and "params" in group:
            rules = group.get("structure", self._options.structure)
            check_rules(rules, self.known)
            group = {key: value for key, value in group.items() if key != "structure"}
            group["params"] = named(group["params"], names)
            given = {id(parameter) for _, parameter in group["params"]}
            for layer in self.known:
                if layer not in self.place and any(id(parameter) in given for parameter in layer.parameters):
                    self.rules[layer] = rule_for(layer, rules)
        ruled = [layer for layer in self.known if self.rules.get(layer) != FALLBACK]
        return split(group, {id(p) for layer in ruled for p in layer.parameters}, names)

    def settle(self, groups: Sequence[Mapping[str, Any]]) -> tuple[list[Layer], dict[Layer, frozenset[str]]]:
        """Place layers in groups.

        Args:
            groups: all groups.

        Returns:
            The layers that are placed for the first time, and for each layer the parts that are not owned.
        """
        before, found = self.place, _homes(self.known, groups)
        self.place = {layer: found.get(layer, place) for layer, place in before.items()} | found
        new = [layer for layer in self.place if layer not in before]
        return new, {layer: _not_owned(layer, groups) for layer in self.place}

    def covered(self) -> set[Tensor]:
        """Return the parameters of the layers that are placed."""
        return {parameter for layer in self.place for parameter in layer.parameters}


def _homes(layers: Iterable[Layer], groups: Sequence[Mapping[str, Any]]) -> dict[Layer, int]:
    """Return the place of the group that each layer belongs to; layers of which no part has a metric here are left out.

    Args:
        layers: in the order of the model.
        groups: all groups.

    Returns:
        For each layer the group of its weight, or of another part if that alone is given, in the order of the groups.
    """
    pending, found = list(layers), {}
    for index, group in enumerate(groups):
        if group["kind"] == METRIC:
            given = {id(parameter) for parameter in group["params"]}
            found.update({layer: index for layer in pending if id(layer.weight) in given})
    home = {id(parameter): index for index, group in enumerate(groups) for parameter in group["params"]}
    for layer in pending:
        first = next((home[id(parameter)] for parameter in layer.parameters if id(parameter) in home), None)
        if layer not in found and first is not None and groups[first]["kind"] == METRIC:
            found[layer] = first
    return found


def _not_owned(layer: Layer, groups: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Return the attributes of a layer's parts that are in no group."""
    given = {id(parameter) for group in groups for parameter in group["params"]}
    pairs = zip(layer.parts, layer.parameters, strict=True)
    return frozenset(part.attribute for part, parameter in pairs if id(parameter) not in given)
