"""Gradient descent of one sigmoid neuron by (29) and (30), with all runs and configurations as one batch.

Costs are stored as logarithms: on separable samples the cost falls below the smallest float64 within 100 natural
gradient steps, and logarithms keep full relative accuracy. For the same reason, the metric and the gradient are
divided by the largest nu_n of their problem, a factor that cancels in (30).

Axes: `s` data sets, `c` configurations, `m` runs on the same data, `n` samples, `r` coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from relfisher.shapes import Float
from relfisher.studies.damped_systems import DampedSystems
from relfisher.studies.sample_space import SampleSpaceSystems

__all__ = ["DAMPING", "Configuration", "Problems", "descend", "log_cost"]

DAMPING = 1e-2
_SATURATED = 30.0


@dataclass(frozen=True)
class Configuration:
    """A constant learning rate and a momentum."""

    learning_rate: float
    momentum: float

    def __str__(self) -> str:
        return f"lr {self.learning_rate:g}, momentum {self.momentum:g}"


@dataclass(frozen=True)
class Problems:
    """The minimization problems: data sets, and the initial weights on each.

    Attributes:
        features: z_n in coordinates of their span.
        signs: +1 for the positive class, -1 for the other.
        start: the initial weights of every run, in the same coordinates.
        parameters: D, the number of weights before the restriction to the span.
    """

    features: Float[Tensor, "s n r"]
    signs: Float[Tensor, "s n"]
    start: Float[Tensor, "s m r"]
    parameters: int


def log_cost(margins: Float[Tensor, "*b n"]) -> Float[Tensor, "*b"]:
    """Return the natural logarithm of the average cross-entropy (29).

    Args:
        margins: (2 y_n - 1) theta' z_n.

    Returns:
        ln mean_n softplus(-margin), exact up to rounding for arbitrarily small costs.
    """
    logarithms = torch.where(margins > _SATURATED, -margins, softplus(-margins).log())
    return torch.logsumexp(logarithms, dim=-1) - math.log(margins.shape[-1])


def descend(
    problems: Problems,
    configurations: Sequence[Configuration],
    *,
    natural: bool,
    epochs: int,
    report: Callable[[int, float], None],
) -> Float[Tensor, "c runs epochs"]:
    """Return the cost of full-batch descent with every configuration from every start.

    A configuration ends once one of its runs has no finite step, for instance if all samples are saturated but some are
    misclassified: the metric of (30) then vanishes, but the gradient does not.

    Args:
        problems: data and initial weights.
        configurations: learning rates and momentums.
        natural: True for steps by (30), False for plain gradient descent.
        epochs: the number of steps.
        report: called after each epoch with the fraction done and the lowest log cost.

    Returns:
        ln of the cost before the first and after every step, [c, s * m, epochs + 1]; NaN from the step where a
        configuration diverged.
    """
    sets, runs, rank = problems.start.shape
    count = len(configurations)
    curves = problems.start.new_full((count, sets * runs, epochs + 1), math.nan)
    theta = problems.start.unsqueeze(1).expand(sets, count, runs, rank).clone()
    velocity = torch.zeros_like(theta)
    systems = _systems(problems, count) if natural else None
    alive = torch.arange(count)
    rates = theta.new_tensor([configuration.learning_rate for configuration in configurations])
    momentums = theta.new_tensor([configuration.momentum for configuration in configurations])
    for epoch in range(epochs + 1):
        margins = _margins(problems, theta)
        costs = log_cost(margins)
        gone = ~costs.isfinite().all(dim=2).all(dim=0)
        if epoch < epochs:
            direction = _gradient(problems, margins) if systems is None else _natural(problems, systems, margins)
            gone |= ~direction.isfinite().all(dim=3).all(dim=2).all(dim=0)
        curves[alive, :, epoch] = costs.transpose(0, 1).flatten(1)
        if gone.any():
            kept = (~gone).nonzero().squeeze(1)
            alive, theta, velocity, direction = alive[kept], theta[:, kept], velocity[:, kept], direction[:, kept]
            if systems is not None:
                systems.keep(kept)
            if len(alive) == 0:
                break
        if epoch < epochs:
            velocity.mul_(momentums[alive, None, None]).add_(direction)
            theta = theta - rates[alive, None, None] * velocity
        report(epoch, float(costs.min()))
    return curves


def _systems(problems: Problems, configurations: int) -> DampedSystems | SampleSpaceSystems:
    """Return the cheaper solver: preconditioners pay off for runs that share data."""
    sets, samples, rank = problems.features.shape
    if sets > 1 and samples <= 2 * rank:
        return SampleSpaceSystems(problems.features, DAMPING, problems.parameters)
    return DampedSystems(problems.features, configurations, DAMPING, problems.parameters)


def _margins(problems: Problems, theta: Float[Tensor, "s c m r"]) -> Float[Tensor, "s c m n"]:
    products = theta.flatten(1, 2) @ problems.features.mT
    return products.mul_(problems.signs.unsqueeze(1)).view(*theta.shape[:3], -1)


def _weighted(problems: Problems, residuals: Float[Tensor, "s c m n"]) -> Float[Tensor, "s c m r"]:
    """Return mean_n residual_n z_n, where residuals refer to margins and are multiplied by the sign of the class."""
    signed = residuals.flatten(1, 2) * problems.signs.unsqueeze(1)
    return (signed @ problems.features).div_(residuals.shape[-1]).view(*residuals.shape[:3], -1)


def _gradient(problems: Problems, margins: Float[Tensor, "s c m n"]) -> Float[Tensor, "s c m r"]:
    """Return the gradient of (29)."""
    return _weighted(problems, -torch.sigmoid(-margins))


def _natural(
    problems: Problems, systems: DampedSystems | SampleSpaceSystems, margins: Float[Tensor, "s c m n"]
) -> Float[Tensor, "s c m r"]:
    """Return (G + epsilon I)^-1 times the gradient, the direction of (30)."""
    wrong = logsigmoid(-margins)
    information = wrong + logsigmoid(margins)
    largest = information.amax(dim=-1, keepdim=True)
    gradient = _weighted(problems, -(wrong - largest).exp())
    return systems.solve((information - largest).exp(), gradient)
