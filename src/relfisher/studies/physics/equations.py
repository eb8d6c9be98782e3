"""The equations of the race, each small enough for a core and some seconds."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from relfisher.studies.physics.equation import Equation, partials, second
from relfisher.studies.physics.references import allen_cahn, burgers

__all__ = ["EQUATIONS"]

PI = math.pi


class _Dirichlet(Equation):
    """An equation whose solution is known on the boundary."""

    def conditions(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return how far the solution is from the true one on the boundary."""
        return self.solution(model, x) - self.answer(x).to(x)


class _Evolution(_Dirichlet):
    """An equation in places and time, the last coordinate, whose solution is not given at its end."""

    def on_edge(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points on the faces of the box, but on its start in place of its end."""
        x = super().on_edge(count, generator)
        start, end = self.box[-1]
        x[x[:, -1] == end, -1] = start
        return x


class Poisson(_Dirichlet):
    """-(u_xx + u_yy) = f on the unit square (Müller & Zeinhofer 2023)."""

    title = "Poisson's equation in 2 dimensions"
    box = ((0.0, 1.0), (0.0, 1.0))
    inside = 400
    weight = 100.0

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return -(u_xx + u_yy) - f."""
        _, bends = second(self.solution(model, x)[:, 0], x, (0, 1))
        return -bends.sum(1) - 2 * PI**2 * _product_of_sines(x, PI, PI)

    def answer(self, x: Tensor) -> Tensor:
        """Return sin(pi x) sin(pi y)."""
        return _product_of_sines(x.double(), PI, PI)[:, None]


class Poisson5(_Dirichlet):
    """-(sum of second derivatives) = f on the unit cube of 5 dimensions (Dangel et al. 2024)."""

    title = "Poisson's equation in 5 dimensions"
    box = ((0.0, 1.0),) * 5
    sides = 7
    weight = 100.0
    fresh = True

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return -(sum of second derivatives) - f."""
        _, bends = second(self.solution(model, x)[:, 0], x, (0, 1, 2, 3, 4))
        return -bends.sum(1) - PI**2 * torch.cos(PI * x).sum(1)

    def answer(self, x: Tensor) -> Tensor:
        """Return the sum of cos(pi x)."""
        return torch.cos(PI * x.double()).sum(1, keepdim=True)


class Helmholtz(Equation):
    """u_xx + u_yy + u = f on [-1, 1]^2, 0 on the boundary (Wang et al. 2021); the solution has that built in."""

    title = "Helmholtz' equation"
    box = ((-1.0, 1.0), (-1.0, 1.0))
    unit = "sine"
    fresh = True

    def solution(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return (1 - x^2) (1 - y^2) times the output."""
        return (1 - x.square()).prod(1, keepdim=True) * super().solution(model, x)

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return (u_xx + u_yy + u - f) / 100."""
        u = self.solution(model, x)[:, 0]
        _, bends = second(u, x, (0, 1))
        return (bends.sum(1) + u - (1 - 17 * PI**2) * _product_of_sines(x, PI, 4 * PI)) / 100

    def answer(self, x: Tensor) -> Tensor:
        """Return sin(pi x) sin(4 pi y)."""
        return _product_of_sines(x.double(), PI, 4 * PI)[:, None]


class Heat(_Evolution):
    """u_t = u_xx / (4 pi^2) on an interval, with two waves that decay at different rates."""

    title = "the heat equation"
    box = ((0.0, 1.0), (0.0, 1.0))
    axes = ("x", "t")
    unit = "silu"
    double = True
    weight = 10.0

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return u_t - u_xx / (4 pi^2)."""
        slopes, bends = second(self.solution(model, x)[:, 0], x, (0,))
        return slopes[:, 1] - bends[:, 0] / (4 * PI**2)

    def answer(self, x: Tensor) -> Tensor:
        """Return exp(-t / 4) sin(pi x) + exp(-4 t) sin(4 pi x) / 2."""
        place, time = x.double().T
        slow = torch.exp(-time / 4) * torch.sin(PI * place)
        return (slow + torch.exp(-4 * time) * torch.sin(4 * PI * place) / 2)[:, None]


class Burgers(Equation):
    """u_t + u u_x = u_xx / (100 pi), which forms a shock (Raissi et al. 2019); start and ends are built in."""

    title = "Burgers' equation"
    box = ((-1.0, 1.0), (0.0, 1.0))
    axes = ("x", "t")
    hidden = (32, 32, 32, 32)
    inside = 1000
    fresh = True
    viscosity = 0.01 / PI

    def solution(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return -sin(pi x) + t (1 - x^2) times the output."""
        place, time = x[:, :1], x[:, 1:]
        return -torch.sin(PI * place) + time * (1 - place.square()) * super().solution(model, x)

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return u_t + u u_x - u_xx / (100 pi)."""
        u = self.solution(model, x)[:, 0]
        slopes, bends = second(u, x, (0,))
        return slopes[:, 1] + u * slopes[:, 0] - self.viscosity * bends[:, 0]

    def answer(self, x: Tensor) -> Tensor:
        """Return the reference solution."""
        place, time = x.double().numpy().T
        return torch.from_numpy(burgers(place, time, self.viscosity))[:, None]


class AllenCahn(Equation):
    """u_t = 1e-3 u_xx + 5 u - 5 u^3, which forms steep fronts (Lu et al. 2021); start and ends are built in."""

    title = "the Allen-Cahn equation"
    box = ((-1.0, 1.0), (0.0, 1.0))
    axes = ("x", "t")
    fresh = True

    def solution(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return x^2 cos(pi x) + t (1 - x^2) times the output."""
        place, time = x[:, :1], x[:, 1:]
        start = place.square() * torch.cos(PI * place)
        return start + time * (1 - place.square()) * super().solution(model, x)

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return u_t - 1e-3 u_xx - 5 u + 5 u^3."""
        u = self.solution(model, x)[:, 0]
        slopes, bends = second(u, x, (0,))
        return slopes[:, 1] - 1e-3 * bends[:, 0] - 5 * u + 5 * u**3

    def answer(self, x: Tensor) -> Tensor:
        """Return the reference solution."""
        place, time = x.double().numpy().T
        return torch.from_numpy(allen_cahn(place, time))[:, None]


class Advection(_Evolution):
    """u_t + 30 u_x = 0 for a periodic wave (Krishnapriyan et al. 2021); the network sees the place on a circle."""

    title = "advection with speed 30"
    box = ((0.0, 2 * PI), (0.0, 1.0))
    axes = ("x", "t")
    unit = "sine"
    features = 3
    weight = 10.0
    fresh = True
    speed = 30.0

    def seen(self, x: Tensor) -> Tensor:
        """Return cos(x), sin(x) and the time in units of a quarter of a period."""
        time = self.speed * x[:, 1] / (PI / 2)
        return torch.stack([torch.cos(x[:, 0]), torch.sin(x[:, 0]), time], -1)

    def on_edge(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points at the start, since the solution is periodic."""
        x = self.within(count, generator)
        x[:, 1] = 0
        return x

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return (u_t + 30 u_x) / 30."""
        slopes = partials(self.solution(model, x)[:, 0], x)
        return slopes[:, 1] / self.speed + slopes[:, 0]

    def answer(self, x: Tensor) -> Tensor:
        """Return sin(x - 30 t)."""
        place, time = x.double().T
        return torch.sin(place - self.speed * time)[:, None]


class TaylorGreen(_Evolution):
    """The Navier-Stokes equations for decaying vortices in 2 dimensions: two velocities and the pressure."""

    title = "Taylor-Green vortices"
    box = ((0.0, PI), (0.0, PI), (0.0, 1.0))
    sides = 17
    outputs = 3
    unit = "silu"
    edge = 200
    weight = 10.0
    fresh = True
    viscosity = 0.1

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return both equations of momentum and that of mass, [points, 3]."""
        found = self.solution(model, x)
        u, v, pressure = found.unbind(1)
        (of_u, bends_u), (of_v, bends_v) = second(u, x, (0, 1)), second(v, x, (0, 1))
        force = partials(pressure, x)

        def momentum(slopes: Tensor, bends: Tensor, push: Tensor) -> Tensor:
            return slopes[:, 2] + u * slopes[:, 0] + v * slopes[:, 1] + push - self.viscosity * bends.sum(1)

        mass = of_u[:, 0] + of_v[:, 1]
        return torch.stack([momentum(of_u, bends_u, force[:, 0]), momentum(of_v, bends_v, force[:, 1]), mass], -1)

    def answer(self, x: Tensor) -> Tensor:
        """Return the velocities -cos x sin y exp(-2 nu t), sin x cos y exp(-2 nu t), and the pressure."""
        a, b, time = x.double().T
        decay = torch.exp(-2 * self.viscosity * time)
        pressure = -(torch.cos(2 * a) + torch.cos(2 * b)) / 4 * decay.square()
        return torch.stack([-torch.cos(a) * torch.sin(b) * decay, torch.sin(a) * torch.cos(b) * decay, pressure], -1)


class Coefficient(_Evolution):
    """u_t = k u_xx with an unknown coefficient k: u is known at all points, and k is trained with the network."""

    title = "the coefficient of a heat equation"
    box = ((0.0, 1.0), (0.0, 1.0))
    axes = ("x", "t")
    double = True
    weight = 10.0
    true = 0.05

    def build(self, seed: int) -> nn.Module:
        """Return the network, with the logarithm of the coefficient as a parameter, which starts at 0."""
        model = super().build(seed)
        model.register_parameter("log_coefficient", nn.Parameter(torch.zeros((), dtype=self.dtype)))
        return model

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return u_t - k u_xx and the distance to the measured u, [points, 2]."""
        found = self.solution(model, x)
        slopes, bends = second(found[:, 0], x, (0,))
        coefficient = model.get_parameter("log_coefficient").exp()
        return torch.stack([slopes[:, 1] - coefficient * bends[:, 0], (found - self.answer(x.detach()))[:, 0]], -1)

    def answer(self, x: Tensor) -> Tensor:
        """Return the sum of two waves, sin(pi x) and sin(3 pi x) / 2, each with its decay."""
        place, time = x.double().T
        waves = [torch.exp(-self.true * (n * PI) ** 2 * time) * torch.sin(n * PI * place) for n in (1, 3)]
        return (waves[0] + waves[1] / 2)[:, None]

    @torch.no_grad()
    def error(self, model: nn.Module, x: Tensor, answer: Tensor) -> float:
        """Return the relative error of the coefficient."""
        return abs(float(model.get_parameter("log_coefficient").exp()) / self.true - 1)


def _product_of_sines(x: Tensor, a: float, b: float) -> Tensor:
    return torch.sin(a * x[:, 0]) * torch.sin(b * x[:, 1])


EQUATIONS: dict[str, Equation] = {
    "pde-poisson": Poisson(),
    "pde-poisson-5": Poisson5(),
    "pde-helmholtz": Helmholtz(),
    "pde-heat": Heat(),
    "pde-burgers": Burgers(),
    "pde-allen-cahn": AllenCahn(),
    "pde-advection": Advection(),
    "pde-taylor-green": TaylorGreen(),
    "pde-coefficient": Coefficient(),
}
