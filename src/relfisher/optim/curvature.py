"""The records of a model's layers: roles, structures and running metrics. No other module writes them."""

from __future__ import annotations

import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.layers import Layer
from relfisher.metric import Metric
from relfisher.observe import Observer, Reading, Responses, Role
from relfisher.optim.assignment import FALLBACK, Rules, choices, rule_for
from relfisher.optim.budget import Budget
from relfisher.optim.events import DROPPED, FAILED, Events
from relfisher.optim.health import Health, HealthWarning
from relfisher.optim.options import MetricOptions
from relfisher.optim.ownership import Owner, Ownership
from relfisher.optim.ranks import Ranks
from relfisher.optim.record import Record, gathered, named
from relfisher.optim.refreshing import Refresh, failed
from relfisher.optim.sharing import Sharing
from relfisher.optim.turns import Turns
from relfisher.structures import Inversion, State, Structure

__all__ = ["Curvature"]


class Curvature:
    """The metrics of some layers.

    Args:
        model: the module whose forward passes determine the metrics.
        health: the counter of failures.
        options: the metric options.
        responses: responses by activation.
        root: True if the factors are roots of the inverse.
        owners: owners of further tensors in the layers' states that exist from the start, such as the step rule.
        optional: owners of tensors that may exist, such as the momentum.
        beside: owners of tensors of single parameters, which are in the same states.
        is_flat: returns whether the metric leaves the gradient of a layer as it is.
        replicate: as for `Sharing`.
        state_dtype: as for `Sharing`.

    Attributes:
        records: the records of the layers with a metric.
        states: one state per parameter; a layer's state is that of its weight, or else of its first owned parameter.
            Code that saves and loads states may replace this mapping.
        observer: the observer of the layers.
        ranks: the processes that train the model together.
        sharing: which of them keeps the metric of which layer.
        events: what happened to layers in the last update.
        ownership: who keeps which tensors in the states.
        budget: the limit of the whole state; None for none.
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
        beside: Sequence[Owner] = (),
        is_flat: Callable[[Layer, Role], bool] | None = None,
        replicate: bool | None = True,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
        if empty is not None:
            raise ValueError(
                f"model must have its parameters in memory, but {empty} is on the meta device: make the optimizer "
                "after to_empty() and the initialization, which put other parameters into the model"
            )
        self.records: dict[Layer, Record] = {}
        self.states: MutableMapping[Tensor, dict[str, Any]] = defaultdict(dict)
        self.model = weakref.ref(model)
        self._options = options
        self._schedule = options.schedule
        self._turns = Turns()
        self._is_flat = is_flat
        self.ownership = Ownership(root=root, owners=owners, optional=optional, beside=beside)
        self.observer = Observer(model, responses, options.stats_samples)
        self.ranks = Ranks(model)
        self.sharing = Sharing(self.ranks, replicate, state_dtype)
        self.events = Events(health, self.observer)
        self.budget: Budget | None = None
        self._required: list[bool] = []  # of all parameters, as of the last update that looked at what is trained

    def __getstate__(self) -> dict[str, Any]:
        """Return everything but the states and the budget, which belong to the optimizer."""
        return {key: value for key, value in vars(self).items() if key not in ("states", "model", "budget")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on with the copied model; the states must be set afterwards."""
        vars(self).update(state)
        self.model = self.observer.model
        self.states = defaultdict(dict)
        self.budget = None
        for record in self.records.values():
            record.metric_in_use = None

    def add(
        self, layers: Iterable[Layer], rules: Mapping[Layer, Rules], not_owned: Mapping[Layer, frozenset[str]]
    ) -> None:
        """Keep the metrics of additional layers; trainable layers get their state at once.

        Args:
            layers: new layers.
            rules: the rules among which those are that choose their structures, as for `rule_for`.
            not_owned: the names of the parameters of each layer that this optimizer does not train.
        """
        new = [layer for layer in layers if rule_for(layer, rules[layer]) != FALLBACK]
        records = {layer: Record(layer, rules[layer], not_owned.get(layer, frozenset())) for layer in new}
        self.ownership.check_keys([*self.records.values(), *records.values()])
        self.records.update(records)
        structures = self.assigned({layer: Role(layer.own_response) for layer in new})
        self.observer.add(new)
        if self._options.bias_correction:  # otherwise the average starts at the identity
            self.observer.uninitialized.update(new)
        self._turns.add(structures)
        self._provide(structures)

    def _provide(self, structures: Mapping[Layer, Structure]) -> None:
        """Create or replace the states of layers that have yet to run."""
        for layer, structure in structures.items():
            record = self.records[layer]
            trained = any(parameter.requires_grad for parameter in layer.parameters)
            shaped = layer.settled or layer.operation is None
            if record.structure is None and shaped and not self.sharing.wanted and trained:
                self.state(record, structure)
                record.metric_in_use = None  # another structure may follow

    def disown(self, layer: Layer, not_owned: frozenset[str]) -> None:
        """Set the parameters of a layer that this optimizer does not own, and move the state to the first owned one."""
        record = self.records[layer]
        before = record.key
        record.not_owned, self._required = not_owned, []
        if record.key is not before:
            old = self.states[before]
            moved = {key: old.pop(key) for key in old.keys() - self.ownership.keys_beside(layer)}
            self.states[record.key].update(moved)

    def state(self, record: Record, structure: Structure) -> State:
        """Return a layer's state; replace it if it has another structure or dtype but no statistics yet.

        Args:
            record: the record of the layer.
            structure: its structure.

        Returns:
            The state, on the device of the layer's weight.

        Raises:
            ValueError: if the state belongs to another structure and has statistics.
        """
        layer, state = record.layer, self.states[record.key]
        metric: Tensor | None = state.get("metric")
        device, dtype = layer.weight.device, layer.weight.dtype
        if (
            metric is not None
            and metric is record.metric_in_use
            and metric.device == device
            and (metric.dtype == dtype or dtype.itemsize < 4)  # as `layer.dtype`, which is an operation
        ):
            return state
        if metric is None:
            self._create(record, structure)
        elif not self.ownership.fits(layer, structure, state):
            if self.ownership.holds_statistics(state):
                raise self.ownership.mismatch(record, [structure], state)
            optional = self.ownership.present(layer, state)
            for key in state.keys() - self.ownership.keys_beside(layer):
                del state[key]
            self._create(record, structure)
            self.complete(layer, optional)
        elif metric.device != device:
            hosted = {key for key, kept in self.ownership.declares(record).items() if kept.on_host}
            state.update({key: value.to(device) for key, value in state.items() if key not in hosted})
        record.metric_in_use = state["metric"]
        return state

    def complete(self, layer: Layer, owners: Iterable[Owner]) -> None:
        """Add the owners' tensors to a layer's state, if it has one; frozen layers have no state."""
        state = self.states.get(self.records[layer].key, {})
        if "metric" in state:
            for owner in owners:
                for key, kept in owner.declares(layer.shape).items():
                    if key not in state:
                        state[key] = kept.zeros(layer.dtype, layer.weight.device)

    def metric(self, name: str) -> Metric:
        """Return the running metric of a layer, without damping.

        Args:
            name: the name of the layer.

        Returns:
            The metric of the layer's parameters [*groups, out, d].

        Raises:
            ValueError: if there is no such layer, it has no statistics yet, or another process keeps them.
        """
        self.ranks.settle()
        record = named(self.records.values(), name)
        if not self.sharing.owns(record.layer):
            owner = self.sharing.owner[record.layer]
            raise ValueError(f"the metric of {name!r} is kept by process {owner}: ask there, or use replicate=True")
        structure = record.structure or self.ownership.fitting(record, self.states[record.key])
        if structure is None or not self.ownership.holds_statistics(self.state(record, structure)):
            raise ValueError(f"the layer {name!r} has no statistics yet: take a step first")
        return structure.operator(self.state(record, structure), record.layer.shape)

    def agree(self, problem: str | None) -> str | None:
        """Return why this step cannot be taken by this process or another that trains the model; None if it can.

        Args:
            problem: why this process cannot take it; None if it can.

        Raises:
            ValueError: if processes have different layers or states.
        """
        joins, owner = self.ranks.together is None, self.sharing.owner
        kept = (record for layer, record in self.records.items() if layer not in owner)
        if not self.ranks.join(lambda: self.ownership.listed(kept, self.states)):
            if owner:  # a copy trains alone, without what other processes keep
                self.sharing.end()
                self.recall()
            return problem
        if joins:
            self._share({layer: each.structure for layer, each in self.records.items() if each.structure is not None})
        (fine,) = self.ranks.least([int(problem is None)])
        return None if fine else problem or "another process cannot take it"

    def update(self, iteration: int, inversion: Callable[[Record], Inversion]) -> dict[Layer, str]:
        """Add new statistics to the moving averages, and refresh the inverses that are due or do not exist yet.

        Args:
            iteration: the iteration, counted from 0.
            inversion: returns the inversion of a layer.

        Returns:
            The layers that turned out to have no metric, with the reasons.
        """
        roles = self.observer.resolve()
        if self.ranks.together:
            unknown = [layer for layer, record in self.records.items() if record.role is None]
            roles = self.ranks.roles(roles, unknown, self.records)
        if roles:
            self._settle(roles)
        pending = self.ranks.pending(self.observer, self.sharing.owner)
        self.events.begin(iteration, pending)
        turns = self._turns.refreshes
        turns = [own for place, own in enumerate(turns) if self._schedule.refresh_due(iteration, place, len(turns))]
        required = [parameter.requires_grad for layer in self.records for parameter in layer.parameters]
        if not (roles or pending or turns) and required == self._required:
            return {}
        self._required = required
        refreshed = {layer for own in turns for layer in own}
        refreshes: list[Refresh] = []
        for layer, record in self.records.items():
            batch, structure, due = pending.get(layer), record.structure, layer in refreshed
            trainable = record.trainable()
            changed = trainable != (record.trainable_before or trainable)
            if structure is None or not (batch or due or changed):
                continue
            self.events.possible = True
            if not self.sharing.owns(layer):
                record.trainable_before = trainable
                continue
            state = self.state(record, structure)
            if trainable != record.trainable_before:
                record.trainable_before = trainable
                state["trainable"] = torch.tensor(trainable, dtype=torch.float32)
            first = batch is not None and float(state["ema_weight"]) == 0
            if batch is not None:
                reading = self.observer.readings[layer]
                if not reading.average_in(layer, batch, state, self._options.ema_decay):
                    self.events.note(layer, DROPPED)
            if (due or first or changed) and any(trainable) and float(state["ema_weight"]):
                refreshes.append(Refresh(record, structure, state, inversion(record)))
        for layer in failed(refreshes):
            self.events.note(layer, FAILED)
        if not self.sharing.active:
            self.events.count(self.events.own)
        return {layer: role.refused for layer, role in roles.items() if role.refused is not None}

    def _share(self, structures: Mapping[Layer, Structure]) -> None:
        """Let layers have owners if the work is shared out; the others keep nothing of them."""
        if self.sharing.active:
            self.sharing.assign(structures)
            self.unload(structures)

    def unload(self, layers: Iterable[Layer]) -> None:
        """Remove what other processes keep of some layers."""
        for layer in layers:
            if not self.sharing.owns(layer):
                self._remove(layer)

    def _remove(self, layer: Layer) -> None:
        """Remove the state of a layer."""
        state = self.states[self.records[layer].key]
        for key in state.keys() - self.ownership.keys_beside(layer):
            del state[key]

    def whole_gradients(self) -> AbstractContextManager[None]:
        """Return a context in which layers with a metric have whole gradients; see `gathered`."""
        if not self.ranks.in_parts:
            return nullcontext()
        return gathered(self.records.values(), self.sharing.returned, self.ranks.group)

    def recall(self) -> None:
        """Restore from loaded states which layers have statistics, which are heads, and which parts were trained.

        The gradients that identified a head may have become too small to identify it again.
        """
        self._required = []
        for layer, record in self.records.items():
            state = self.states[record.key]
            record.trainable_before = [bool(each) for each in state["trainable"]] if "trainable" in state else None
            if self.ownership.holds_statistics(state):
                self.observer.uninitialized.discard(layer)
                is_head = self.observer.heads[layer] = bool(state["is_head"])
                role = record.role
                if role is not None and role.is_head is not None and role.is_head != is_head:
                    role = self.observer.roles[layer] = replace(role, is_head=is_head)
                    self._settle({layer: role})
            elif self._options.bias_correction:
                self.observer.uninitialized.add(layer)
            if record.structure is not None:
                self.state(record, record.structure)

    def advance(self, iteration: int) -> None:
        """Set the next iteration."""
        turns = self._turns.statistics
        due = [own for place, own in enumerate(turns) if self._schedule.statistics_due(iteration, place, len(turns))]
        self.observer.due = {module for own in due for module in own}

    def tell_without_metric(self, iteration: int) -> None:
        """Warn once per layer that has a gradient but was never seen and, at iteration 0, about layers with neither."""
        unseen = [record for record in self.records.values() if record.structure is None]
        if not unseen:
            return
        unseen = [record for record in unseen if not self.observer.explains(record.layer)]
        for record in unseen:
            if record.layer.weight.grad is not None and not record.told_without_metric:
                record.told_without_metric = True
                seen = "not seen in a forward pass outside of torch.func transforms"
                message = f"{record.name} has a gradient but was {seen}: AdamW trains it for now"
                warnings.warn(message, HealthWarning, stacklevel=6)
        idle = ", ".join(record.name for record in unseen if record.is_idle)
        if iteration == 0 and idle:
            message = f"no part in the first step had {idle}: without a gradient, in no forward pass"
            warnings.warn(message, HealthWarning, stacklevel=6)

    def _settle(self, roles: Mapping[Layer, Role]) -> None:
        """Assign structures to layers with new roles, and remove the states of refused layers."""
        for layer, role in roles.items():
            record = self.records[layer]
            record.role = self.observer.roles[layer] = role
            if role.refused is not None:
                record.structure = None
                self.observer.readings.pop(layer, None)
                self.observer.uninitialized.discard(layer)
                self.sharing.forget(layer)
                self._remove(layer)
        kept = {layer: role for layer, role in roles.items() if role.refused is None}
        structures = self.assigned(kept)
        self._share({layer: structures[layer] for layer in kept})
        self._provide({layer: each for layer, each in structures.items() if layer not in kept})
        for layer in kept:
            structure = structures[layer]
            layer.settle(layer.parts, layer.shape)
            record, role = self.records[layer], kept[layer]
            record.structure = structure
            waits = self.ranks.in_parts and role.following is not None
            self.observer.readings[layer] = Reading(structure, role.response, waits)
            if self.sharing.owns(layer):
                self.state(record, structure)["is_head"] = torch.tensor(float(bool(role.is_head)))

    def assigned(self, roles: Mapping[Layer, Role]) -> dict[Layer, Structure]:
        """Return the structures of layers with these roles; if the state has a limit, also of those without a role."""
        if self.budget is None:
            return {layer: found[0] for layer, found in self.allowed(roles).items()}
        return self.budget.assigned(roles, self.records, self.allowed, self.ownership, self.states)

    def allowed(self, roles: Mapping[Layer, Role]) -> dict[Layer, list[Structure]]:
        """Return the structures that layers with these roles may use, the best first."""
        rules = {layer: self.records[layer].rule for layer in roles}
        found = choices(roles, rules, self._options.structure_bytes, self._is_flat)
        return found if self.budget is not None else {layer: each[:1] for layer, each in found.items()}

    def _create(self, record: Record, structure: Structure) -> None:
        """Create the state of a metric without statistics."""
        layer, identity, state = record.layer, not self._options.bias_correction, self.states[record.key]
        device = layer.weight.device
        state.update(structure.create(layer.shape, layer.dtype, device, identity=identity, root=self.ownership.root))
        state["trainable"] = torch.tensor(record.trainable(), dtype=torch.float32)
        state["is_head"] = torch.tensor(float(record.role is not None and bool(record.role.is_head)))
        self.complete(layer, self.ownership.owners)
