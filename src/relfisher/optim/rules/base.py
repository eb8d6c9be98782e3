"""What a step rule is given, what it returns, and what it keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.structures import Kept, State, Structure

__all__ = ["Move", "Step", "StepRule", "on_host"]


class Move(NamedTuple):
    """What a layer's step is made of.

    Attributes:
        layer: the layer that moves.
        structure: how its metric is kept.
        state: the tensors of its metric, and those that the rule declares.
        gradient: with its momentum, [*g, out, d].
        velocity: the momentum that is kept if the step is taken.
        lr: the learning rate.
        annealing: the learning rate over the highest one so far, at most 1.
    """

    layer: Layer
    structure: Structure
    state: State
    gradient: Tensor
    velocity: Tensor
    lr: float
    annealing: float = 1.0

    def preconditioned(self) -> Tensor:
        """Return (G + damping)^-power times the gradient."""
        return self.structure.precondition(self.state, self.gradient)

    def whitened(self) -> Tensor:
        """Return R times the gradient, for a rule that needs roots."""
        return self.structure.whiten(self.state, self.gradient)

    def unwhitened(self, field: Tensor) -> Tensor:
        """Return R' times a field of whitened coordinates."""
        return self.structure.unwhiten(self.state, field)


class Step(NamedTuple):
    """A layer moves by `-scale * direction`, [*g, out, d]."""

    direction: Tensor
    scale: float


class StepRule(ABC):
    """A way to step.

    A rule of your own is a subclass with a `name`, a `default_lr` and `steps`; what it keeps from one step to the next
    it declares. `relfisher.testing.check_rule` checks it, `register_rule` lets it be chosen by its name.
    """

    #: Its name in `step_rule=`.
    name: ClassVar[str]
    #: True if it whitens gradients: the factors are then roots R of the inverse.
    needs_root: ClassVar[bool] = False
    #: The learning rate and averaging, unless others are given.
    default_lr: ClassVar[float]
    default_averaging: ClassVar[float] = 0.0
    #: True looks ahead: the gradient is added to its own momentum once more (Nesterov 1983).
    nesterov: ClassVar[bool] = False
    #: True if `steps` returns None whenever a gradient or a direction is not finite; else the optimizer checks both.
    checks_finite: ClassVar[bool] = False

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return what the rule keeps of a layer of the shape [*g, out, d], by its key; nothing by default.

        The tensors are zeros before the first step. `steps` finds them in the state of a move and writes them in place;
        they are saved, loaded and copied with the optimizer.
        """
        return {}

    @abstractmethod
    def steps(self, moves: Sequence[Move]) -> list[Step] | None:
        """Return a step for each move, or None to leave the step out."""


def on_host(scalars: Sequence[Tensor]) -> list[float]:
    """Return scalars, of one device or several, as numbers; it synchronizes with the device once."""
    if not scalars:
        return []
    numbers: list[float] = torch.stack([scalar.to(scalars[0].device) for scalar in scalars]).tolist()
    return numbers
