"""An equation to be solved by a network: its points, its residuals, and its solution on a fine grid."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from relfisher.studies.networks import stack

__all__ = ["Box", "Equation", "Points", "Sine", "grid", "partials", "second"]

#: The least and the largest value of each coordinate.
Box = tuple[tuple[float, float], ...]
#: The points inside and those on the boundary, each [points, coordinates].
Points = tuple[Tensor, Tensor]

FREQUENCY = 3.0


class Sine(nn.Module):
    """The unit sin(3 z), as in SIREN (Sitzmann et al. 2020), which has 30 in place of 3 for images."""

    def forward(self, z: Tensor) -> Tensor:
        """Return sin(3 z)."""
        return torch.sin(FREQUENCY * z)


def sine_network(widths: tuple[int, ...]) -> nn.Module:
    """Return linear layers with sine units between them, with the initial weights of SIREN."""
    model = stack(widths, Sine)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in layers:
        bound = math.sqrt(6 / layer.in_features) / FREQUENCY
        nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.uniform_(layers[0].weight, -1 / widths[0], 1 / widths[0])
    return model


def saturating_network(widths: tuple[int, ...], unit: Callable[[], nn.Module]) -> nn.Module:
    """Return linear layers with units between them, with the initial weights of Glorot & Bengio 2010."""
    model = stack(widths, unit)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


UNITS = {"tanh": nn.Tanh, "silu": nn.SiLU}


class Equation(ABC):
    """A differential equation on a box, and the network that solves it.

    The loss is the mean square of the residual inside plus `weight` times that of the conditions on the boundary. The
    points are drawn once or, with `fresh`, for each step. The error is measured on a grid of `sides` points along each
    coordinate.
    """

    title: ClassVar[str]
    box: ClassVar[Box]
    axes: ClassVar[tuple[str, str]] = ("x", "y")
    outputs: ClassVar[int] = 1
    unit: ClassVar[Literal["tanh", "silu", "sine"]] = "tanh"
    hidden: ClassVar[tuple[int, ...]] = (32, 32, 32)
    features: ClassVar[int] = 0
    double: ClassVar[bool] = False
    inside: ClassVar[int] = 500
    edge: ClassVar[int] = 100
    weight: ClassVar[float] = 1.0
    fresh: ClassVar[bool] = False
    sides: ClassVar[int] = 101

    @abstractmethod
    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the residual at points inside, [points] or [points, equations]."""

    def conditions(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """Return the residual of the conditions at points of the boundary; None if the solution has them built in."""
        return None

    @abstractmethod
    def answer(self, x: Tensor) -> Tensor:
        """Return the true solution at points [points, coordinates], as [points, outputs] in double precision."""

    def solution(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return what the network says the solution is, [points, outputs]."""
        output: Tensor = model(self.seen(x))
        return output

    def seen(self, x: Tensor) -> Tensor:
        """Return the inputs of the network: the coordinates scaled to [-1, 1]."""
        low, high = (torch.tensor(ends, dtype=x.dtype) for ends in zip(*self.box, strict=True))
        return (2 * x - low - high) / (high - low)

    def on_edge(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points on all faces of the box."""
        x = self.within(count, generator)
        faces = torch.arange(count) % (2 * len(self.box))
        ends = torch.tensor(self.box, dtype=x.dtype)
        x[torch.arange(count), faces // 2] = ends[faces // 2, faces % 2]
        return x

    def within(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw points in the box."""
        low, high = (torch.tensor(ends, dtype=self.dtype) for ends in zip(*self.box, strict=True))
        return low + (high - low) * torch.rand(count, len(self.box), generator=generator, dtype=self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The precision of weights and points."""
        return torch.float64 if self.double else torch.float32

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths of the network."""
        return (self.features or len(self.box), *self.hidden, self.outputs)

    def build(self, seed: int) -> nn.Module:
        """Return the network with the initial weights of a seed, without changing torch's global generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = (
                sine_network(self.widths) if self.unit == "sine" else saturating_network(self.widths, UNITS[self.unit])
            )
        return made.to(self.dtype)

    def points(self, generator: torch.Generator) -> Iterator[Points]:
        """Yield the points of each step without end."""
        drawn = self._drawn(generator)
        while True:
            yield drawn
            drawn = self._drawn(generator) if self.fresh else drawn

    def _drawn(self, generator: torch.Generator) -> Points:
        inside = self.within(self.inside, generator).requires_grad_()
        return inside, self.on_edge(self.edge, generator)

    def parts(self, model: nn.Module, points: Points) -> list[Tensor]:
        """Return the residuals inside and those of the conditions, if any, [points, residuals] each.

        They are scaled so that the loss is the sum of all squares.
        """
        inside, edge = points
        parts = [self.residual(model, inside).view(len(inside), -1) / math.sqrt(len(inside))]
        conditions = self.conditions(model, edge)
        if conditions is not None:
            parts.append(conditions * math.sqrt(self.weight / len(edge)))
        return parts

    def residuals(self, model: nn.Module, points: Points) -> Tensor:
        """Return all residuals [residuals]; the loss is the sum of their squares."""
        return torch.cat([part.flatten() for part in self.parts(model, points)])

    def loss(self, model: nn.Module, points: Points) -> Tensor:
        """Return the loss."""
        return self.residuals(model, points).square().sum()

    @torch.no_grad()
    def error(self, model: nn.Module, x: Tensor, answer: Tensor) -> float:
        """Return the relative L2 error of the solution at points where the answer is known."""
        found = self.solution(model, x.to(self.dtype)).double()
        return float((found - answer).norm() / answer.norm())


def grid(box: Box, count: int) -> Tensor:
    """Return a regular grid with `count` points in each coordinate, [count^coordinates, coordinates], in double."""
    sides = [torch.linspace(low, high, count, dtype=torch.float64) for low, high in box]
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).view(-1, len(box))


def partials(u: Tensor, x: Tensor) -> Tensor:
    """Return the first derivatives [points, coordinates] of values [points], which depend on their own point alone."""
    (slopes,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return slopes


def second(u: Tensor, x: Tensor, coordinates: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the first derivatives, and the second ones along some coordinates, [points, coordinates] each."""
    slopes = partials(u, x)
    bends = [partials(slopes[:, place], x)[:, place] for place in coordinates]
    return slopes, torch.stack(bends, -1)
