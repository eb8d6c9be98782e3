"""The running metrics of a model's layers: gathered as forward passes go by, refreshed when that is due."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.optim.assignment import assign
from relfisher.optim.health import Health, HealthWarning
from relfisher.optim.schedule import Schedule
from relfisher.responses import ReLUGaussian, SmoothReLUGaussian
from relfisher.structures import Damping, Form, State, Structure
from relfisher.subsystems import Capture, Subsystem

__all__ = ["HOST_KEYS", "Curvature", "state_key"]


class Curvature:
    """The metrics of some layers.

    Args:
        model: the module whose forward passes tell the metrics.
        health: where failures are counted.
        schedule: when what is due.
        decay: the share of the moving average that is kept an iteration.
        unbiased: True starts the average empty, False at the identity.
        form: how inverses are kept.
        budget: bytes for the metric and inverse of a layer that chooses its structure itself.
        relu_omega: the width of the smoothed ReLU that stands for a ReLU; None for the hard one.
        limit: about so many samples of a layer and step go into its statistics at most; None for all.

    Attributes:
        layers: whose metrics are kept.
        states: one state a parameter; a layer's is that of its weight, or of the first parameter that is not held.
            Whoever saves and loads them may put another mapping here.
    """

    def __init__(
        self,
        model: nn.Module,
        health: Health,
        schedule: Schedule,
        *,
        decay: float,
        unbiased: bool,
        form: Form,
        budget: int,
        relu_omega: float | None,
        limit: int | None,
    ) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            count = torch.distributed.get_world_size()
            if count > 1:
                message = f"{count} processes would each keep a metric of their own samples, and so step apart"
                warnings.warn(message, HealthWarning, stacklevel=3)
        self.layers: list[Subsystem] = []
        self.states: MutableMapping[Tensor, dict[str, Any]] = defaultdict(dict)
        self.model = weakref.ref(model)
        self._limit = limit
        self._health = health
        self._schedule = schedule
        self._decay = decay**schedule.stats_interval
        self._unbiased = unbiased
        self._form: Form = form
        self._choose = partial(_choose, budget, relu_omega)
        self._moving: dict[Subsystem, list[bool]] = {}
        self._fitting: dict[Subsystem, Tensor] = {}  # the metric of a state that was found to fit its layer
        self.capture = Capture(model, self._choose, limit)

    def __deepcopy__(self, memo: dict[int, Any]) -> Curvature:
        """Return the same for a copy of the model, with states that are still to be put there."""
        model = self.model()
        if model is None:
            raise TypeError("the model is gone, so that what watches it cannot be copied")
        twin = copy.copy(self)
        twin_model = copy.deepcopy(model, memo)
        twin.model = weakref.ref(twin_model)
        twin._health = copy.deepcopy(self._health, memo)
        twin.layers = copy.deepcopy(self.layers, memo)
        twin.states = defaultdict(dict)
        twin._moving = copy.deepcopy(self._moving, memo)
        twin._fitting = {}
        twin.capture = Capture(twin_model, self._choose, self._limit)
        twin.capture.add(twin.layers)
        twin.capture.due = copy.deepcopy(self.capture.due, memo)
        twin.capture.empty = copy.deepcopy(self.capture.empty, memo)
        return twin

    def add(self, layers: Sequence[Subsystem]) -> None:
        """Keep the metrics of these layers, too; those that are trained have their state from now on."""
        self.layers.extend(layers)
        self.capture.add(layers)
        if self._unbiased:  # else the identity is where the average starts
            self.capture.empty.update(layers)
        for layer, structure in zip(layers, self._choose(layers), strict=True):
            if any(parameter.requires_grad for parameter in layer.parameters):
                self.states[state_key(layer)].update(self._create(layer, structure))

    def hold(self, layer: Subsystem, held: frozenset[nn.Parameter]) -> None:
        """Say which parameters of a layer are not for us to move.

        Args:
            layer: one of the layers.
            held: its parameters that stay.
        """
        before = state_key(layer)
        layer.held = held
        if state_key(layer) is not before:
            old = self.states[before]
            self.states[state_key(layer)].update({key: old.pop(key) for key in old.keys() - _ADAMW_KEYS})

    def state(self, layer: Subsystem, structure: Structure) -> State:
        """Return a layer's state: made anew if it is for another structure or dtype and holds nothing yet.

        Args:
            layer: one of the layers.
            structure: its own.

        Returns:
            The state, on the device of the layer's weight.

        Raises:
            ValueError: if the state is that of another structure, and not empty.
        """
        state = self.states[state_key(layer)]
        metric = state.get("metric")
        fitting = self._fitting.get(layer)
        if fitting is not None and fitting.device == layer.weight.device and fitting is metric:
            return state
        if metric is None:
            state.update(self._create(layer, structure))
        elif not self._fits(layer, structure, state):
            if self._holds_something(state):
                held = {key: tuple(value.shape) for key, value in state.items() if key not in _BESIDES}
                raise ValueError(
                    f"the loaded metric of {layer.name!r} has the shapes {held}, but the structure "
                    f"{structure.label(layer.shape)!r} needs {structure.layout(layer.shape, self._form)}: load it into "
                    "an optimizer with the same structure"
                )
            for key in [key for key in state if key not in _STEPS]:
                del state[key]
            state.update(self._create(layer, structure))
        elif metric.device != layer.weight.device:
            state.update({key: value.to(layer.weight.device) for key, value in state.items() if key not in HOST_KEYS})
        self._fitting[layer] = state["metric"]
        return state

    def update(self, iteration: int, damping: Callable[[Subsystem], Damping]) -> None:
        """Fold what was gathered into the averages, and refresh the inverses that are due or have none yet.

        Args:
            iteration: counted from 0.
            damping: of each layer.
        """
        pending = self.capture.take()
        while self.capture.refused:
            state = self.states[state_key(self.capture.refused.pop())]
            for key in state.keys() - _ADAMW_KEYS:
                del state[key]
        for place, layer in enumerate(self.layers):
            batch, structure = pending.get(layer), layer.structure
            due = self._schedule.refresh_due(iteration, place, len(self.layers))
            moving = layer.moving()
            changed = moving != self._moving.get(layer, moving)
            if structure is None or not (batch or due or changed):
                continue
            state = self.state(layer, structure)
            if moving != self._moving.get(layer):
                self._moving[layer] = moving
                state["moving"] = _flags(moving)
            first = batch is not None and float(state["mass"]) == 0
            if batch is not None:
                if layer.fold(batch, structure, state, self._decay):
                    self.capture.empty.discard(layer)
                else:
                    self._health.dropped(iteration, layer.name)
            if (due or first or changed) and not structure.refresh(state, damping(layer), layer.frozen()):
                self._health.failed(iteration, layer.name)

    def recall(self) -> None:
        """Learn from loaded states which layers have a metric, which were softmax heads, and which parts moved.

        The gradients that told of a head may have become too small since to tell it again.
        """
        self._moving.clear()
        for layer in self.layers:
            state = self.states[state_key(layer)]
            if "moving" in state:
                self._moving[layer] = [bool(each) for each in state["moving"].tolist()]
            if self._holds_something(state):
                self.capture.empty.discard(layer)
            elif self._unbiased:
                self.capture.empty.add(layer)
            if layer.structure is None and layer.rule == "auto" and self._holds_something(state):
                layer.is_head = "output" in state

    def advance(self, iteration: int) -> None:
        """Say which iteration is next."""
        modules = dict.fromkeys(layer.module for layer in self.layers)  # what its layers have in common is found once
        self.capture.due = {
            module
            for place, module in enumerate(modules)
            if self._schedule.statistics_due(iteration, place, len(modules))
        }

    def _create(self, layer: Subsystem, structure: Structure) -> State:
        state = structure.create(layer.weight, layer.shape, identity=not self._unbiased, form=self._form)
        return {**state, "moving": _flags(layer.moving())}

    def _holds_something(self, state: State) -> bool:
        return "mass" in state and float(state["mass"]) > float(not self._unbiased)

    def _fits(self, layer: Subsystem, structure: Structure, state: State) -> bool:
        """Return whether a state is one of this structure, for the layer's shape and dtype."""
        layout = structure.layout(layer.shape, self._form)
        dtype = torch.promote_types(layer.weight.dtype, torch.float32)
        return state.keys() - _BESIDES == layout.keys() and all(
            state[key].shape == shape and state[key].dtype == dtype for key, shape in layout.items()
        )


#: What the state of a weight holds where AdamW trained it.
_ADAMW_KEYS = frozenset(["step", "exp_avg", "exp_avg_sq"])

#: What steps keep there, whatever the structure.
_STEPS = _ADAMW_KEYS | {"momentum", "lead", "sizes"}

#: What it holds besides the metric and its inverse.
_BESIDES = _STEPS | {"mass", "moving"}

#: What is read by the host at each iteration, and stays there.
HOST_KEYS = frozenset(["mass", "moving", "sizes"])


def _flags(moving: Sequence[bool]) -> Tensor:
    """Return for each part of a layer whether it moves; what it was at the last refresh is saved."""
    return torch.tensor(moving, dtype=torch.float32)


def state_key(layer: Subsystem) -> Tensor:
    """Return the parameter that a layer's state is kept with: one that is given, since torch saves no others."""
    return next((parameter for parameter in layer.parameters if parameter not in layer.held), layer.weight)


def _choose(budget: int, relu_omega: float | None, layers: Sequence[Subsystem]) -> list[Structure]:
    """Return the structures of layers; a ReLU's information is smoothed where that is asked for."""
    for layer in layers:
        if relu_omega is not None and isinstance(layer.response, ReLUGaussian):
            layer.response = SmoothReLUGaussian(relu_omega, layer.response.iota, layer.response.sigma)
    return assign(layers, budget)
