"""The metric without a step rule: rewrite the gradients before any torch optimizer uses them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from relfisher.layers import discover
from relfisher.metric import Metric
from relfisher.observe import Responses, check_responses
from relfisher.optim.checkpoint import moved
from relfisher.optim.curvature import Curvature
from relfisher.optim.health import Health
from relfisher.optim.options import Damping, Inversions, MetricOptions
from relfisher.optim.partition import mesh_of
from relfisher.optim.renamed import reject
from relfisher.optim.watching import Watching
from relfisher.validation import check_bool, check_instance, check_integer

__all__ = ["Preconditioner"]


class Preconditioner(Watching):
    """Replaces the gradient M of each layer with a metric by (G + damping)^-1 M; other gradients are unchanged.

    Call `step()` after the backward pass and after any unscaling and clipping of gradients, but before the step of the
    optimizer. Samples are collected from one step to the next. If gradients that are not meant for this step flow back
    through the model, such as those of a generator through a discriminator, call `zero_grad()` before the backward
    passes that are.

    Args:
        model: as for `RNGD`.
        damping: as for `RNGD`.
        metric: the metric options.
        responses: as for `RNGD`.
        grafted: True rescales each layer's new gradient to the norm of the old one, so that the optimizer's learning
            rate keeps its meaning.
        **unknown: not allowed; the error for a renamed option says its new name.

    Raises:
        ValueError: if an argument is out of range.
        TypeError: if `model` is not a module, or an argument has the wrong type or is unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: Damping = 0.1,
        metric: MetricOptions = MetricOptions(),  # noqa: B008  # immutable
        responses: Responses | None = None,
        grafted: bool = False,
        **unknown: Any,
    ) -> None:
        reject("Preconditioner", unknown)
        check_instance("model", model, nn.Module)
        check_instance("metric", metric, MetricOptions)
        check_bool("grafted", grafted)
        check_responses(responses)
        mesh_of(model)  # flat parameters are no layers'
        layers = discover(model, metric.layers).layers
        metric.check(layers)
        self._inversions = Inversions(damping, metric.power)
        self._inversions.check(layers)
        self.health = Health()
        self._grafted = grafted
        self._iteration = 0
        self._curvature = Curvature(model, self.health, metric, responses or {}, root=False)
        self._curvature.add(layers, dict.fromkeys(layers, metric.structure), {})
        weakref.finalize(self, self._curvature.observer.close)

    def metric(self, name: str) -> Metric:
        """Return the running metric of a layer; see `RNGD.metric`."""
        return self._curvature.metric(name)

    @torch.no_grad()
    def step(self) -> None:
        """Rewrite the gradients in place. A result that is not finite is discarded and counted in `health`."""
        self._curvature.agree(None)
        self._curvature.update(
            self._iteration,
            lambda record: self._inversions.of(record.layer, record.role, self._inversions.default),
        )
        for record in self._curvature.records.values():
            structure, gradient = record.structure, record.gradient()
            if structure is None or gradient is None:
                continue
            state = self._curvature.state(record, structure)
            direction = structure.precondition(state, gradient.to(state["metric"].dtype))
            size = direction.norm()
            if not bool(torch.isfinite(size)):
                self.health.skipped(self._iteration, f"the preconditioned gradient of {record.name} is not finite")
                continue
            if self._grafted:
                direction = direction * (gradient.norm() / size.clamp(min=torch.finfo(size.dtype).tiny))
            record.replace_gradient(direction)
        self._iteration += 1
        self._curvature.advance(self._iteration)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the model's gradients, and discard the samples that belong to them.

        Args:
            set_to_none: as in torch.
        """
        model = self._curvature.model()
        if model is not None:
            model.zero_grad(set_to_none)
        self._curvature.observer.drop()

    def state_dict(self) -> dict[str, Any]:
        """Return the metrics by layer name, and the iteration."""
        records = self._curvature.records.values()
        layers = {record.name: dict(self._curvature.states[record.key]) for record in records}
        return {"iteration": self._iteration, "layers": layers}

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a saved state and continue from there.

        Args:
            state_dict: the result of `state_dict()`, for the same layers.

        Raises:
            ValueError: if it belongs to other layers.
        """
        if not isinstance(state_dict, Mapping) or not {"iteration", "layers"} <= state_dict.keys():
            raise ValueError("state_dict must be that of a Preconditioner, with its iteration and layers")
        check_integer("iteration", state_dict["iteration"], 0)
        records = self._curvature.records.values()
        mine, saved = {record.name for record in records}, set(state_dict["layers"])
        if mine != saved:
            raise ValueError(
                f"state_dict is of other layers: it lacks {sorted(mine - saved)} and has "
                f"{sorted(saved - mine)} in addition"
            )
        for record in records:
            self._curvature.ownership.check(record, state_dict["layers"][record.name])
        self._iteration = int(state_dict["iteration"])
        for record in records:
            state = self._curvature.states[record.key]
            state.clear()
            state.update(
                moved(state_dict["layers"][record.name], record.key, self._curvature.ownership.declares(record))
            )
        self._curvature.recall()
        self._curvature.advance(self._iteration)

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle needs, the model among it; it must be part of the same copy or pickle."""
        return {**vars(self), "states": self._curvature.states}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on with the copied model."""
        states = state.pop("states")
        vars(self).update(state)
        self._curvature.states = states
        weakref.finalize(self, self._curvature.observer.close)
