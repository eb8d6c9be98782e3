"""Relative natural gradient descent: each layer moves along its own inverse metric. Section 5, equations (31)-(33)."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from relfisher.optim.assignment import assign
from relfisher.optim.fallback import adamw_step
from relfisher.optim.health import Health, HealthWarning
from relfisher.optim.schedule import Schedule
from relfisher.responses import ReLUGaussian, SmoothReLUGaussian
from relfisher.structures import Damping, State, Structure
from relfisher.subsystems import Capture, LinearSubsystem, linear_subsystems
from relfisher.validation import check_interval, check_positive

__all__ = ["RNGD"]


class _Move(NamedTuple):
    """A layer's step before it is taken."""

    layer: LinearSubsystem
    momentum: Tensor
    direction: Tensor


class RNGD(torch.optim.Optimizer):
    """Relative natural gradient descent on the linear layers of a model, AdamW on all other parameters.

    A layer with gradient matrix M [out, in + 1] moves along D = M (G + damping)^-1, where G is the running relative
    Fisher information metric of the layer. The whole step is then scaled so that its squared length in the metric,
    lr^2 sum <D, M> over the layers, is at most `trust_region`.

    Args:
        model: the module to train; its first training forward pass tells the responses of its layers.
        lr: the learning rate.
        momentum: the share of the last step's momentum that is kept, in [0, 1). It is applied to the gradient, before
            the metric, so that the trust region bounds the step that is taken.
        weight_decay: decoupled decay: parameters shrink by lr * weight_decay a step.
        damping: the multiple of the metric's mean eigenvalue (the mean trace over a layer's units) that is added to
            its diagonal; a `Damping` gives another reference. Batches of a few samples need 1e-2 or more.
        trust_region: the bound on the squared metric length of a step; None for no bound.
        structure: "auto", "neuron" (exact blocks), "shared" or "published"; see `relfisher.optim.assign`.
        decay: the share of the moving average that is kept an iteration, in [0, 1).
        stats_interval: iterations from one update of the metric to the next.
        refresh_interval: iterations from one refresh of the inverse to the next.
        early_refreshes: iterations at which the inverse is refreshed besides.
        unbiased: True starts the moving average empty and corrects its bias; False starts it at the identity.
        relu_omega: the width of the smoothed ReLU whose information stands for a ReLU's, equation (18); None keeps the
            hard one, equation (16).
        fallback_lr: the learning rate of AdamW on parameters without a metric, in a group of their own; schedulers that
            set the learning rate outright, as `OneCycleLR` does, take one value a group.
        fallback_betas: its decay rates.

    Raises:
        ValueError: if an argument lies outside what is allowed, or the model has nothing to train.
        TypeError: if `model` is not a module.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.3,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        damping: float | Damping = 0.1,
        trust_region: float | None = 1e-2,
        structure: str = "auto",
        decay: float = 0.995,
        stats_interval: int = 5,
        refresh_interval: int = 100,
        early_refreshes: tuple[int, ...] = (0, 5, 10, 20, 50),
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
        for name, value in [("lr", lr), ("fallback_lr", fallback_lr)]:
            check_positive(name, value)
        beta1, beta2 = fallback_betas
        for name, share in [("momentum", momentum), ("decay", decay), *[("fallback_betas", b) for b in (beta1, beta2)]]:
            check_interval(name, share, 0, 1)
        check_interval("weight_decay", weight_decay, 0, math.inf)
        if trust_region is not None:
            check_positive("trust_region", trust_region)
        if relu_omega is not None:
            check_positive("relu_omega", relu_omega)
        assign(structure, [])
        self._schedule = Schedule(stats_interval, refresh_interval, early_refreshes)
        self._damping = damping if isinstance(damping, Damping) else Damping(damping)
        self._trust_region = trust_region
        self._decay = decay**stats_interval
        self._unbiased = unbiased

        self._layers = linear_subsystems(model)
        own = [parameter for layer in self._layers for parameter in layer.parameters]
        known = {id(parameter) for parameter in own}
        others = [parameter for parameter in model.parameters() if id(parameter) not in known]
        groups: list[dict[str, Any]] = [
            # All layers are in the first group, where there are any.
            {"params": own, "lr": float(lr), "fallback_ratio": fallback_lr / lr},
            {"params": others},
        ]
        defaults = {
            "lr": fallback_lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "fallback_ratio": 1.0,
            "fallback_betas": fallback_betas,
            "iteration": 0,
        }
        super().__init__([group for group in groups if group["params"]], defaults)
        self.health = Health()
        self._without_metric: set[str] = set()
        self._capture = Capture(model, self._layers, partial(_choose, structure, relu_omega))
        weakref.finalize(self, self._capture.close)

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
            trust_region=None,
            structure="published",
            decay=0.995,
            stats_interval=1,
            refresh_interval=100,
            early_refreshes=(),
            unbiased=False,
            relu_omega=1.0,
        )

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
        if not _finite([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]):
            self._capture.drop()
            self.health.skipped(self._iteration, "a gradient is not finite")
            return loss
        self._update_metrics()
        moves = self._moves()
        length = self._squared_length(moves)
        if 0 <= length < math.inf:
            self._take(moves, length)
            self._take_fallback(moves)
        else:
            self.health.skipped(self._iteration, "the preconditioned step is not finite")
        self._advance()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state and go on where it was saved.

        Args:
            state_dict: what `state_dict()` returned, of an optimizer with the same structures.

        Raises:
            ValueError: if it is another optimizer's, or its metrics have other shapes.
        """
        if not all("fallback_ratio" in group for group in state_dict["param_groups"]):
            raise ValueError("state_dict must be that of an RNGD optimizer, but its groups lack 'fallback_ratio'")
        super().load_state_dict(state_dict)
        # The base class casts a state to the dtype of its parameter; the metric of a low-precision layer has its own.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        mine = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, mine, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][key] = value.to(self.state[parameter][key].device, copy=True)
        for layer in self._layers:
            if layer.structure is not None:
                self._state(layer, layer.structure)
        self._capture.due = self._schedule.statistics_due(self._iteration)

    def close(self) -> None:
        """Take the hooks off the model; the optimizer cannot gather statistics any more."""
        self._capture.close()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "an RNGD optimizer is tied to its model by hooks and cannot be copied or pickled: copy the model, make a "
            "new RNGD for it and load this one's state_dict()"
        )

    @property
    def _iteration(self) -> int:
        iteration: int = self.param_groups[0]["iteration"]
        return iteration

    def _state(self, layer: LinearSubsystem, structure: Structure) -> State:
        """Return a layer's state, made now if it is new."""
        state: State = self.state[layer.weight]
        if "metric" not in state:
            state.update(structure.create(layer.weight, layer.out, layer.d, identity=not self._unbiased))
        wanted = structure.shape(layer.out, layer.d)
        if tuple(state["metric"].shape) != wanted:
            raise ValueError(
                f"the loaded metric of {layer.name!r} has shape {list(state['metric'].shape)}, but the structure "
                f"{type(structure).__name__} needs {list(wanted)}: load it into an optimizer with the same structure"
            )
        return state

    def _update_metrics(self) -> None:
        """Fold what was gathered into the averages, and refresh the inverses that are due or have none yet."""
        pending = self._capture.take()
        due = self._schedule.refresh_due(self._iteration)
        for layer in self._layers:
            batch, structure = pending.get(layer), layer.structure
            if structure is None or not (batch or due):
                continue
            state = self._state(layer, structure)
            first = batch is not None and float(state["mass"]) == 0
            if batch is not None and not structure.update(state, batch.total, batch.samples, self._decay):
                self.health.dropped(self._iteration, layer.name)
            if (due or first) and not structure.refresh(state, self._damping):
                self.health.failed(self._iteration, layer.name)

    def _moves(self) -> list[_Move]:
        """Return the direction of each layer that has a gradient and a metric; nothing is changed yet."""
        kept = self.param_groups[0]["momentum"]
        moves = []
        for layer in self._layers:
            structure, gradient = layer.structure, layer.gradient()
            if structure is None or gradient is None:
                continue
            state = self._state(layer, structure)
            gradient = gradient.to(state["inverse"].dtype)
            if kept:
                last = state.get("momentum")
                gradient = gradient.clone() if last is None else gradient.add(last, alpha=kept)
            moves.append(_Move(layer, gradient, structure.precondition(state, gradient)))
        return moves

    def _squared_length(self, moves: list[_Move]) -> float:
        """Return lr^2 sum <D, M>, the squared length of the whole step in the damped metric, equation (10)."""
        if not moves:
            return 0.0
        products = [torch.sum(move.direction * move.momentum) for move in moves]
        lr: float = self.param_groups[0]["lr"]
        return float(lr) ** 2 * float(torch.stack([product.to(products[0].device) for product in products]).sum())

    def _take(self, moves: list[_Move], length: float) -> None:
        group, bound = self.param_groups[0], self._trust_region
        scale = 1.0 if bound is None or length <= bound else math.sqrt(bound / length)
        for move in moves:
            if group["weight_decay"]:
                for parameter in move.layer.parameters:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["momentum"]:
                self.state[move.layer.weight]["momentum"] = move.momentum
            move.layer.move(move.direction, -group["lr"] * scale)

    def _take_fallback(self, moves: list[_Move]) -> None:
        """Step with AdamW on what has a gradient but no metric."""
        moved = {id(parameter) for move in moves for parameter in move.layer.parameters}
        self._tell_without_metric()
        for group in self.param_groups:
            rest = [p for p in group["params"] if p.grad is not None and id(p) not in moved]
            if rest:
                adamw_step(rest, [self.state[p] for p in rest], group["lr"] * group["fallback_ratio"], group)

    def _tell_without_metric(self) -> None:
        """Say once of each layer that it has a gradient, but was never seen in a forward pass."""
        for layer in self._layers:
            new = layer.structure is None and layer.weight.grad is not None and layer.name not in self._without_metric
            if new:
                self._without_metric.add(layer.name)
                message = f"{layer.name} has a gradient but was not seen in a forward pass: AdamW trains it meanwhile"
                warnings.warn(message, HealthWarning, stacklevel=5)

    def _advance(self) -> None:
        iteration = self._iteration + 1
        for group in self.param_groups:
            group["iteration"] = iteration
        self._capture.due = self._schedule.statistics_due(iteration)


def _choose(rule: str, relu_omega: float | None, layers: list[LinearSubsystem]) -> list[Structure]:
    """Return the structures of layers; a ReLU's information is smoothed where that is asked for."""
    for layer in layers:
        if relu_omega is not None and isinstance(layer.response, ReLUGaussian):
            layer.response = SmoothReLUGaussian(relu_omega, layer.response.iota, layer.response.sigma)
    return assign(rule, layers)


def _finite(gradients: Sequence[Tensor]) -> bool:
    """Return whether all gradients are finite.

    Raises:
        ValueError: if one is sparse.
    """
    if any(gradient.is_sparse for gradient in gradients):
        raise ValueError("RNGD needs dense gradients, got a sparse one: make the embedding with sparse=False")
    if not gradients or math.isfinite(get_total_norm(gradients)):
        return True
    # The norm of large finite values may overflow.
    return all(bool(torch.isfinite(gradient).all()) for gradient in gradients)
