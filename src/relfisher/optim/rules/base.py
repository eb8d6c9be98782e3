"""What a step rule is given, and what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from relfisher.structures import Form, State, Structure
from relfisher.subsystems import Subsystem

__all__ = ["Move", "Step", "StepRule", "on_host"]


class Move(NamedTuple):
    """What a layer's step is made of.

    Attributes:
        layer: what moves.
        structure: how its metric is kept.
        state: where.
        gradient: with its momentum, [*g, out, d].
        velocity: the momentum that is kept if the step is taken.
        lr: the learning rate.
        annealing: the learning rate over the highest one so far, at most 1.
    """

    layer: Subsystem
    structure: Structure
    state: State
    gradient: Tensor
    velocity: Tensor
    lr: float
    annealing: float = 1.0


class Step(NamedTuple):
    """A layer moves by `-scale * direction`, [*g, out, d]."""

    direction: Tensor
    scale: float


class StepRule(ABC):
    """A way to step."""

    #: What it is called in `step_rule=`.
    name: ClassVar[str]
    #: What of the metric it needs.
    form: ClassVar[Form] = "inverse"
    #: The learning rate and averaging that it takes unless others are given.
    default_lr: ClassVar[float]
    default_averaging: ClassVar[float] = 0.0
    #: True looks ahead: the gradient is added to its own momentum once more (Nesterov 1983).
    nesterov: ClassVar[bool] = False

    def create(self) -> State:
        """Return what the rule keeps of a layer, on the host, before the first step; nothing by default."""
        return {}

    @abstractmethod
    def steps(self, moves: Sequence[Move]) -> list[Step] | None:
        """Return a step for each move, or None if one is not finite."""


def on_host(scalars: Sequence[Tensor]) -> list[float]:
    """Return scalars, of one device or several, as numbers; it is waited for them once."""
    if not scalars:
        return []
    numbers: list[float] = torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist()
    return numbers
