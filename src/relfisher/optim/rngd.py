"""Relative natural gradient descent: each layer moves along its own inverse metric. Section 5, equations (31)-(33)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, overload

import torch
from torch import Tensor, nn

from relfisher.metric import Metric
from relfisher.observe import Responses, check_responses
from relfisher.optim.averaging import Averaging
from relfisher.optim.binding import Binding
from relfisher.optim.budget import Budget, check_state_bytes
from relfisher.optim.checkpoint import loading, saving
from relfisher.optim.curvature import Curvature
from relfisher.optim.expected import is_trial
from relfisher.optim.fallback import Fallback
from relfisher.optim.groups import ADAMW, METRIC, OptionChecks, check_options, listed
from relfisher.optim.health import Health
from relfisher.optim.late import replaced
from relfisher.optim.leads import Lead
from relfisher.optim.lineup import Lineup
from relfisher.optim.momentum import Momentum
from relfisher.optim.options import AdamWOptions, Damping, Inversions, MetricOptions, fit_named
from relfisher.optim.owners import model_of
from relfisher.optim.published import PUBLISHED
from relfisher.optim.record import LayerView, Record
from relfisher.optim.renamed import reject
from relfisher.optim.rounding import check_state_dtype
from relfisher.optim.rules import StepRule
from relfisher.optim.rules.choice import rule_named
from relfisher.optim.sharing import check_replicate
from relfisher.optim.stepping import moving_layers, obstacle, take
from relfisher.optim.watching import Watching
from relfisher.structures import Inversion
from relfisher.validation import check_instance

__all__ = ["RNGD"]


class RNGD(Watching, torch.optim.Optimizer):
    """Relative natural gradient descent for all layers that have a metric, AdamW for all other parameters.

    A layer with gradient matrix M [out, d] moves in its relative Fisher information metric G. By default its step has
    equal singular values in the metric; each unit moves by lr, and further while gradients agree. Between steps the
    model holds the average of the last tenth of all iterates, which replaces a learning-rate schedule: evaluate and
    save it as it is. Passes in training mode with gradients run at the last iterate, which they put into the model.

    `relfisher.coverage` reports which layers have a metric, and why the others have none. Each parameter group is split
    into one with metrics, where `lr`, `momentum` and `damping` apply, and one without, where AdamW runs with
    `fallback_betas`, `fallback_eps` and `lr`: `fallback.lr` unless a group has such parameters alone and its own `lr`.
    A layer belongs to the group of its weight, or of its bias if only that is given. A scheduler that sets learning
    rates to absolute values, such as `OneCycleLR`, needs one value per resulting group.

    Args:
        model: the module to train; its first training forward pass determines the responses of its layers. Where a
            program calls the optimizer with parameters, or groups of them, their module is found in memory, and named.
        lr: the learning rate, a number or a tensor of one number on the CPU, which may change in place; None for the
            step rule's default.
        params: the parameters of the model to train, as for any torch optimizer, with or without names, or groups of
            them with their own options; None for all.
        fit: "generalize" for noisy data, where validation matters; "interpolate" for functions and equations, where
            the training loss is the accuracy; "plain" for neither; None for the step rule's default. It sets other
            defaults, which `relfisher.optim.options.FITS` lists.
        total_steps: the length of the run, over which learning rates decay to 0 by a cosine; None for no decay.
        momentum: the share of the momentum that is kept per step, in [0, 1); None for the step rule's default. It is
            applied to the gradient, before the metric, so that the step rule determines the length of the step.
        averaging: the last share of the run that is averaged, in [0, 1]; 0 for no average, None for the step rule's
            default. See `relfisher.optim.averaging`. Half precision is too coarse for it and has none.
        weight_decay: parameters shrink by lr * weight_decay per step. None for that of `fit`, without softmax heads.
        damping: the multiple of the metric's mean eigenvalue (averaged over a layer's units) that is added to its
            diagonal; an `Inversion` for another unit; or either of these by layer, as in {"first": 10.0}, with keys as
            in `MetricOptions`. Batches of a few samples need 1e-2 or more.
        step_rule: "spectral" (equal singular values in the metric), "normalized" (along the natural gradient, with
            fixed length), "trust-region" (the natural gradient with bounded length) or the name of a registered rule;
            or a `StepRule`, such as `TrustRegion(bound)`.
        metric: the metric options.
        responses: responses by activation, which take precedence over registered and built-in ones, as in
            {nn.ReLU: SmoothReLUGaussian(1.0)}.
        fallback: the AdamW options for parameters without a metric.
        replicate: for several processes: True if each keeps all metrics and computes all steps; False if they share
            this out between them, layer by layer; None to do so after `fully_shard`. See docs/distributed.md.
        state_bytes: the most bytes that the whole state may take, but for a few scalars, or a multiple of those of
            Adam's two moments, such as "1x adam". Structures that are "auto" are fitted into it: the largest metrics
            get sketches of lower rank, then shared blocks, then diagonals. None for no limit. See `relfisher.plan`.
        state_dtype: torch.bfloat16 keeps the momentum and the average in half of their memory, rounded by chance so
            that the mean error is 0; None for single precision, or double for double. See `relfisher.optim.rounding`.
        **unknown: not allowed; the error for a renamed option says its new name.

    Raises:
        ValueError: if an argument is out of range, or there are no parameters, or the state cannot be as small as
            `state_bytes`; so does the first step if some layers turn out to have no metric.
        TypeError: if an argument has the wrong type or is unknown.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        params: Iterable[Any] | None = None,
        fit: str | None = None,
        total_steps: int | None = None,
        momentum: float | None = None,
        averaging: float | None = None,
        weight_decay: float | None = None,
        damping: Damping | None = None,
        step_rule: str | StepRule = "spectral",
        metric: MetricOptions = MetricOptions(),  # noqa: B008  # immutable
        responses: Responses | None = None,
        fallback: AdamWOptions = AdamWOptions(),  # noqa: B008  # immutable
        replicate: bool | None = None,
        state_bytes: float | str | None = None,
        state_dtype: torch.dtype | None = None,
        **unknown: Any,
    ) -> None:
        reject("RNGD", unknown)
        self._found: nn.Module | None = None
        if not isinstance(model, nn.Module):
            if params is not None:
                raise TypeError(f"model must be a torch.nn.Module if params are given, got {type(model).__name__}")
            params = entries = listed(model, "model must be a torch.nn.Module, or its parameters")
            model = self._found = model_of(entries)  # nothing else may hold a list of several models
        check_instance("metric", metric, MetricOptions)
        check_instance("fallback", fallback, AdamWOptions)
        check_responses(responses)
        check_state_bytes(state_bytes)
        check_state_dtype(state_dtype)
        self._rule = rule_named(step_rule)
        usual = fit_named(self._rule.default_fit if fit is None else fit)
        self._inversions = Inversions(usual.damping if damping is None else damping, metric.power, usual.raw_power)
        defaults = {
            "lr": self._rule.default_lr if lr is None else lr,
            "momentum": self._rule.default_momentum if momentum is None else momentum,
            "averaging": self._rule.default_averaging if averaging is None else averaging,
            "weight_decay": usual.weight_decay if weight_decay is None else weight_decay,
            "decays_heads": weight_decay is not None,
            "total_steps": total_steps,
            "damping": self._inversions.default,
            "fallback_lr": fallback.lr,
            "fallback_betas": tuple(fallback.betas),
            "fallback_eps": fallback.eps,
            "iteration": 0,
        }
        check_options(defaults)
        self._binding = Binding(model, metric, fallback.max_share)
        self._inversions.check(self._binding.known)
        self.health = Health()
        self._lead = Lead(state_dtype)
        self._curvature = Curvature(
            model,
            self.health,
            metric,
            responses or {},
            root=self._rule.needs_root,
            owners=(self._rule,),
            optional=(Momentum(state_dtype),),
            beside=(self._lead, Fallback),
            is_flat=self._inversions.is_flat,
            replicate=check_replicate(replicate, self._rule),
            state_dtype=state_dtype,
        )
        self._state_bytes = state_bytes
        self._limit()
        self._complete = False
        super().__init__(listed(model.parameters() if params is None else params), defaults)
        self._complete = True
        self._settle()
        self._release()

    @classmethod
    def as_published(cls, model: nn.Module, lr: float = 1e-2) -> RNGD:
        """Return the optimizer of the paper's section 5.2, equations (31)-(33), with its reference settings.

        The metric starts at the identity, is updated at every iteration with decay 0.995, and is inverted every T = 100
        iterations from iteration 0 on, as G + 1e-4 trace(G) I: epsilon is inside the moving average, as in (32). Hidden
        layers use exact neuron blocks, the first and the last layer the shared block; a ReLU unit has nu = sigm(z)^2.
        The step is plain gradient descent in this metric, without momentum or bound.

        Args:
            model: the module to train.
            lr: the learning rate, which the paper selected from several values.

        Returns:
            The optimizer.
        """
        return cls(model, lr, **PUBLISHED)

    @property
    def layers(self) -> tuple[LayerView, ...]:
        """The layers that have a metric, or will have one, with their roles, structures and groups."""
        records, model = self._curvature.records, self._curvature.model()
        inside = None if model is None else set(model.modules())
        return tuple(
            LayerView(layer.name, records[layer].role, records[layer].structure, place)
            for layer, place in self._binding.shown.items()
            if inside is None or layer.module in inside  # it may have been replaced by another
        )

    def metric(self, name: str) -> Metric:
        """Return the running metric G of a layer, as one linear operator without damping.

        Args:
            name: the name of the layer, as in `layers`.

        Returns:
            A metric of the layer's parameters [*groups, out, d], bias last.

        Raises:
            ValueError: if there is no such layer, it has no statistics yet, or another process keeps them.
        """
        return self._curvature.metric(name)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to train: with their metric if they belong to a layer of the model, otherwise with AdamW.

        Args:
            param_group: "params" and any options of this group; other options default to the optimizer's.

        Raises:
            ValueError: if an option is out of range, or a parameter is already in another group.
            TypeError: if it is not a group of tensors.
        """
        self._curvature.states = self.state
        for half in self._binding.halves(param_group, self._curvature.model(), again=bool(self.param_groups)):
            self._add_half(half)
        if self._complete:
            self._settle()

    def _add_half(self, group: dict[str, Any]) -> None:
        """Add a group whose parameters all have a metric, or all have none."""
        if group["kind"] == ADAMW:
            group.setdefault("lr", group.get("fallback_lr", self.defaults["fallback_lr"]))
        group.setdefault("decays_heads", "weight_decay" in group or self.defaults["decays_heads"])
        full = {**self.defaults, **group}
        check_options(full)
        group["fallback_ratio"] = full["fallback_lr"] / (float(full["lr"]) or 1.0) if group["kind"] == METRIC else 1.0
        group |= {"peak_lr": 0.0, "averaged": 0, "at_iterate": False}
        if self.param_groups:
            group["iteration"] = self._iteration
        super().add_param_group(group)

    def _settle(self) -> None:
        """Assign layers to groups, update which parts of each are not owned, and complete the states."""
        new, not_owned = self._binding.settle(self.param_groups)
        for layer in not_owned.keys() - set(new):
            self._curvature.disown(layer, not_owned[layer])
        self._curvature.add(new, self._binding.rules, not_owned)
        for layer, place in self._binding.place.items():
            if self.param_groups[place]["momentum"]:
                self._curvature.complete(layer, self._curvature.ownership.optional)
        covered = self._binding.covered()
        for group in self.param_groups:
            Fallback.complete(group, self.state, covered)
            self._lead.complete(group, self.state)
        self._binding.tell(self._curvature.model(), self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters along their relative natural gradients.

        A step with non-finite gradients is skipped: weights, momentum and metric are unchanged, and
        `health.skipped_steps` counts it. So is a step that is not finite itself, after an update of the metric. Between
        updates of the metric the host does not wait for the device, so that the warning comes with the next update.

        Args:
            closure: evaluates the model and returns the loss; it is called first, with gradients enabled.

        Returns:
            The result of the closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._catch_up()
        if is_trial(self.param_groups, self._curvature):
            return loss
        problem = self._curvature.agree(obstacle(self._curvature, self.param_groups, self._checks))
        if problem is not None:
            self._curvature.observer.drop()
            self._averaging.skip()
            self.health.skipped(self._iteration, problem)
            return loss
        if self._curvature.observer.waiting:
            self.health.settle()
        refused = self._curvature.update(self._iteration, self._inversion_of)
        self._binding.refuse(refused, self._curvature.model(), self.param_groups)
        self._lineup.settle(self._binding.place, self.param_groups)
        moving = moving_layers(self._lineup, self._curvature, self.param_groups, self._rule)
        rule = self._curvature.sharing.rule(self._rule, self._curvature.events)
        with self._averaging.stepping() as count:
            outcome = take(moving, self._lineup, self.param_groups, rule, self.state, self._curvature.sharing)
            count(outcome)
        self.health.follow(self._iteration, outcome)
        self._curvature.tell_without_metric(self._iteration)
        iteration = self._iteration + 1
        for group in self.param_groups:
            group["iteration"] = iteration
        self._curvature.advance(iteration)
        return loss

    def average(self) -> AbstractContextManager[None]:
        """Return a context with the average in the model, for an evaluation between a backward pass and its step.

        Between a step and the next training pass it is there anyway. Between a forward pass and its backward pass
        autograd refuses weights that have moved.
        """
        return self._averaging.inside()

    def close(self) -> None:
        """Put the average into the model, and remove the hooks from it; the statistics no longer change."""
        self._averaging.close()
        super().close()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, and discard the samples that belong to them.

        Args:
            set_to_none: as in torch.
        """
        super().zero_grad(set_to_none)
        self._curvature.observer.drop()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of all parameters, and the groups with their progress.

        If several processes share out the work, all of them must ask for it.
        """
        self._catch_up()
        with saving(self, self._curvature):
            return super().state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        """Load a saved state and continue from there.

        Args:
            state_dict: the result of `state_dict()` of an optimizer with the same structures.

        Raises:
            ValueError: if it belongs to another kind of optimizer or other parameters, or if metrics have other shapes.
        """
        self._catch_up()
        with loading(self, self._curvature, state_dict):
            super().load_state_dict(state_dict)
        self._averaging.loaded()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle needs, the model among it; it must be part of the same copy or pickle."""
        return {key: getattr(self, key) for key in _COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on with the copied model."""
        super().__setstate__(state)
        if "_curvature" in state:
            self._curvature.states = self.state
            self._limit()
            self._release()

    def _catch_up(self) -> None:
        """Train the parameters that the model has, if it was sharded since it was given."""
        if replaced(self.param_groups, self._curvature):
            self._averaging.close()
            self.state.clear()
            self._settle()
            self._release()

    def _release(self) -> None:
        """Hook the average to the model, and arrange the end of all hooks with that of the optimizer."""
        self._averaging, self._checks = Averaging(self._curvature.model(), self, self._lead), OptionChecks()
        self._lineup = Lineup(self._curvature, self._inversions, self._rule)
        for hooked in (self._averaging, self._curvature.observer):
            weakref.finalize(self, hooked.close)

    def _limit(self) -> None:
        """Let the structures of layers fit into the limit of the state."""
        if self._state_bytes is not None:
            self._curvature.budget = Budget(self, self._binding, self._state_bytes, self._lead)

    @property
    def _iteration(self) -> int:
        return int(self.param_groups[0]["iteration"])

    def _inversion_of(self, record: Record) -> Inversion:
        group = self.param_groups[self._binding.place[record.layer]]
        return self._inversions.of(record.layer, record.role, float(group["damping"]))


_COPIED = (
    "_curvature",  # first, since it copies the model and thus all parameters
    "_binding",
    "_found",
    "_complete",
    "defaults",
    "state",
    "param_groups",
    "health",
    "_inversions",
    "_rule",
    "_state_bytes",
    "_lead",
)
