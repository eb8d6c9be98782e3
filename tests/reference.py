"""The independent oracle: densities written out from the paper, expectations summed or integrated in float64.

Nothing here comes from the library. A `Density` is ln p(y | z) of one sample with z [m], and a support: responses y
with the weights of their expectation, all outcomes or the nodes of a Gauss-Hermite rule. The metric of a subsystem is
then taken twice, as the expected outer product of scores (1) and as minus the expected Hessian (2).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, hessian, jacrev, vmap

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Density:
    """p(y | z) of one sample.

    `log(z, y)` is a scalar, `support(z)` gives y [k, ...] and weights [k], `mean` is the activation of unit responses.
    """

    log: Callable[[Tensor, Tensor], Tensor]
    support: Callable[[Tensor], tuple[Tensor, Tensor]]
    mean: Function | None = None


def logistic(t: Tensor) -> Tensor:
    """(38)."""
    return 1 / (1 + torch.exp(-t))


def relu(iota: float) -> Function:
    """(15), with iota * t below 0."""
    return lambda t: torch.where(t >= 0, t, iota * t)


def smooth_relu(omega: float, iota: float) -> Function:
    """(17) with both exponents, as it stands, for moderate t."""
    return lambda t: omega * torch.log(torch.exp(iota * t / omega) + torch.exp(t / omega))


def elu(alpha: float) -> Function:
    """(19)."""
    return lambda t: torch.where(t >= 0, t, alpha * (torch.exp(t) - 1))


def _enumeration(low: float, log: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def support(z: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.tensor(list(itertools.product((low, 1.0), repeat=z.shape[0])), dtype=z.dtype)
        return y, torch.exp(vmap(lambda outcome: log(z, outcome))(y))

    return support


def tanh_bernoulli() -> Density:
    """(11) in the form (51), (52), which keeps its accuracy where 1 - tanh cancels: y in {-1, 1} with mean tanh."""

    def log(z: Tensor, y: Tensor) -> Tensor:
        return (y * z - torch.log(torch.exp(z) + torch.exp(-z))).sum()

    return Density(log, _enumeration(-1.0, log), torch.tanh)


def sigmoid_bernoulli() -> Density:
    """(13), with 1 - sigm(z) = sigm(z) exp(-z) so that nothing cancels: y in {0, 1} with mean sigm."""

    def log(z: Tensor, y: Tensor) -> Tensor:
        return (y * z - torch.log(1 + torch.exp(z))).sum()

    return Density(log, _enumeration(0.0, log), logistic)


def gaussian(mean: Function, sigma: float = 1.0, nodes: int = 4) -> Density:
    """G(y | mean(z), sigma^2 I), (64), (65), with products of Gauss-Hermite nodes: exact, as scores are polynomials."""

    def log(z: Tensor, y: Tensor) -> Tensor:
        return (-((y - mean(z)) ** 2) / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))).sum()

    points, masses = np.polynomial.hermite.hermgauss(nodes)
    points, masses = points * math.sqrt(2) * sigma, masses / math.sqrt(math.pi)

    def support(z: Tensor) -> tuple[Tensor, Tensor]:
        offsets = torch.tensor(list(itertools.product(points, repeat=z.shape[0])), dtype=z.dtype)
        weights = [math.prod(mass) for mass in itertools.product(masses, repeat=z.shape[0])]
        return mean(z) + offsets, torch.tensor(weights, dtype=z.dtype)

    return Density(log, support, mean)


def categorical() -> Density:
    """(24), (75): y in {0, ..., m - 1}."""

    def log(z: Tensor, y: Tensor) -> Tensor:
        return (z * (torch.arange(z.shape[0]) == y)).sum() - torch.log(torch.exp(z).sum())

    def support(z: Tensor) -> tuple[Tensor, Tensor]:
        return torch.arange(z.shape[0]), torch.exp(z) / torch.exp(z).sum()

    return Density(log, support)


def expectations(pre_activation: Callable[[Tensor, Tensor], Tensor], density: Density, theta: Tensor, x: Tensor):
    """Return the metric of theta as the mean over samples of both expectations: (5), (9).

    `pre_activation(theta, x_n)` is z_n, [m].
    """
    y, weight = vmap(lambda sample: density.support(pre_activation(theta, sample)))(x)

    def log(point: Tensor, sample: Tensor, outcome: Tensor) -> Tensor:
        return density.log(pre_activation(point, sample), outcome)

    over = lambda derivative: vmap(vmap(derivative, (None, None, 0)), (None, 0, 0))(theta, x, y)  # noqa: E731
    scores, hessians = over(grad(log)), over(hessian(log))
    outer = torch.einsum("nk,nki,nkj->ij", weight, scores, scores) / x.shape[0]
    curvature = -torch.einsum("nk,nkij->ij", weight, hessians) / x.shape[0]
    return outer, curvature


def information(density: Density, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return F(z) of one sample, [m, m], as both expectations."""
    return expectations(lambda point, _: point, density, z, z.new_zeros(1, 1))


def augment(x: Tensor) -> Tensor:
    """Return x~ = (x, 1)."""
    return torch.cat([x, torch.ones(*x.shape[:-1], 1, dtype=x.dtype)], dim=-1)


def layer(out: int, bias: bool = True) -> Callable[[Tensor, Tensor], Tensor]:
    """Return z = W x~ of parameters that are stacked neuron by neuron, the bias last."""
    return lambda theta, sample: theta.reshape(out, -1) @ (augment(sample) if bias else sample)


def two_layers(out: int, activation: Function, next_weight: Tensor, next_bias: Tensor):
    """Return the next layer's pre-activation C f(W x~) + c as a function of W, stacked neuron by neuron."""
    first = layer(out)
    return lambda theta, sample: next_weight @ activation(first(theta, sample)) + next_bias


def printed_two_layers(x: Tensor, nu: Tensor, nu_next: Tensor, next_weight: Tensor) -> Tensor:
    """Return (26) as it is printed, with nu_f as the hidden factor; nu [n, m], nu_next [n, l], next_weight [l, m]."""
    augmented = augment(x)
    terms = torch.einsum("li,lj,nl,ni,nj,na,nb->iajb", next_weight, next_weight, nu_next, nu, nu, augmented, augmented)
    return terms.reshape(nu.shape[1] * augmented.shape[1], -1) / x.shape[0]


def slope(function: Function, z: Tensor) -> Tensor:
    """Return the derivative of an element-wise function."""
    return vmap(grad(function))(z.reshape(-1)).reshape(z.shape)


def jacobian(function: Callable[[Tensor], Tensor], theta: Tensor) -> Tensor:
    """Return d function / d theta."""
    return jacrev(function)(theta)
