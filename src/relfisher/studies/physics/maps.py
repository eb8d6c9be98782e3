"""Maps between functions or states, learned from values: an operator and a neural ordinary differential equation."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from relfisher.studies.physics.equation import saturating_network
from relfisher.studies.physics.fields import Field

__all__ = ["MAPS"]

SENSORS = 16
BASIS = 16
STEPS = 8


class _Operator(nn.Module):
    """DeepONet (Lu et al. 2021): the inner product of what a branch says of a function and a trunk of a place."""

    def __init__(self, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.branch = saturating_network((SENSORS, *hidden, BASIS), nn.SiLU)
        self.trunk = saturating_network((1, *hidden, BASIS), nn.SiLU)

    def forward(self, values: Tensor) -> Tensor:
        """Return the result [rows, 1] for rows of a function's values and a place."""
        product: Tensor = self.branch(values[:, :SENSORS]) * self.trunk(values[:, SENSORS:])
        return product.sum(1, keepdim=True)


class Integral(Field):
    """The operator from cos(w s), s in [0, 1], to its integral up to x; a row has a w and an x."""

    title = "the operator of integration"
    box = ((0.0, 8.0), (0.0, 1.0))
    axes = ("w", "x")
    unit = "silu"
    features = SENSORS + 1
    hidden = (32, 32)

    def build(self, seed: int) -> nn.Module:
        """Return the branch and the trunk with the initial weights of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made: nn.Module = _Operator(self.hidden).to(self.dtype)
        return made

    def seen(self, x: Tensor) -> Tensor:
        """Return the values of the function at the sensors, and the place, scaled to [-1, 1]."""
        sensors = torch.linspace(0, 1, SENSORS, dtype=x.dtype)
        return torch.cat([torch.cos(x[:, :1] * sensors), 2 * x[:, 1:] - 1], 1)

    def answer(self, x: Tensor) -> Tensor:
        """Return sin(w x) / w."""
        frequency, place = x.double().T
        values: Tensor = place * torch.sinc(frequency * place / math.pi)
        return values[:, None]


class Flow(Field):
    """The flow of a limit cycle in unit time by a neural ordinary differential equation (Chen et al. 2018)."""

    title = "the flow of a limit cycle"
    box = ((-1.5, 1.5), (-1.5, 1.5))
    outputs = 2
    hidden = (32, 32)
    double = True
    fresh = False
    rate: ClassVar[float] = 3.0

    def solution(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return the states after unit time, by the midpoint rule."""
        state: Tensor = x
        step = 1 / STEPS
        for _ in range(STEPS):
            middle: Tensor = state + step / 2 * model(state)
            state = state + step * model(middle)
        return state

    def answer(self, x: Tensor) -> Tensor:
        """Return the states of r' = r (1 - r^2), with an angle of `rate` more."""
        x = x.double()
        squares = x.square().sum(1, keepdim=True)
        grown = x / torch.sqrt(squares + (1 - squares) * math.exp(-2))
        turn = torch.tensor([[math.cos(self.rate), -math.sin(self.rate)], [math.sin(self.rate), math.cos(self.rate)]])
        return grown @ turn.to(x).mT


MAPS = {"map-integral": Integral(), "map-flow": Flow()}
