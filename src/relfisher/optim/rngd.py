"""Relative natural gradient descent: each layer moves along its own inverse metric. Section 5, equations (31)-(33)."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from relfisher.optim.assignment import FALLBACK, Rule, check_rules, rule_for
from relfisher.optim.averaging import Averaging, growing
from relfisher.optim.curvature import Curvature, state_key
from relfisher.optim.fallback import adamw_state, adamw_step
from relfisher.optim.groups import ADAMW, METRIC, check_names, check_options, check_shapes, named, names_of, split
from relfisher.optim.health import Health, HealthWarning
from relfisher.optim.rules import Move, StepRule
from relfisher.optim.rules.choice import DEFAULT_BOUND, rule_named
from relfisher.optim.schedule import EARLY, Schedule
from relfisher.structures import Damping
from relfisher.subsystems import Subsystem, discover
from relfisher.validation import check_interval, check_positive

__all__ = ["RNGD"]


class RNGD(torch.optim.Optimizer):
    """Relative natural gradient descent on every layer that has a metric, AdamW on all other parameters.

    A layer with gradient matrix M [out, d] moves along D = M (G + damping)^-1, where G is the running relative Fisher
    information metric of the layer. By default each layer's step has a fixed length, 0.2 lr in its root mean square,
    and the model's weights are kept near the average of all that the steps have led to (Defazio et al. 2024), which
    does what a schedule of learning rates would: it needs none, whatever the number of iterations.

    Which layers have a metric, which have none and why is told by `relfisher.coverage`. Each group of parameters is
    kept as two, one with a metric and one without. In the first, `lr`, `momentum`, `averaging`, `weight_decay`,
    `damping` and `structure` hold; a layer belongs to the group of its weight, or of its bias where that alone is
    given. In the second, the AdamW of `fallback_betas` and `weight_decay` runs with the group's `lr`, which is
    `fallback_lr` unless a group of such parameters alone has its own.

    Args:
        model: the module to train; its first training forward pass tells the responses of its layers.
        lr: the learning rate; None for the step rule's own.
        params: what to train, as for any optimizer of torch: parameters of the model, with or without names, or
            groups of them with options of their own; None for all parameters of the model.
        momentum: the share of the last step's momentum that is kept, in [0, 1). It is applied to the gradient, before
            the metric, so that the step rule sets the length of the step that is taken.
        averaging: the share of the average in the model's weights, in [0, 1); 0 for no average, and None for the step
            rule's own. An iterate weighs as much as the square of the highest learning rate so far, and those of the
            first 500 iterations less, in proportion to the square of their number.
        weight_decay: decoupled decay: parameters shrink by lr * weight_decay a step.
        damping: the multiple of the metric's mean eigenvalue (the mean trace over a layer's units) that is added to
            its diagonal; a `Damping` gives another reference. Batches of a few samples need 1e-2 or more.
        step_rule: "normalized" (of fixed length), "spectral" (of fixed length, all singular values alike in the
            metric) or "trust-region" (the natural gradient, of bounded length); "auto" for "spectral" where the model
            is one of language, of which the last `nn.Linear` scores as many tokens as the largest `nn.Embedding` looks
            up, else "normalized"; or an object of a class in `relfisher.optim.rules`.
        trust_region: the bound on the squared metric length of a layer's step, by the rule of this name; None for no
            bound. It is for the highest learning rate so far: a schedule that halves the rate halves the length.
        structure: "auto", "neuron" (exact blocks), "shared", "kronecker", "diagonal", "published" or "fallback"
            (AdamW); a `Structure`; or such rules by the name of a layer, a pattern of names or a class of modules, as
            in {"head": "kronecker", "encoder.*": "shared", "Embedding": "fallback"}. See `relfisher.optim.assign`.
            Embeddings keep the diagonal unless a rule by name, pattern or class says otherwise.
        structure_bytes: what the metric and the inverse of one layer may take where "auto" chooses.
        decay: the share of the moving average that is kept an iteration, in [0, 1).
        stats_interval: iterations from one update of the metric to the next.
        stats_samples: about so many samples (rows of a batch, positions of a sequence or an image) that a layer sees
            within a step go into its statistics at most, evenly spread over all of its calls; None for all. Batches
            accumulated give the sample of one large batch where a layer is called once a pass with samples first;
            others, as those in which positions come first, give another one of that size.
        refresh_interval: iterations from one refresh of the inverse to the next.
        early_refreshes: iterations at which the metric is updated and the inverse refreshed besides.
        unbiased: True starts the moving average empty and corrects its bias, and spreads the layers' updates and
            refreshes over the intervals, so that no step is slow; False starts it at the identity, and updates and
            refreshes all at once.
        relu_omega: the width of the smoothed ReLU whose information stands for a ReLU's, equation (18); None keeps the
            hard one, equation (16).
        fallback_lr: the learning rate of AdamW on parameters without a metric; schedulers that set the learning rate
            outright, as `OneCycleLR` does, take one value a group.
        fallback_betas: its decay rates.

    Raises:
        ValueError: if an argument lies outside what is allowed, or there is nothing to train.
        TypeError: if `model` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        params: Iterable[Any] | None = None,
        momentum: float = 0.0,
        averaging: float | None = None,
        weight_decay: float = 0.0,
        damping: float | Damping = 0.1,
        step_rule: str | StepRule = "auto",
        trust_region: float | None = DEFAULT_BOUND,
        structure: Rule | Mapping[str, Rule] = "auto",
        structure_bytes: int = 256 << 20,
        decay: float = 0.995,
        stats_interval: int = 20,
        stats_samples: int | None = 256,
        refresh_interval: int = 200,
        early_refreshes: tuple[int, ...] = EARLY,
        unbiased: bool = True,
        relu_omega: float | None = None,
        fallback_lr: float = 1e-3,
        fallback_betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}: RNGD needs to see the layers run; "
                "write RNGD(model), not RNGD(model.parameters())"
            )
        check_interval("decay", decay, 0, 1)
        for name, value in [("relu_omega", relu_omega), ("stats_samples", stats_samples)]:
            if value is not None:
                check_positive(name, value)
        check_positive("structure_bytes", structure_bytes)
        self._rule = rule_named(step_rule, trust_region, model)
        self._damping = damping if isinstance(damping, Damping) else Damping(damping)
        defaults = {
            "lr": self._rule.default_lr if lr is None else lr,
            "momentum": momentum,
            "averaging": self._rule.default_averaging if averaging is None else averaging,
            "weight_decay": weight_decay,
            "damping": self._damping.value,
            "fallback_lr": fallback_lr,
            "fallback_betas": tuple(fallback_betas),
            "iteration": 0,
        }
        check_options(defaults)
        layers = discover(model).subsystems
        check_rules(structure, layers)
        self._structure = structure
        self._model = weakref.ref(model)
        self.health = Health()
        self._schedule = Schedule(stats_interval, refresh_interval, early_refreshes, staggered=unbiased)
        self._curvature = Curvature(
            model,
            self.health,
            self._schedule,
            decay=decay,
            unbiased=unbiased,
            form=self._rule.form,
            budget=structure_bytes,
            relu_omega=relu_omega,
            limit=stats_samples,
        )
        self._known = layers
        self._place: dict[Subsystem, int] = {}  # the group of each layer
        self._without_metric: set[str] = set()
        self._complete = False
        super().__init__(list(model.parameters()) if params is None else params, defaults)
        self._complete = True
        self._settle()
        weakref.finalize(self, self._curvature.capture.close)

    @classmethod
    def as_published(cls, model: nn.Module, lr: float = 1e-2) -> RNGD:
        """Return the optimizer of the paper's section 5.2, equations (31)-(33), with its reference settings.

        The metric starts at the identity, is updated at every iteration with decay 0.995 and is inverted every
        T = 100, the first time at iteration 0, as G + 1e-4 trace(G) I: epsilon is then inside the moving average, as in
        (32). Hidden layers have exact neuron blocks, the first and the last layer the shared block; a ReLU unit has
        nu = sigm(z)^2. The step is plain gradient descent in that metric: no momentum, no bound.

        Args:
            model: the module to train.
            lr: the learning rate, which the paper chose from several.

        Returns:
            The optimizer.
        """
        return cls(
            model,
            lr,
            damping=Damping(1e-4, per_parameter=False, pooled=False),
            step_rule="trust-region",
            trust_region=None,
            structure="published",
            decay=0.995,
            stats_interval=1,
            stats_samples=None,
            refresh_interval=100,
            early_refreshes=(),
            unbiased=False,
            relu_omega=1.0,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train these parameters, too: along their metric where they are a layer's of the model, else with AdamW.

        Args:
            param_group: "params" and any options of this group; other options are the optimizer's own.

        Raises:
            ValueError: if an option lies outside what is allowed, or a parameter is in another group already.
            TypeError: if it is no group of tensors.
        """
        model = self._model()
        names = {} if model is None else names_of(model)
        if model is not None and self.param_groups:
            self._discover_again(model)
        rules = param_group.get("structure", self._structure) if isinstance(param_group, dict) else self._structure
        check_rules(rules, self._known)
        rest = [layer for layer in self._known if layer not in self._place]
        if isinstance(param_group, dict):
            param_group = {**param_group, "params": named(param_group["params"], names)}
            given = {id(parameter) for _, parameter in param_group["params"]}
            for layer in rest:
                if any(id(parameter) in given for parameter in layer.parameters):
                    layer.rule = rule_for(layer, rules)
        ruled = [layer for layer in self._known if layer.rule != FALLBACK]
        self._curvature.states = self.state
        for half in split(param_group, {id(p) for layer in ruled for p in layer.parameters}, names):
            self._add_half(half, [layer for layer in rest if layer.rule != FALLBACK])
        if self._complete:
            self._settle()

    def _settle(self) -> None:
        """Place layers of which all but the weight is given, and say what of each layer is not ours to move."""
        home = {parameter: place for place, group in enumerate(self.param_groups) for parameter in group["params"]}
        for layer in self._place:
            self._place[layer] = home.get(layer.weight, self._place[layer])
            self._curvature.hold(layer, frozenset(p for p in layer.parameters if p not in home))
        late = []
        for layer in self._known:
            place = next((home[parameter] for parameter in layer.parameters if parameter in home), None)
            if layer not in self._place and place is not None and self.param_groups[place]["kind"] == METRIC:
                self._place[layer] = place
                layer.held = frozenset(p for p in layer.parameters if p not in home)
                late.append(layer)
        self._curvature.add(late)
        for layer, place in self._place.items():
            state = self.state.get(state_key(layer), {})  # a frozen layer has none, and is to get none
            if "metric" not in state:
                continue
            if self.param_groups[place]["averaging"] and "lead" not in state:
                state["lead"] = state["metric"].new_zeros(layer.shape)
            state.update({key: value for key, value in self._rule.create().items() if key not in state})
        covered = {parameter for layer in self._place for parameter in layer.parameters}
        for parameter in home:
            if parameter.requires_grad and parameter not in covered and not self.state[parameter]:
                self.state[parameter].update(adamw_state(parameter))

    def _add_half(self, group: dict[str, Any], layers: Sequence[Subsystem]) -> None:
        """Add a group of parameters that all have a metric, or that all have none."""
        group.pop("structure", None)
        if group["kind"] == ADAMW:
            group.setdefault("lr", group.get("fallback_lr", self.defaults["fallback_lr"]))
        full = {**self.defaults, **group}
        check_options(full)
        if group["kind"] == METRIC:
            group["fallback_ratio"] = full["fallback_lr"] / float(full["lr"])
        else:
            group["fallback_ratio"] = 1.0
        group |= {"peak_lr": 0.0, "averaged": 0.0}
        if self.param_groups:
            group["iteration"] = self._iteration
        super().add_param_group(group)
        added = {id(parameter) for parameter in group["params"]}
        if group["kind"] == METRIC:
            mine = [layer for layer in layers if id(layer.weight) in added]
            self._place.update(dict.fromkeys(mine, len(self.param_groups) - 1))
            self._curvature.add(mine)

    def _discover_again(self, model: nn.Module) -> None:
        """Look for layers that the model has got since."""
        known = {id(layer.weight) for layer in self._known}
        self._known = [*self._known, *(new for new in discover(model).subsystems if id(new.weight) not in known)]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the parameters along their gradients' relative natural gradient.

        A step whose gradients are not finite is left out: weights, momentum and metric stay as they were, and
        `health.skipped_steps` counts it. So does a step that is itself not finite, which leaves the weights alone.

        Args:
            closure: evaluates the model and returns the loss; called first, with gradients enabled.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not _finite(self._unchecked()):
            self._curvature.capture.drop()
            self.health.skipped(self._iteration, "a gradient is not finite")
            return loss
        self._curvature.update(self._iteration, self._damping_of)
        moves = self._moves()
        if self._take(moves):
            self._take_fallback(moves)
        else:
            self.health.skipped(self._iteration, "the preconditioned step is not finite")
        iteration = self._iteration + 1
        for group in self.param_groups:
            group["iteration"] = iteration
        self._curvature.advance(iteration)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, and the samples whose gradients they are.

        Args:
            set_to_none: as in torch.
        """
        super().zero_grad(set_to_none)
        self._curvature.capture.drop()

    @contextmanager
    def masked(self, mask: Tensor) -> Iterator[None]:
        """Leave positions out of the statistics, such as padding, in forward passes inside this context.

        Args:
            mask: True for what counts. It applies to layers whose input has this leading shape, such as
                [batch, length] where inputs are [batch, length, in], or [batch]. Convolutions take it for images or
                output positions; recurrent layers and attention take [batch, length] also where their input is
                [length, batch, in]. A layer with positions that the mask does not fit is named in a warning.

        Yields:
            Nothing.
        """
        with self._curvature.capture.masked(mask):
            yield

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state and go on where it was saved.

        Args:
            state_dict: what `state_dict()` returned, of an optimizer with the same structures.

        Raises:
            ValueError: if it is another optimizer's, or of other parameters, or its metrics have other shapes.
        """
        for key in ("fallback_ratio", "peak_lr", "averaged"):
            if not all(key in group for group in state_dict["param_groups"]):
                raise ValueError(f"state_dict must be that of an RNGD optimizer, but its groups lack {key!r}")
        check_names(self.param_groups, state_dict["param_groups"])
        shapes = {state_key(layer): layer.shape for layer in self._place}
        check_shapes(self.param_groups, state_dict["param_groups"], state_dict["state"], shapes)
        super().load_state_dict(state_dict)
        self._curvature.states = self.state
        # The base class casts a state to the dtype of its parameter; the metric of a low-precision layer has its own.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, mine, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(self.state[parameter][key].device, copy=True)
        for layer in self._place:
            if layer.structure is not None:
                self._curvature.state(layer, layer.structure)
        self._curvature.recall()
        self._curvature.advance(self._iteration)

    def close(self) -> None:
        """Take the hooks off the model; the optimizer cannot gather statistics any more."""
        self._curvature.capture.close()

    def __enter__(self) -> RNGD:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> RNGD:
        """Return an optimizer for a copy of the model: the copy in the same `deepcopy`, where the model is in it."""
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        own = {key: copy.deepcopy(getattr(self, key), memo) for key in _COPIED}
        twin.__setstate__(own)
        twin._model = twin._curvature.model
        twin._curvature.states = twin.state
        weakref.finalize(twin, twin._curvature.capture.close)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an RNGD optimizer is tied to its model by hooks and cannot be pickled: save its state_dict(), make a new "
            "RNGD for the model and load the state there"
        )

    @property
    def _iteration(self) -> int:
        iteration: int = self.param_groups[0]["iteration"]
        return iteration

    def _group(self, layer: Subsystem) -> dict[str, Any]:
        group: dict[str, Any] = self.param_groups[self._place[layer]]
        return group

    def _unchecked(self) -> list[Tensor]:
        """Return the gradients that must be finite for all to go on.

        Where no statistics wait, what the step rule makes of the layers' gradients tells of those, and costs nothing.
        """
        waiting = self._curvature.capture.waiting
        known = set() if waiting else {id(p) for layer in self._place if layer.structure for p in layer.parameters}
        given = (p for group in self.param_groups for p in group["params"] if id(p) not in known)
        return [p.grad for p in given if p.grad is not None]

    def _damping_of(self, layer: Subsystem) -> Damping:
        return replace(self._damping, value=float(self._group(layer)["damping"]))

    def _moves(self) -> list[Move]:
        """Return the gradient and the metric of each layer that has both; no state is changed yet."""
        moves = []
        for group in self.param_groups:
            # A scheduler that begins low says how high it goes.
            highest = group.get("max_lr", group.get("initial_lr", 0.0))
            group["peak_lr"] = max(group["peak_lr"], float(group["lr"]), float(highest))
        for layer in self._place:
            structure, gradient = layer.structure, layer.gradient()
            if structure is None or gradient is None:
                continue
            group = self._group(layer)
            state = self._curvature.state(layer, structure)
            gradient = gradient.to(state["metric"].dtype)
            kept = group["momentum"]
            velocity = gradient
            if kept:
                last = state.get("momentum")
                velocity = gradient.clone() if last is None else gradient.add(last, alpha=kept)
                gradient = gradient.add(velocity, alpha=kept) if self._rule.nesterov else velocity
            lr = float(group["lr"])
            moves.append(Move(layer, structure, state, gradient, velocity, lr, lr / group["peak_lr"]))
        return moves

    def _take(self, moves: Sequence[Move]) -> bool:
        """Move the layers, or return False and leave all as it was if the step is not finite."""
        steps = self._rule.steps(moves)
        if steps is None:
            return False
        for index, group in enumerate(self.param_groups):
            if group["weight_decay"] and group["kind"] == METRIC:
                moved = {p for move in moves for p in move.layer.parameters if p.grad is not None}
                shrinking = [p for p in self.param_groups[index]["params"] if p in moved]
                if shrinking:
                    torch._foreach_mul_(shrinking, 1 - group["lr"] * group["weight_decay"])
        averages = [
            Averaging(group["averaging"], group["averaged"], self._weight(group)) for group in self.param_groups
        ]
        for move, step in zip(moves, steps, strict=True):
            place = self._place[move.layer]
            if self.param_groups[place]["momentum"]:
                move.state["momentum"] = move.velocity
            if self.param_groups[place]["averaging"]:
                lead = move.state["lead"] = _like(step.direction, move.state.get("lead"))
                move.layer.move(averages[place].change(step.direction, step.scale, lead), 1.0)
            else:
                move.layer.move(step.direction, -step.scale)
        for group in self.param_groups:
            group["averaged"] += self._weight(group)
        return True

    @staticmethod
    def _weight(group: Mapping[str, Any]) -> float:
        """Return the weight in the average of what the next step leads to."""
        weight: float = group["peak_lr"] ** 2 * growing(group["iteration"])
        return weight

    def _take_fallback(self, moves: Sequence[Move]) -> None:
        """Step with AdamW on what has a gradient but no metric."""
        moved = {id(parameter) for move in moves for parameter in move.layer.parameters}
        self._tell_without_metric()
        for group in self.param_groups:
            rest = [p for p in group["params"] if p.grad is not None and id(p) not in moved]
            if rest:
                adamw_step(rest, [self.state[p] for p in rest], group["lr"] * group["fallback_ratio"], group)

    def _tell_without_metric(self) -> None:
        """Say once of each layer that it has a gradient, but was never seen; at first, also which have none."""
        for layer in self._place:
            new = layer.structure is None and layer.weight.grad is not None and layer.name not in self._without_metric
            if new and not self._curvature.capture.explains(layer):
                self._without_metric.add(layer.name)
                message = f"{layer.name} has a gradient but was not seen in a forward pass: AdamW trains it meanwhile"
                warnings.warn(message, HealthWarning, stacklevel=5)
        if self._iteration == 0:
            unseen = [layer for layer in self._place if layer.structure is None and _is_idle(layer)]
            names = [layer.name for layer in unseen if not self._curvature.capture.explains(layer)]
            if names:
                message = f"no part in the first step had {', '.join(names)}: without a gradient, in no forward pass"
                warnings.warn(message, HealthWarning, stacklevel=5)


_COPIED = (
    "_curvature",  # first: it copies the model, and so all parameters
    "_complete",
    "defaults",
    "state",
    "param_groups",
    "health",
    "_damping",
    "_known",
    "_place",
    "_rule",
    "_schedule",
    "_structure",
    "_without_metric",
)


def _like(tensor: Tensor, kept: Tensor | None) -> Tensor:
    """Return what was kept in a tensor's dtype and on its device, or zeros where nothing was."""
    return torch.zeros_like(tensor) if kept is None else kept.to(tensor)


def _is_idle(layer: Subsystem) -> bool:
    """Return whether a layer is to be trained, but no part of it has a gradient."""
    free = [parameter for parameter in layer.parameters if parameter.requires_grad and parameter not in layer.held]
    return bool(free) and all(parameter.grad is None for parameter in free)


def _finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether all gradients are finite."""
    values = [gradient._values() if gradient.is_sparse else gradient for gradient in gradients]
    if not values or math.isfinite(get_total_norm(values)):
        return True
    # The norm of large finite values may overflow.
    return all(bool(torch.isfinite(gradient).all()) for gradient in values)
