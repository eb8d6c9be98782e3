"""The optimizers of the race on equations, each with a grid of six configurations, and how a run paces them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relfisher import RNGD, MetricOptions
from relfisher.optim.residual import ResidualRNGD
from relfisher.studies.contestants import Muon
from relfisher.studies.peers import Peer, installed
from relfisher.studies.physics.gauss_newton import GaussNewton
from relfisher.studies.physics.task import Closure
from relfisher.studies.training import Pace

__all__ = ["LIMIT", "METHODS", "OURS", "RATE", "RESIDUAL", "UNTUNED", "Method"]

LIMIT = "Gauss-Newton"
RESIDUAL = "ResidualRNGD"
RATE = "ResidualRNGD-rate"
UNTUNED = "ResidualRNGD-defaults"


def cosine(optimizer: torch.optim.Optimizer, done: float) -> None:
    """Set all learning rates to their share of a cosine that falls to 0 at the end of the run."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 + math.cos(math.pi * min(done, 1.0))) / 2


def constant(optimizer: torch.optim.Optimizer, done: float) -> None:
    """Leave the optimizer as it is."""


@dataclass(frozen=True)
class Method(Peer):
    """A peer with its pace."""

    pace: Pace = cosine


class ThenLBFGS(torch.optim.Optimizer):
    """Adam, whose learning rate falls to 0 over the first `share` of a run, then L-BFGS."""

    def __init__(self, model: nn.Module, lr: float = 5e-3, share: float = 0.2) -> None:
        super().__init__(model.parameters(), {"lr": lr})
        self._adam, self._lbfgs = torch.optim.Adam(model.parameters(), lr), _lbfgs(model)
        self._share, self._now = share, 0.0

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]  # both need a closure
        """Take the step of the one whose turn it is."""
        chosen = self._adam if self._now < self._share else self._lbfgs
        step: Callable[[Callable[[], Tensor]], Tensor] = chosen.step
        return step(closure)

    @staticmethod
    def pace(optimizer: torch.optim.Optimizer, done: float) -> None:
        """Note how much of the run is over."""
        assert isinstance(optimizer, ThenLBFGS)
        optimizer._now = done
        cosine(optimizer._adam, done / optimizer._share)


class _Both(torch.optim.Optimizer):
    """Muon for the weights between hidden layers, Adam for the rest."""

    def __init__(self, model: nn.Module, lr: float = 1e-2, rest_lr: float = 1e-3) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        inner = [p for layer in layers[1:-1] for p in layer.parameters() if p.ndim > 1]
        rest = [p for p in model.parameters() if all(p is not weight for weight in inner)]
        self._parts = [Muon(inner, lr, 0.0), torch.optim.Adam(rest, rest_lr)]
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]  # the race passes a closure
        """Take the step of each."""
        loss = closure()
        for part in self._parts:
            part.step()
        return loss


class _LBFGS(torch.optim.LBFGS):
    """L-BFGS; where the length of its step overflows, the loss is NaN."""

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]  # the race passes a closure
        """Take the step."""
        try:
            loss: Tensor = super().step(closure)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        except RuntimeError as error:
            if "overflow" not in str(error):
                raise
            return torch.tensor(math.nan)
        return loss


def _lbfgs(model: nn.Module, lr: float = 1.0, history: float = 50, iterations: float = 20) -> torch.optim.LBFGS:
    """Create L-BFGS with a line search to the conditions of Wolfe, which stops for no tolerance."""
    return _LBFGS(
        model.parameters(),
        lr,
        max_iter=int(iterations),
        history_size=int(history),
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )


def _adam(model: nn.Module, lr: float = 5e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr)


def _soap(model: nn.Module, lr: float = 5e-3, interval: float = 10) -> torch.optim.Optimizer:
    soap = installed("SOAP")
    return soap(model.parameters(), lr=lr, weight_decay=0.0, precondition_frequency=int(interval))


class _OfResiduals(ResidualRNGD):
    """RNGD in the metric of the residuals of a closure."""

    def step(self, closure: Closure) -> Tensor:  # type: ignore[override]  # as all optimizers of the race
        """Take a step, and return the loss before it."""
        return super().step(lambda: [part * math.sqrt(part.numel()) for part in closure.parts()])


def _with_rate(model: nn.Module, lr: float = 1e-2, damping: float = 1e-6) -> torch.optim.Optimizer:
    """Create residual RNGD with a learning rate, whose layers have a metric of their own."""
    return _OfResiduals(model, lr, damping=damping)


def _joint(model: nn.Module, lr: float = 1e-2, samples: float = 1024) -> torch.optim.Optimizer:
    """Create residual RNGD without a learning rate; what stands for one here is its first damping."""
    return _OfResiduals(model, damping=lr, samples=int(samples))


def _rngd(model: nn.Module, lr: float = 1e-2, **options: Any) -> torch.optim.Optimizer:
    metric = MetricOptions(structure="neuron")
    return RNGD(model, lr, fit="interpolate", step_rule="normalized", averaging=0.0, metric=metric, **options)


METHODS: dict[str, Method] = {
    "Adam": Method(_adam, {"lr": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1)}),
    "Adam-L-BFGS": Method(ThenLBFGS, {"lr": (2e-3, 5e-3, 1e-2), "share": (0.2, 0.5)}, pace=ThenLBFGS.pace),
    "L-BFGS": Method(_lbfgs, {"lr": (1.0,), "history": (20, 50, 100), "iterations": (20, 100)}, pace=constant),
    "SOAP": Method(_soap, {"lr": (5e-3, 1e-2, 3e-2), "interval": (2, 10)}),
    "Muon": Method(_Both, {"lr": (1e-2, 3e-2, 1e-1), "rest_lr": (1e-3, 5e-3)}),
    LIMIT: Method(GaussNewton, {"lr": (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)}, pace=constant),
    "RNGD": Method(_rngd, {"lr": (3e-2, 1e-1, 3e-1), "damping": (1e-4, 1e-2)}),
    RESIDUAL: Method(_joint, {"lr": (1e-2, 1e-1, 1e-3), "samples": (1024, 512)}, pace=constant),
    RATE: Method(_with_rate, {"lr": (3e-2, 1e-1, 3e-1), "damping": (1e-6, 1e-4)}),
    UNTUNED: Method(_joint, {"lr": (1e-2,)}, pace=constant),
}
OURS = (RESIDUAL, RATE, UNTUNED, "RNGD")
