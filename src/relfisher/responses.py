"""Stochastic responses y of a layer with pre-activation z, and their Fisher information F(z).

A response defines p(y | z). Each class provides the activation f(z), its slope f'(z), the information nu(z), the
log-density and samples. A unit response acts on each unit independently, so that F(z) = diag(nu(z)); `Categorical`
couples all units. `sigma` is the standard deviation of a Gaussian response, in the units of the activation.

Source: Sun & Nielsen 2016, section 3.1 and appendices A to H.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from relfisher.information import Diagonal, Information, Isotropic, Softmax
from relfisher.shapes import Float, Num
from relfisher.validation import check_interval, check_positive

__all__ = [
    "ActivationGaussian",
    "Categorical",
    "ELUGaussian",
    "LinearGaussian",
    "ReLUGaussian",
    "Response",
    "SigmoidBernoulli",
    "SmoothReLUGaussian",
    "TanhBernoulli",
    "UnitResponse",
]


class Response(ABC):
    """The conditional distribution p(y | z) of a layer's response given its pre-activation z, [..., out].

    The last axis holds units or classes. The axes before it hold samples and positions, whose responses are independent
    given z; a metric is a mean over all of them.
    """

    @abstractmethod
    def information(self, z: Float[Tensor, "*n out"]) -> Float[Tensor, "*n out"] | Float[Tensor, "*n out out"]:
        """Return F(z): its diagonal nu [..., out] for unit responses, else the matrices [..., out, out]."""

    @abstractmethod
    def operator(self, z: Float[Tensor, "n out"]) -> Information:
        """Return F(z) as an operator that does not store the matrices."""

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "*n out"], y: Num[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return ln p(y | z): one entry per unit for unit responses, else one per sample."""

    @abstractmethod
    def sample(self, z: Float[Tensor, "*n out"], generator: torch.Generator | None = None) -> Num[Tensor, "*shape"]:
        """Draw y from p(y | z), using the generator if one is given."""

    @abstractmethod
    def outcomes(self, out: int) -> tuple[float, ...] | None:
        """Return all values that y can take (per unit, or per sample), or None if y is continuous."""


class UnitResponse(Response):
    """A response of independent units, so that F(z) = diag(nu(z)); subclasses define f and nu."""

    @abstractmethod
    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return f(z), the mean of the response."""

    @abstractmethod
    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return f'(z)."""

    @abstractmethod
    def information(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return nu(z), the Fisher information of each unit about its pre-activation, in the shape of z."""

    def operator(self, z: Float[Tensor, "n out"]) -> Information:
        """Return diag(nu(z_n)) for each sample."""
        return Diagonal(self.information(z))


class _Bernoulli(UnitResponse):
    """A unit with the two outcomes `_low` and 1 and log-odds `_gain * z`."""

    _low: float
    _gain: float

    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return f'(z), which is equal to nu(z) for these units."""
        return self.information(z)

    def log_prob(self, z: Float[Tensor, "*n"], y: Num[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return ln p(y | z) for outcomes y, [..., out]."""
        odds = torch.where(y > 0, self._gain, -self._gain) * z
        # Unlike those of logsigmoid, both derivatives are accurate where the unit is saturated.
        return odds.where(odds <= 0, 0) - odds.where(odds <= 0, -odds).exp().log1p()

    def sample(self, z: Float[Tensor, "*n"], generator: torch.Generator | None = None) -> Float[Tensor, "*n"]:
        """Draw outcomes in the shape of z."""
        high = torch.bernoulli(torch.sigmoid(self._gain * z), generator=generator)
        return high * (1 - self._low) + self._low

    def outcomes(self, out: int) -> tuple[float, ...]:
        """Return the two outcomes of a unit."""
        return (self._low, 1.0)


@dataclass(frozen=True)
class TanhBernoulli(_Bernoulli):
    """A tanh unit: y in {-1, +1} with mean tanh(z), nu = 1 - tanh(z)^2. Equations (11), (12)."""

    _low = -1.0
    _gain = 2.0

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return tanh(z)."""
        return torch.tanh(z)

    def information(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return sech(z)^2, in a form that stays accurate where tanh saturates."""
        return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)


@dataclass(frozen=True)
class SigmoidBernoulli(_Bernoulli):
    """A sigmoid unit or a binary logistic head: y in {0, 1} with mean sigm(z). Equations (13), (14)."""

    _low = 0.0
    _gain = 1.0

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the logistic sigmoid of z."""
        return torch.sigmoid(z)

    def information(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return sigm(z) (1 - sigm(z))."""
        return torch.sigmoid(z) * torch.sigmoid(-z)


class _Gaussian(UnitResponse):
    """A unit with response N(f(z), sigma^2), so that nu = f'(z)^2 / sigma^2. Equation (58)."""

    sigma: float

    def __post_init__(self) -> None:
        check_positive("sigma", self.sigma)

    def information(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return f'(z)^2 / sigma^2."""
        return (self.slope(z) / self.sigma).square()

    def log_prob(self, z: Float[Tensor, "*n"], y: Num[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the log-density of y, [..., out]."""
        scaled = (y - self.activation(z)) / self.sigma
        return -0.5 * scaled.square() - math.log(self.sigma) - 0.5 * math.log(2 * math.pi)

    def sample(self, z: Float[Tensor, "*n"], generator: torch.Generator | None = None) -> Float[Tensor, "*n"]:
        """Draw responses in the shape of z."""
        noise = torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
        return self.activation(z) + self.sigma * noise

    def outcomes(self, out: int) -> None:
        """Return None: the response is continuous."""
        return


@dataclass(frozen=True)
class LinearGaussian(_Gaussian):
    """A linear unit with response N(z, sigma^2): nu = 1 / sigma^2. Equation (22)."""

    sigma: float = 1.0

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return z."""
        return z

    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return ones."""
        return torch.ones_like(z)

    def operator(self, z: Float[Tensor, "n out"]) -> Information:
        """Return I / sigma^2 for each sample, so that all units share one block of the metric."""
        return Isotropic(self.sigma**-2, z)


@dataclass(frozen=True)
class ReLUGaussian(_Gaussian):
    """A (P)ReLU unit: nu = 1 / sigma^2 above 0 and iota^2 / sigma^2 below. Equations (15), (16).

    Args:
        iota: the slope below 0, in [0, 1); 0 is ReLU. At z = 0, where (16) is undefined, the slope is iota, as in
            torch.
        sigma: the response noise, > 0.

    Raises:
        ValueError: if iota or sigma is out of range.
    """

    iota: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_interval("iota", self.iota, 0, 1)

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return z above 0 and iota * z below."""
        return functional.leaky_relu(z, self.iota)

    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return 1 above 0 and iota elsewhere."""
        return (z > 0).to(z.dtype).mul_(1 - self.iota).add_(self.iota)


# In widths of its transition, where a smoothed ReLU is the identity to all digits of float64.
_FAR = 40.0


@dataclass(frozen=True)
class SmoothReLUGaussian(_Gaussian):
    """A smoothed (P)ReLU: f(z) = omega ln(exp(iota z / omega) + exp(z / omega)). Equations (17), (18), (40), (41).

    Args:
        omega: the width of the transition, > 0; the limit 0 is `ReLUGaussian`.
        iota: the slope far below 0, in [0, 1).
        sigma: the response noise, > 0.

    Raises:
        ValueError: if an argument is out of range.
    """

    omega: float = 1.0
    iota: float = 0.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("omega", self.omega)
        check_interval("iota", self.iota, 0, 1)

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the smoothed activation, in a form that does not overflow."""
        widths = self._widths(z)
        below = self.iota * z + self._width(z) * functional.softplus(widths, threshold=_FAR)
        return torch.where(widths > _FAR, z, below)

    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return iota + (1 - iota) sigm((1 - iota) z / omega)."""
        return self.iota + (1 - self.iota) * torch.sigmoid(self._widths(z))

    def _width(self, z: Float[Tensor, "*n"]) -> float:
        """Return omega, but at least the smallest normal number of z's dtype."""
        return max(self.omega, torch.finfo(z.dtype).tiny)

    def _widths(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        return (1 - self.iota) * z / self._width(z)


@dataclass(frozen=True)
class ELUGaussian(_Gaussian):
    """An exponential linear unit: nu = 1 / sigma^2 above 0, (alpha exp(z) / sigma)^2 below. Equations (19), (20).

    Args:
        alpha: the scale below 0, > 0.
        sigma: the response noise, > 0.

    Raises:
        ValueError: if alpha or sigma is not positive.
    """

    alpha: float = 1.0
    sigma: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive("alpha", self.alpha)

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return z above 0 and alpha (exp(z) - 1) below."""
        return functional.elu(z, self.alpha)

    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return 1 above 0 and alpha exp(z) below."""
        return torch.where(z >= 0, torch.ones_like(z), self.alpha * z.clamp(max=0).exp())


@dataclass(frozen=True)
class ActivationGaussian(_Gaussian):
    """Any differentiable activation with a Gaussian response: nu = f'(z)^2 / sigma^2. Equation (58).

    Args:
        function: the element-wise activation f, such as `torch.nn.functional.gelu`.
        sigma: the response noise, > 0.

    Raises:
        ValueError: if sigma is not positive.
    """

    function: Callable[[Tensor], Tensor]
    sigma: float = 1.0

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return f(z); f may modify its input in place."""
        return self.function(z.clone())

    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return f'(z) by automatic differentiation."""
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.activation(point).sum(), point)
        return slope


@dataclass(frozen=True)
class Categorical(Response):
    """A softmax head: y in {0, ..., out - 1} with probabilities softmax(z). Equations (24), (25)."""

    def information(self, z: Float[Tensor, "*n out"]) -> Float[Tensor, "*n out out"]:
        """Return diag(eta) - eta eta' for each sample, [..., out, out]."""
        return Softmax(torch.softmax(z, dim=-1)).dense()

    def operator(self, z: Float[Tensor, "n out"]) -> Information:
        """Return diag(eta) - eta eta' as an operator."""
        return Softmax(torch.softmax(z, dim=-1))

    def log_prob(self, z: Float[Tensor, "*n out"], y: Num[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return ln eta_y for class indices y, [...]."""
        likeliest = z.argmax(-1, keepdim=True)
        relative = z - z.gather(-1, likeliest)
        # Unlike those of log_softmax, both derivatives are accurate where a class is almost certain.
        others = relative.exp().scatter(-1, likeliest, 0).sum(-1)
        return relative.gather(-1, y.long().unsqueeze(-1)).squeeze(-1) - others.log1p()

    def sample(self, z: Float[Tensor, "*n out"], generator: torch.Generator | None = None) -> Num[Tensor, "*n"]:
        """Draw a class index for each sample."""
        eta = torch.softmax(z, dim=-1)
        return torch.multinomial(eta.reshape(-1, eta.shape[-1]), 1, generator=generator).reshape(eta.shape[:-1])

    def outcomes(self, out: int) -> tuple[float, ...]:
        """Return the class indices."""
        return tuple(range(out))
