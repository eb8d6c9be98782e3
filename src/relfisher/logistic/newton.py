"""Newton's method for logistic regression with the metric as an operator: the solver of `LogisticRegression`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from relfisher.shapes import Float, Num

__all__ = ["LogisticObjective", "Result", "minimize"]

_ARMIJO = 1e-4
_SHORTEST = 2.0**-30
_ROUNDING = 1e-14
# The smallest eigenvalue of a preconditioner, relative to the largest or to the mean.
_FLOOR = 1e-10
# Forming the metric of d parameters costs about as much as d / 30 products with it, which are memory-bound.
_COST_RATIO = 30.0
_SAMPLES_PER_PARAMETER = 4


@dataclass(frozen=True)
class Result:
    """The result of a minimization. `weights` are [k, d], `gradient_norm` is the gradient's largest absolute entry."""

    weights: Tensor
    steps: int
    gradient_norm: float
    converged: bool


class LogisticObjective:
    """Mean cross-entropy with an L2 penalty: its value, gradient and metric.

    Args:
        x: the samples, float64.
        labels: class indices.
        classes: the number of classes; two classes have one row of weights.
        penalty: the factor of |W|^2 / 2, >= 0.
        bias: whether there is an intercept, which is not penalized.
    """

    def __init__(self, x: Float[Tensor, "n in"], labels: Num[Tensor, "n"], *, classes: int, penalty: float, bias: bool):
        self.x = torch.cat([x, x.new_ones(len(x), 1)], dim=1) if bias else x
        self.labels = labels
        self.binary = classes == 2
        self.rows = 1 if self.binary else classes
        self.penalty = x.new_full((self.x.shape[1],), penalty)
        if bias:
            self.penalty[-1] = 0

    def scores(self, weights: Float[Tensor, "k d"]) -> Float[Tensor, "n k"]:
        """Return z = X~ W'."""
        return self.x @ weights.T

    def value(self, scores: Float[Tensor, "n k"], weights: Float[Tensor, "k d"]) -> float:
        """Return the objective."""
        if self.binary:
            loss = functional.binary_cross_entropy_with_logits(scores[:, 0], self.labels.to(scores.dtype))
        else:
            loss = functional.cross_entropy(scores, self.labels)
        return float(loss + (weights.square() @ self.penalty).sum() / 2)

    def probabilities(self, scores: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Return the probability of the second class, or of each class."""
        return torch.sigmoid(scores) if self.binary else torch.softmax(scores, dim=1)

    def gradient(self, probabilities: Float[Tensor, "n k"], weights: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Return the gradient of the objective."""
        residual = probabilities.clone()
        if self.binary:
            residual[:, 0] -= self.labels
        else:
            residual[torch.arange(len(residual)), self.labels] -= 1
        return (residual.T @ self.x).div_(len(self.x)).addcmul_(weights, self.penalty)

    def information(self, probabilities: Float[Tensor, "n k"], field: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Apply F_n: nu_n of equation (14), or diag(eta_n) - eta_n eta_n' of equation (25)."""
        if self.binary:
            return probabilities * (1 - probabilities) * field
        weighted = probabilities * field
        return weighted - probabilities * weighted.sum(1, keepdim=True)

    def hessian(self, probabilities: Float[Tensor, "n k"], vector: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        """Return (G + penalty) v in two matrix products, with G the metric of the neuron or of the softmax layer."""
        field = self.information(probabilities, self.scores(vector))
        return (field.T @ self.x).div_(len(self.x)).addcmul_(vector, self.penalty)


def minimize(objective: LogisticObjective, *, tolerance: float, max_steps: int) -> Result:
    """Minimize the objective from zero by Newton steps with backtracking.

    Args:
        objective: the convex objective.
        tolerance: the largest absolute entry of the gradient at which to stop.
        max_steps: the largest number of steps.

    Returns:
        The weights, and whether the tolerance was reached.
    """
    weights = objective.x.new_zeros(objective.rows, objective.x.shape[1])
    scores = objective.scores(weights)
    value = objective.value(scores, weights)
    preconditioner = (_Metric if objective.binary else _KroneckerMetric)(objective)
    step = 0
    while True:
        probabilities = objective.probabilities(scores)
        gradient = objective.gradient(probabilities, weights)
        norm = float(gradient.abs().max())
        if norm <= tolerance or step == max_steps:
            return Result(weights, step, norm, norm <= tolerance)
        direction = _direction(objective, probabilities, gradient, preconditioner, tolerance)
        change = objective.scores(direction)
        decrease, length = float((gradient * direction).sum()), 1.0
        # Near the minimum the decrease is smaller than the rounding error of the value.
        while (lower := objective.value(scores - length * change, weights - length * direction)) > (
            value - _ARMIJO * length * decrease + _ROUNDING * abs(value)
        ):
            length /= 2
            if length < _SHORTEST:
                return Result(weights, step, norm, converged=False)
        weights, scores, value = weights - length * direction, scores - length * change, lower
        step += 1


def _some(x: Float[Tensor, "n d"]) -> slice:
    """Return a slice of evenly spaced samples, enough to estimate a metric for a preconditioner."""
    return slice(None, None, max(1, len(x) // (_SAMPLES_PER_PARAMETER * x.shape[1])))


class _Metric:
    """The preconditioner for two classes: the inverse of the metric at the weights where it was last formed."""

    def __init__(self, objective: LogisticObjective) -> None:
        self._penalty = objective.penalty
        self._some = _some(objective.x)
        x = self._x = objective.x[self._some]
        # At zero weights nu is 1/4 everywhere.
        self._factor = self._factorized((x.T @ x).div_(4 * len(x)))
        self._spent = 0

    def refresh(self, probabilities: Float[Tensor, "n k"]) -> None:
        """Recompute the metric once the iterations since the last time have cost as much as forming it."""
        x = self._x
        if self._spent > x.shape[1] / _COST_RATIO:
            some = probabilities[self._some]
            rooted = x * (some * (1 - some)).div(len(x)).sqrt()
            self._factor = self._factorized(rooted.T @ rooted)
            self._spent = 0

    def __call__(self, residual: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        self._spent += 1
        return torch.cholesky_solve(residual.T, self._factor).T

    def _factorized(self, metric: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
        metric.diagonal().add_(self._penalty + _FLOOR * metric.diagonal().mean())
        factor: Tensor = torch.linalg.cholesky(metric)
        return factor


class _KroneckerMetric:
    """The preconditioner for more classes: the inverse of mean F_n (x) mean x~_n x~_n' + penalty, from eigenvectors."""

    def __init__(self, objective: LogisticObjective) -> None:
        x = objective.x[_some(objective.x)]
        values, self._vectors = torch.linalg.eigh((x.T @ x).div_(len(x)))
        self._values = values.clamp(min=_FLOOR * float(values[-1]))
        # The intercept is not penalized, but its curvature is so large that the penalty makes no visible difference.
        self._penalty = float(objective.penalty.max())

    def refresh(self, probabilities: Float[Tensor, "n k"]) -> None:
        """Compute mean F_n at these probabilities, equation (25)."""
        mean = (probabilities.T @ probabilities).div_(-len(probabilities))
        mean.diagonal().add_(probabilities.mean(0))
        values, self._rotation = torch.linalg.eigh(mean)
        values = values.clamp(min=_FLOOR * float(values[-1]))
        self._inverse = 1 / (torch.outer(values, self._values) + self._penalty)

    def __call__(self, residual: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        rotated = self._rotation.T @ residual @ self._vectors
        solution: Tensor = self._rotation @ rotated.mul_(self._inverse) @ self._vectors.T
        return solution


def _direction(
    objective: LogisticObjective,
    probabilities: Float[Tensor, "n k"],
    gradient: Float[Tensor, "k d"],
    preconditioner: _Metric | _KroneckerMetric,
    tolerance: float,
) -> Float[Tensor, "k d"]:
    """Solve (G + penalty) d = gradient by preconditioned conjugate gradients, more accurately near the minimum."""
    preconditioner.refresh(probabilities)
    norm = gradient.norm()
    target = max(float(norm) * min(0.1, float(norm) ** 0.5), 0.1 * tolerance)
    solution = torch.zeros_like(gradient)
    residual = gradient.clone()
    scaled = preconditioner(residual)
    direction = scaled
    energy = float((residual * scaled).sum())
    for _ in range(10 * gradient.numel()):
        image = objective.hessian(probabilities, direction)
        curvature = float((direction * image).sum())
        if curvature <= 0:
            break
        solution = solution + energy / curvature * direction
        residual = residual - energy / curvature * image
        if float(residual.norm()) <= target:
            break
        scaled = preconditioner(residual)
        fresh = float((residual * scaled).sum())
        direction = scaled + fresh / energy * direction
        energy = fresh
    return solution
