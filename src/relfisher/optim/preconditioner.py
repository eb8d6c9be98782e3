"""The metric without a step of its own: gradients are rewritten before any optimizer of torch uses them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.optim.assignment import FALLBACK, Rule, check_rules, rule_for
from relfisher.optim.curvature import HOST_KEYS, Curvature
from relfisher.optim.health import Health
from relfisher.optim.schedule import EARLY, Schedule
from relfisher.structures import Damping
from relfisher.subsystems import discover
from relfisher.validation import check_interval, check_positive

__all__ = ["Preconditioner"]


class Preconditioner:
    """Replaces the gradient M of each layer with a metric by (G + damping)^-1 M; other gradients stay as they are.

    Call `step()` after the backward pass, and after gradients were unscaled and clipped if they are, before the step of
    any optimizer. Samples count from one step to the next: where gradients flow back through the model that are not
    for its own step, as those of the generator through a discriminator, call `zero_grad()` before those that are.

    Args:
        model: as for `RNGD`, and so are the other arguments.
        damping: as for `RNGD`.
        structure: as for `RNGD`.
        structure_bytes: as for `RNGD`.
        decay: as for `RNGD`.
        stats_interval: as for `RNGD`.
        stats_samples: as for `RNGD`.
        refresh_interval: as for `RNGD`.
        early_refreshes: as for `RNGD`.
        grafted: True gives each layer's new gradient the norm of the old one, so that the optimizer's learning rate
            keeps its meaning.

    Raises:
        ValueError: if an argument lies outside what is allowed.
        TypeError: if `model` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float | Damping = 0.1,
        structure: Rule | Mapping[str, Rule] = "auto",
        structure_bytes: int = 256 << 20,
        decay: float = 0.995,
        stats_interval: int = 20,
        stats_samples: int | None = 256,
        refresh_interval: int = 200,
        early_refreshes: tuple[int, ...] = EARLY,
        grafted: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        check_interval("decay", decay, 0, 1)
        check_positive("structure_bytes", structure_bytes)
        if stats_samples is not None:
            check_positive("stats_samples", stats_samples)
        layers = discover(model).subsystems
        check_rules(structure, layers)
        for layer in layers:
            layer.rule = rule_for(layer, structure)
        self.health = Health()
        self._damping = damping if isinstance(damping, Damping) else Damping(damping)
        self._grafted = grafted
        self._iteration = 0
        self._curvature = Curvature(
            model,
            self.health,
            Schedule(stats_interval, refresh_interval, early_refreshes),
            decay=decay,
            unbiased=True,
            form="inverse",
            budget=structure_bytes,
            relu_omega=None,
            limit=stats_samples,
        )
        self._curvature.add([layer for layer in layers if layer.rule != FALLBACK])
        weakref.finalize(self, self._curvature.capture.close)

    @torch.no_grad()
    def step(self) -> None:
        """Rewrite the gradients in place; one that would not be finite stays as it is, and is counted in `health`."""
        self._curvature.update(self._iteration, lambda _: self._damping)
        for layer in self._curvature.layers:
            structure, gradient = layer.structure, layer.gradient()
            if structure is None or gradient is None:
                continue
            state = self._curvature.state(layer, structure)
            direction = structure.precondition(state, gradient.to(state["metric"].dtype))
            size = direction.norm()
            if not bool(torch.isfinite(size)):
                self.health.skipped(self._iteration, f"the preconditioned gradient of {layer.name} is not finite")
                continue
            if self._grafted:
                direction = direction * (gradient.norm() / size.clamp(min=torch.finfo(size.dtype).tiny))
            layer.replace_gradient(direction)
        self._iteration += 1
        self._curvature.advance(self._iteration)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the model, and the samples whose gradients they are.

        Args:
            set_to_none: as in torch.
        """
        model = self._curvature.model()
        if model is not None:
            model.zero_grad(set_to_none)
        self._curvature.capture.drop()

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Leave positions out of the statistics; see `RNGD.masked`.

        Args:
            mask: True for what counts.

        Yields:
            Nothing.
        """
        with self._curvature.capture.masked(mask):
            yield

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics by the name of their layer, and the iteration."""
        layers = {layer.name: dict(self._curvature.states[layer.weight]) for layer in self._curvature.layers}
        return {"iteration": self._iteration, "layers": layers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state and go on where it was saved.

        Args:
            state_dict: what `state_dict()` returned, for the same layers.

        Raises:
            ValueError: if it is of other layers.
        """
        mine, saved = {layer.name for layer in self._curvature.layers}, set(state_dict["layers"])
        if mine != saved:
            raise ValueError(
                f"state_dict is of other layers than these: it lacks {sorted(mine - saved)} and has "
                f"{sorted(saved - mine)} besides"
            )
        self._iteration = int(state_dict["iteration"])
        for layer in self._curvature.layers:
            state = self._curvature.states[layer.weight]
            state.clear()
            for key, value in state_dict["layers"][layer.name].items():
                state[key] = value.to(value.device if key in HOST_KEYS else layer.weight.device, copy=True)
        self._curvature.recall()
        self._curvature.advance(self._iteration)

    def close(self) -> None:
        """Take the hooks off the model; no statistics can be gathered any more."""
        self._curvature.capture.close()

    def __enter__(self) -> Preconditioner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Preconditioner:
        """Return the same for a copy of the model: the copy in the same `deepcopy`, where the model is in it."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for key, value in vars(self).items():
            setattr(twin, key, copy.deepcopy(value, memo))
        twin._curvature.states = copy.deepcopy(self._curvature.states, memo)
        weakref.finalize(twin, twin._curvature.capture.close)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a Preconditioner is tied to its model by hooks and cannot be pickled: save its state_dict(), make a new "
            "Preconditioner for the model and load the state there"
        )
