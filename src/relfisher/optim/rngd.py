"""Relative natural gradient descent: each layer moves along its own inverse metric. Section 5, equations (31)-(33)."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from relfisher.optim.assignment import assign
from relfisher.optim.fallback import adamw_step
from relfisher.responses import ReLUGaussian, SmoothReLUGaussian
from relfisher.structures import Damping, Structure
from relfisher.subsystems import Capture, LinearSubsystem, linear_subsystems
from relfisher.validation import check_interval, check_positive

__all__ = ["RNGD", "Health", "HealthWarning"]


class HealthWarning(UserWarning):
    """Something not finite, or singular, was kept away from the weights."""


@dataclass
class Health:
    """What went wrong so far and was kept away from the weights."""

    #: Steps left out since a gradient, or the step itself, was not finite.
    skipped_steps: int = 0
    #: Refreshes of a layer that could not be factorised, so that the last good inverse stayed in use.
    failed_refreshes: int = 0
    #: Batch metrics of a layer that were not finite, and were left out of the average.
    dropped_batches: int = 0


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
            its diagonal; a `Damping` gives another reference.
        trust_region: the bound on the squared metric length of a step; None for no bound.
        structure: "auto", "neuron" (exact blocks), "shared" or "published"; see `relfisher.optim.assign`.
        decay: the share of the moving average that is kept an iteration, in [0, 1).
        stats_interval: iterations from one update of the metric to the next.
        refresh_interval: iterations from one refresh of the inverse to the next.
        early_refreshes: iterations at which the inverse is refreshed besides.
        unbiased: True starts the moving average empty and corrects its bias; False starts it at the identity.
        relu_omega: the width of the smoothed ReLU whose information stands for a ReLU's, equation (18); None keeps the
            hard one, equation (16).
        fallback_lr: the learning rate of AdamW on parameters without a metric.
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
        for name, interval in [("stats_interval", stats_interval), ("refresh_interval", refresh_interval)]:
            check_interval(name, interval, 1, math.inf)
        for name, share in [
            ("momentum", momentum),
            ("decay", decay),
            *(("fallback_betas", beta) for beta in fallback_betas),
        ]:
            check_interval(name, share, 0, 1)
        check_interval("weight_decay", weight_decay, 0, math.inf)
        if trust_region is not None:
            check_positive("trust_region", trust_region)
        if relu_omega is not None:
            check_positive("relu_omega", relu_omega)
        assign(structure, [])
        self._damping = damping if isinstance(damping, Damping) else Damping(damping)
        self._trust_region = trust_region
        self._rule = structure
        self._decay = decay**stats_interval
        self._stats_interval = stats_interval
        self._refresh_interval = refresh_interval
        self._early_refreshes = frozenset(early_refreshes)
        self._unbiased = unbiased
        self._relu_omega = relu_omega

        self._layers = linear_subsystems(model)
        self._structures: dict[str, Structure] = {}
        # All layers are in the first group, where there are any.
        covered = [parameter for layer in self._layers for parameter in layer.parameters]
        others = [p for p in model.parameters() if p.requires_grad and not any(p is c for c in covered)]
        groups = [{"params": covered, "lr": lr}, {"params": others, "lr": fallback_lr}]
        defaults = {
            "momentum": momentum,
            "weight_decay": weight_decay,
            "fallback_lr": fallback_lr,
            "fallback_betas": fallback_betas,
            "iteration": 0,
        }
        super().__init__([group for group in groups if group["params"]], defaults)
        self.health = Health()
        self._capture = Capture(model, self._layers)
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
        `health.skipped_steps` counts it.

        Args:
            closure: evaluates the model and returns the loss; called first, with gradients enabled.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if gradients and not math.isfinite(get_total_norm(gradients)):
            self._skip("a gradient is not finite")
            return loss
        if not self._capture.discovered:
            self._discover()
        self._fold()
        if self._refresh_is_due():
            self._refresh()
        moves = self._moves()
        length = self._squared_length(moves)
        if not 0 <= length < math.inf:
            self._skip("the preconditioned step is not finite")
            return loss
        self._take(moves, length)
        self._take_fallback()
        self._advance()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state and go on where it was saved."""
        super().load_state_dict(state_dict)
        self._schedule_statistics()

    def close(self) -> None:
        """Take the hooks off the model; the optimizer cannot gather statistics any more."""
        self._capture.close()

    @property
    def _iteration(self) -> int:
        iteration: int = self.param_groups[0]["iteration"]
        return iteration

    def _discover(self) -> None:
        """Assign a structure to each layer that the first forward pass reached, and make its state."""
        reached = self._capture.discover()
        for layer, structure in zip(reached, assign(self._rule, reached), strict=True):
            response = layer.response
            if self._relu_omega is not None and isinstance(response, ReLUGaussian):
                layer.response = SmoothReLUGaussian(self._relu_omega, response.iota, response.sigma)
            self._structures[layer.name] = structure
            state = self.state[layer.weight]
            if "metric" not in state:
                state.update(structure.create(layer.weight, layer.out, layer.d, identity=not self._unbiased))
            elif tuple(state["metric"].shape) != structure.shape(layer.out, layer.d):
                raise ValueError(
                    f"the loaded metric of {layer.name!r} has shape {list(state['metric'].shape)}, but the structure "
                    f"{type(structure).__name__} needs {list(structure.shape(layer.out, layer.d))}: load it into an "
                    "optimizer with the same structure"
                )
        self._capture.keep(self._structures)
        missed = [layer.name for layer in self._layers if layer.name not in self._structures]
        if missed:
            self._warn(f"the forward pass did not call {', '.join(missed)}, which AdamW trains instead")

    def _fold(self) -> None:
        pending = self._capture.take()
        for layer in self._layers:
            batch = pending.get(layer.name)
            if batch is not None:
                structure, state = self._structures[layer.name], self.state[layer.weight]
                if not structure.update(state, batch.total, batch.samples, self._decay):
                    self.health.dropped_batches += 1
                    self._warn(f"the batch metric of {layer.name} is not finite and was left out")

    def _refresh_is_due(self) -> bool:
        return self._iteration in self._early_refreshes or self._iteration % self._refresh_interval == 0

    def _refresh(self) -> None:
        for layer in self._layers:
            structure = self._structures.get(layer.name)
            if structure is not None and not structure.refresh(self.state[layer.weight], self._damping):
                self.health.failed_refreshes += 1
                self._warn(f"the metric of {layer.name} could not be factorised; its last good inverse stays in use")

    def _moves(self) -> list[_Move]:
        """Return the direction of each layer that has a gradient; nothing is changed yet."""
        kept = self.param_groups[0]["momentum"]
        moves = []
        for layer in self._layers:
            structure = self._structures.get(layer.name)
            gradient = layer.gradient()
            if structure is None or gradient is None:
                continue
            state = self.state[layer.weight]
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
        return lr**2 * float(torch.stack(products).sum())

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

    def _take_fallback(self) -> None:
        """Step with AdamW on what has no metric, unreached layers included."""
        moved = {id(p) for layer in self._layers if layer.name in self._structures for p in layer.parameters}
        for group in self.param_groups:
            rest = [p for p in group["params"] if p.grad is not None and id(p) not in moved]
            if rest:
                lr = group["fallback_lr"] if group is self.param_groups[0] and self._layers else group["lr"]
                adamw_step(rest, [self.state[p] for p in rest], lr, group)

    def _advance(self) -> None:
        iteration = self._iteration + 1
        for group in self.param_groups:
            group["iteration"] = iteration
        self._schedule_statistics()

    def _schedule_statistics(self) -> None:
        self._capture.due = self._iteration % self._stats_interval == 0

    def _skip(self, reason: str) -> None:
        self._capture.drop()
        self.health.skipped_steps += 1
        self._warn(f"step skipped: {reason}")

    def _warn(self, message: str) -> None:
        warnings.warn(f"{message} (iteration {self._iteration}; counted in RNGD.health)", HealthWarning, 3)
