"""An equation as the task of a run: its loss in a closure, as optimizers with line searches need it, and its error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.studies.physics.equation import Equation, Points, grid

__all__ = ["Closure", "Solving"]


@dataclass(frozen=True)
class Closure:
    """The loss at some points; a call evaluates it with its gradients, as torch's optimizers want it."""

    equation: Equation
    model: nn.Module
    optimizer: torch.optim.Optimizer
    points: Points

    def __call__(self) -> Tensor:
        """Set the gradients, and return the loss."""
        self.optimizer.zero_grad()
        loss = self.equation.loss(self.model, self.points)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return loss.detach()

    def parts(self) -> list[Tensor]:
        """Return the residuals inside and on the boundary, as in `Equation`."""
        return self.equation.parts(self.model, self.points)

    def residuals(self) -> Tensor:
        """Return all residuals; the loss is the sum of their squares."""
        return self.equation.residuals(self.model, self.points)


@dataclass(frozen=True)
class Solving:
    """The task of solving an equation."""

    equation: Equation

    def draws(self, generator: torch.Generator) -> Iterator[tuple[Points]]:
        """Yield the points of each iteration."""
        return ((points,) for points in self.equation.points(generator))

    def iterate(self, optimizer: torch.optim.Optimizer, model: nn.Module, points: Points) -> float:
        """Perform one step of an optimizer, and return the loss before it."""
        closure: Callable[[], Any] = Closure(self.equation, model, optimizer, points)
        return float(optimizer.step(closure))

    def validate(self, model: nn.Module) -> float:
        """Return the relative L2 error on a grid."""
        return self.equation.error(model, *self.answered)

    def cost(self, model: nn.Module) -> float:
        """Return the loss at points drawn anew."""
        points = next(self.equation.points(torch.Generator().manual_seed(2**31)))
        return float(self.equation.loss(model, points).detach())

    @cached_property
    def answered(self) -> tuple[Tensor, Tensor]:
        """The grid and the true solution on it."""
        x = grid(self.equation.box, self.equation.sides)
        return x, self.equation.answer(x)
