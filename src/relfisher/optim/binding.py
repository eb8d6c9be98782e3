"""The binding of layers to parameter groups: each layer's group, and the parts of it that are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from relfisher.layers import Layer, SpreadOperation, discover, own_parameters
from relfisher.optim.assignment import FALLBACK, Rules, check_rules, rule_for
from relfisher.optim.groups import METRIC, named, names_of, split
from relfisher.optim.options import MetricOptions
from relfisher.optim.partition import mesh_of
from relfisher.optim.uncovered import tell, uncovered

__all__ = ["Binding"]


class Binding:
    """The assignment of a model's layers to the groups of an optimizer.

    Args:
        model: the model.
        options: the metric options.
        max_share: the largest share of all trained numbers without a metric.

    Attributes:
        known: all layers of the model.
        refused: the names of all other parameters, with the reason why they have no metric.
        rules: the rules by which layers choose their structures, as for `rule_for`.
        place: the index of each layer's group, for layers that have one.
    """

    def __init__(self, model: nn.Module, options: MetricOptions, max_share: float) -> None:
        mesh_of(model)  # flat parameters are no layers'
        found = discover(model, options.layers)
        self.known = found.layers
        self.refused = found.refused
        self._told: list[Tensor] = []
        self.rules: dict[Layer, Rules] = {}
        self.place: dict[Layer, int] = {}
        self._options = options
        self._max_share = max_share
        self._lost: set[Layer] = set()  # layers that turned out to have no metric
        self._waiting: list[Layer] = []  # layers that have yet to show what is trained
        options.check(self.known)

    def halves(self, group: Any, model: nn.Module | None, *, again: bool) -> list[dict[str, Any]]:
        """Split a new group into one with metrics and one without, either of which may be missing.

        Args:
            group: "params", with or without names, and any options.
            model: the trained model, if it still exists.
            again: True searches for layers that were added to the model since.

        Returns:
            The groups, with named parameters.

        Raises:
            ValueError: if its structure is invalid, or not supported by a layer.
            TypeError: if it is not a group of tensors.
        """
        names = {} if model is None else names_of(model)
        if model is not None and again:
            known = {id(layer.weight) for layer in self.known}
            found = discover(model, self._options.layers)
            self.known += [new for new in found.layers if id(new.weight) not in known]
            self.refused = found.refused
        if isinstance(group, dict) and "params" in group:
            rules = group.get("structure", self._options.structure)
            check_rules(rules, self.known)
            group = {key: value for key, value in group.items() if key != "structure"}
            group["params"] = named(group["params"], names)
            given = {id(parameter) for _, parameter in group["params"]}
            for layer in self.known:
                if layer not in self.place and any(id(parameter) in given for parameter in layer.parameters):
                    self.rules[layer] = rules
        return split(group, {id(p) for layer in self._ruled for p in layer.parameters}, names)

    @property
    def _ruled(self) -> list[Layer]:
        """The layers that no rule leaves to AdamW."""
        return [layer for layer in self.known if rule_for(layer, self.rules.get(layer, "auto")) != FALLBACK]

    def settle(self, groups: Sequence[Mapping[str, Any]]) -> tuple[list[Layer], dict[Layer, frozenset[str]]]:
        """Assign layers to groups.

        Args:
            groups: all groups.

        Returns:
            The newly assigned layers, and the parts of each layer that are not owned by this optimizer.
        """
        before, found = self.place, _homes(self._ruled, groups)
        self.place = {layer: found.get(layer, place) for layer, place in before.items()} | found
        new = [layer for layer in self.place if layer not in before]
        return new, {layer: _not_owned(layer, groups) for layer in self.place}

    def tell(self, model: nn.Module | None, groups: Sequence[Mapping[str, Any]]) -> None:
        """Warn about parameters in the groups that have no metric, once each; raise ValueError if they are too many."""
        if model is not None:
            open_ = [layer for layer in self.place if not layer.settled and layer not in self._lost]
            self._waiting = open_
            inside = {id(p) for layer in open_ for p in own_parameters(layer.module).values()}
            kept = {id(p) for layer in self.place if layer not in self._lost for p in layer.parameters}
            found = uncovered(model, self.refused, groups, inside | kept)
            if found.share > self._max_share:
                raise ValueError(
                    f"fallback.max_share is {self._max_share:g}, but AdamW would train "
                    f"{found.described(found.parameters)}"
                )
            self._told += tell(found, self._told)

    def refuse(self, layers: Mapping[Layer, str], model: nn.Module | None, groups: Sequence[Mapping[str, Any]]) -> None:
        """Note layers that turned out to have no metric, with the reasons; there was a warning about matrices.

        Raises:
            ValueError: if AdamW would train too many parameters then.
        """
        if (layers or any(layer.settled for layer in self._waiting)) and model is not None:
            names = names_of(model)
            self._lost |= layers.keys()
            kept = {id(p) for layer in self.place if layer not in self._lost for p in layer.parameters}
            lost = [(p, reason) for layer, reason in layers.items() for p in layer.parameters if id(p) not in kept]
            self.refused = {**self.refused, **{names[id(parameter)]: reason for parameter, reason in lost}}
            self._told += [p for layer in layers if not isinstance(layer, SpreadOperation) for p in layer.parameters]
            self.tell(model, groups)

    @property
    def shown(self) -> dict[Layer, int]:
        """The place of each layer, but for those that others contain, such as a bias that belongs to its matrix."""
        kept = [layer for layer in self.place if layer not in self._lost]
        open_ = {layer for layer in self.place if layer in self._lost or not layer.settled}
        inside = {layer for layer in open_ for other in kept if _is_part(layer, other)}
        return {layer: place for layer, place in self.place.items() if layer not in inside}

    def covered(self) -> set[Tensor]:
        """Return the parameters of all assigned layers."""
        return {parameter for layer in self.place for parameter in layer.parameters}


def _homes(layers: Iterable[Layer], groups: Sequence[Mapping[str, Any]]) -> dict[Layer, int]:
    """Return the index of each layer's group; layers without a part in a group with metrics are omitted.

    Args:
        layers: layers in the order of the model.
        groups: all groups.

    Returns:
        The group of each layer's weight, or of another part if the weight is not given, in the order of the groups.
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


def _is_part(layer: Layer, other: Layer) -> bool:
    """Return whether the parameters of a layer are some of those of another one."""
    return layer.module is other.module and set(layer.names) < set(other.names)


def _not_owned(layer: Layer, groups: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    """Return the names of the layer's parameters that are in no group."""
    given = {id(parameter) for group in groups for parameter in group["params"]}
    found = dict(zip(layer.names, layer.parameters, strict=True))
    if not layer.settled:  # any parameter of its module may turn out to be one of its own
        found |= own_parameters(layer.module)
    return frozenset(name for name, parameter in found.items() if id(parameter) not in given)
