"""Units whose response is the activation plus Gaussian noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from relfisher.information import Information, Isotropic
from relfisher.responses.base import UnitResponse
from relfisher.shapes import Float, Num
from relfisher.validation import check_interval, check_positive

__all__ = ["ActivationGaussian", "ELUGaussian", "LinearGaussian", "ReLUGaussian", "SmoothReLUGaussian"]


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

    def divergence(self, z: Float[Tensor, "*n"], other: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return (f(z) - f(other))^2 / (2 sigma^2)."""
        return ((self.activation(z) - self.activation(other)) / self.sigma).square() / 2


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
        return Isotropic(1 / self.sigma * (1 / self.sigma), z)


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
