"""The running records of a model's layers: roles, structures and metrics. Nothing else writes them."""

from __future__ import annotations

import copy
import difflib
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from relfisher.layers import Layer
from relfisher.metric import Metric
from relfisher.observe import Observer, Reading, Responses, Role
from relfisher.optim.assignment import FALLBACK, Rule, assign
from relfisher.optim.health import Health, HealthWarning
from relfisher.optim.options import MetricOptions
from relfisher.optim.record import Record
from relfisher.structures import Inversion, Kept, State, Structure

__all__ = ["Curvature", "Owner"]


@runtime_checkable
class Owner(Protocol):
    """Whoever keeps tensors of a layer in its state, and declares them."""

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return what is kept of a layer of the shape [*g, out, d], by its key."""


class Curvature:
    """The metrics of some layers.

    Args:
        model: the module whose forward passes tell the metrics.
        health: where failures are counted.
        options: how metrics are kept.
        responses: of activations.
        root: True if the factors are roots of the inverse.
        owners: of other tensors in the layers' states, that are there from the start, such as the step rule's.
        optional: of tensors that may be there, such as the momentum.
        fallback: whoever trains parameters without a metric, and keeps tensors in the same states.

    Attributes:
        records: of the layers whose metrics are kept.
        states: one state a parameter; a layer's is that of its weight, or of the first parameter that is owned. Whoever
            saves and loads them may put another mapping here.
        observer: what watches the layers.
    """

    def __init__(
        self,
        model: nn.Module,
        health: Health,
        options: MetricOptions,
        responses: Responses,
        *,
        root: bool,
        owners: Sequence[Owner] = (),
        optional: Sequence[Owner] = (),
        fallback: Owner | None = None,
    ) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            count = torch.distributed.get_world_size()
            if count > 1:
                message = f"{count} processes would each keep a metric of their own samples, and so step apart"
                warnings.warn(message, HealthWarning, stacklevel=3)
        empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
        if empty is not None:
            raise ValueError(
                f"model must have its parameters in memory, but {empty} is on the meta device: make the optimizer "
                "after to_empty() and the initialization, which put other parameters into the model"
            )
        self.records: dict[Layer, Record] = {}
        self.states: MutableMapping[Tensor, dict[str, Any]] = defaultdict(dict)
        self.model = weakref.ref(model)
        self._health = health
        self._options = options
        self._schedule = options.schedule
        self._root = root
        self._owners = tuple(owners)
        self._optional = tuple(optional)
        self._fallback = fallback
        self.observer = Observer(model, responses, options.stats_samples)

    def __deepcopy__(self, memo: dict[int, Any]) -> Curvature:
        """Return the same for a copy of the model, with states that are still to be put there."""
        model = self.model()
        if model is None:
            raise TypeError("the model is gone, so that what watches it cannot be copied")
        twin = copy.copy(self)
        twin_model = copy.deepcopy(model, memo)
        twin.model = weakref.ref(twin_model)
        twin._health = copy.deepcopy(self._health, memo)
        twin.records = copy.deepcopy(self.records, memo)
        for record in twin.records.values():
            record.metric_in_use = None
        twin.states = defaultdict(dict)
        twin._owners = copy.deepcopy(self._owners, memo)
        twin.observer = self.observer.twin(twin_model, memo)
        return twin

    def add(
        self, layers: Iterable[Layer], rules: Mapping[Layer, Rule], not_owned: Mapping[Layer, frozenset[str]]
    ) -> None:
        """Keep the metrics of these layers, too; those that are trained have their state from now on.

        Args:
            layers: new ones.
            rules: by which their structures are chosen.
            not_owned: the parts of each that are not trained here, by attribute.
        """
        new = [layer for layer in layers if rules[layer] != FALLBACK]
        self.records.update({layer: Record(layer, rules[layer], not_owned.get(layer, frozenset())) for layer in new})
        self.observer.add(new)
        if self._options.bias_correction:  # else the average starts at the identity
            self.observer.uninitialized.update(new)
        for layer, structure in self._assigned({layer: Role(layer.own_response) for layer in new}).items():
            record = self.records[layer]
            if any(parameter.requires_grad for parameter in layer.parameters):
                self._create(record, structure)

    def disown(self, layer: Layer, not_owned: frozenset[str]) -> None:
        """Say which parts of a layer are not trained here; the state goes to the first part that is."""
        record = self.records[layer]
        before = record.key
        record.not_owned = not_owned
        if record.key is not before:
            old = self.states[before]
            moved = {key: old.pop(key) for key in old.keys() - self._fallback_keys(layer)}
            self.states[record.key].update(moved)

    def state(self, record: Record, structure: Structure) -> State:
        """Return a layer's state: made anew if it is for another structure or dtype and holds no statistics yet.

        Args:
            record: of the layer.
            structure: its own.

        Returns:
            The state, on the device of the layer's weight.

        Raises:
            ValueError: if the state is that of another structure, and holds statistics.
        """
        layer, state = record.layer, self.states[record.key]
        metric: Tensor | None = state.get("metric")
        device = layer.weight.device
        if metric is not None and metric is record.metric_in_use and metric.device == device:
            return state
        if metric is None:
            self._create(record, structure)
        elif not self._fits(layer, structure, state):
            if self._holds_something(state):
                mine = {key: kept.shape for key, kept in structure.declares(layer.shape, root=self._root).items()}
                held = {key: tuple(value.shape) for key, value in state.items() if key not in self._beside(layer)}
                raise ValueError(
                    f"the loaded metric of {layer.name!r} has the shapes {held}, but the structure "
                    f"{structure.label(layer.shape)!r} needs {mine}: load it into an optimizer with the same structure"
                )
            for key in state.keys() - self._beside(layer):
                del state[key]
            self._create(record, structure)
        elif metric.device != device:
            hosted = {key for key, kept in self.declares(record).items() if kept.on_host}
            state.update({key: value.to(device) for key, value in state.items() if key not in hosted})
        record.metric_in_use = state["metric"]
        return state

    def complete(self, layer: Layer, owners: Iterable[Owner]) -> None:
        """Add what owners keep of a layer to its state, if it has one: a frozen layer has none, and gets none."""
        state = self.states.get(self.records[layer].key, {})
        if "metric" in state:
            for owner in owners:
                for key, kept in owner.declares(layer.shape).items():
                    if key not in state:
                        state[key] = kept.zeros(layer.dtype, layer.weight.device)

    def metric(self, name: str) -> Metric:
        """Return the running metric of a layer without damping.

        Args:
            name: of the layer.

        Returns:
            The metric, of the layer's parameters [*groups, out, d].

        Raises:
            ValueError: if there is no such layer, or it has no statistics yet.
        """
        names = {layer.name: record for layer, record in self.records.items()}
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names)[:3]
            raise ValueError(f"name must be a layer with a metric, such as {', '.join(map(repr, near))}; got {name!r}")
        record = names[name]
        if record.structure is None or float(self.state(record, record.structure)["ema_weight"]) == 0:
            raise ValueError(f"the layer {name!r} has no statistics yet: take a step first")
        return record.structure.operator(self.state(record, record.structure), record.layer.shape)

    def update(self, iteration: int, inversion: Callable[[Record], Inversion]) -> None:
        """Add new statistics to the averages, and refresh the inverses that are due or have none yet.

        Args:
            iteration: counted from 0.
            inversion: of each layer.
        """
        roles = self.observer.resolve()
        if roles:
            self._settle(roles)
        pending = self.observer.take()
        for place, (layer, record) in enumerate(self.records.items()):
            batch, structure = pending.get(layer), record.structure
            due = self._schedule.refresh_due(iteration, place, len(self.records))
            trainable = record.trainable()
            changed = trainable != (record.trainable_before or trainable)
            if structure is None or not (batch or due or changed):
                continue
            state = self.state(record, structure)
            if trainable != record.trainable_before:
                record.trainable_before = trainable
                state["trainable"] = torch.tensor(trainable, dtype=torch.float32)
            first = batch is not None and float(state["ema_weight"]) == 0
            if batch is not None:
                if self.observer.readings[layer].average_in(layer, batch, state, self._options.ema_decay):
                    self.observer.uninitialized.discard(layer)
                else:
                    self._health.dropped(iteration, layer.name)
            if (due or first or changed) and not structure.refresh(state, inversion(record), record.frozen()):
                self._health.failed(iteration, layer.name)

    def recall(self) -> None:
        """Learn from loaded states which layers have statistics, which were heads, and which parts were trained.

        The gradients that told of a head may have become too small since to tell it again.
        """
        for layer, record in self.records.items():
            state = self.states[record.key]
            record.trainable_before = [bool(each) for each in state["trainable"]] if "trainable" in state else None
            if self._holds_something(state):
                self.observer.uninitialized.discard(layer)
                self.observer.heads[layer] = bool(state["is_head"])
            elif self._options.bias_correction:
                self.observer.uninitialized.add(layer)
            if record.structure is not None:
                self.state(record, record.structure)

    def advance(self, iteration: int) -> None:
        """Say which iteration is next."""
        modules = dict.fromkeys(layer.module for layer in self.records)  # its layers share what a call computes
        self.observer.due = {
            module
            for place, module in enumerate(modules)
            if self._schedule.statistics_due(iteration, place, len(modules))
        }

    def declares(self, record: Record) -> dict[str, Kept]:
        """Return everything that the state of a layer may hold, by key."""
        kept = {"trainable": Kept((len(record.layer.parts),), on_host=True, dtype=torch.float32)}
        kept["is_head"] = Kept((), on_host=True, dtype=torch.float32)
        for owner in (*self._owners, *self._optional):
            kept |= owner.declares(record.layer.shape)
        if record.structure is not None:
            kept |= record.structure.declares(record.layer.shape, root=self._root)
        return kept

    def tell_without_metric(self, iteration: int) -> None:
        """Say once of each layer that it has a gradient, but was never seen; at first, also which have none."""
        unseen = [record for record in self.records.values() if record.structure is None]
        unseen = [record for record in unseen if not self.observer.explains(record.layer)]
        for record in unseen:
            if record.layer.weight.grad is not None and not record.told_without_metric:
                record.told_without_metric = True
                message = f"{record.name} has a gradient but was not seen in a forward pass: AdamW trains it meanwhile"
                warnings.warn(message, HealthWarning, stacklevel=6)
        idle = ", ".join(record.name for record in unseen if record.is_idle)
        if iteration == 0 and idle:
            message = f"no part in the first step had {idle}: without a gradient, in no forward pass"
            warnings.warn(message, HealthWarning, stacklevel=6)

    def _settle(self, roles: Mapping[Layer, Role]) -> None:
        """Give layers whose role is new their structures; those that were refused lose their state."""
        for layer, role in roles.items():
            record = self.records[layer]
            record.role = role
            if role.refused is not None:
                record.structure = None
                self.observer.readings.pop(layer, None)
                state = self.states[record.key]
                for key in state.keys() - self._fallback_keys(layer):
                    del state[key]
        kept = {layer: role for layer, role in roles.items() if role.refused is None}
        for layer, structure in self._assigned(kept).items():
            record, role = self.records[layer], kept[layer]
            record.structure = structure
            self.observer.readings[layer] = Reading(structure, role.response)
            self.state(record, structure)["is_head"] = torch.tensor(float(bool(role.is_head)))

    def _assigned(self, roles: Mapping[Layer, Role]) -> dict[Layer, Structure]:
        rules = {layer: self.records[layer].rule for layer in roles}
        return assign(roles, rules, self._options.structure_bytes)

    def _create(self, record: Record, structure: Structure) -> None:
        """Give a layer a metric without statistics."""
        layer, identity, state = record.layer, not self._options.bias_correction, self.states[record.key]
        device = layer.weight.device
        state.update(structure.create(layer.shape, layer.dtype, device, identity=identity, root=self._root))
        state["trainable"] = torch.tensor(record.trainable(), dtype=torch.float32)
        state["is_head"] = torch.tensor(float(record.role is not None and bool(record.role.is_head)))
        self.complete(layer, self._owners)

    def _beside(self, layer: Layer) -> set[str]:
        """Return the keys in a layer's state that are not its structure's."""
        owners = (*self._owners, *self._optional)
        owned = (key for owner in owners for key in owner.declares(layer.shape))
        return {"trainable", "is_head", *owned, *self._fallback_keys(layer)}

    def _fallback_keys(self, layer: Layer) -> set[str]:
        return set() if self._fallback is None else set(self._fallback.declares(layer.shape))

    def _holds_something(self, state: State) -> bool:
        empty = float(not self._options.bias_correction)
        return "ema_weight" in state and float(state["ema_weight"]) > empty

    def _fits(self, layer: Layer, structure: Structure, state: State) -> bool:
        """Return whether a state is one of this structure, for the layer's shape and dtype."""
        wanted = structure.declares(layer.shape, root=self._root)
        return state.keys() - self._beside(layer) == wanted.keys() and all(
            state[key].shape == kept.shape and state[key].dtype == (kept.dtype or layer.dtype)
            for key, kept in wanted.items()
        )
