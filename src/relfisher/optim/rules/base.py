"""The interface of a step rule: its inputs, its results and its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.structures import Kept, State, Structure

__all__ = ["Joint", "Move", "Step", "StepRule", "by_device", "norms"]


class Move(NamedTuple):
    """The inputs for the step of layers of equal shape, which are computed together.

    The first axis of every tensor counts the layers.

    Attributes:
        layers: the layers.
        structure: a structure that applies the factors of each layer as its own does.
        state: the factors of their metrics, and the tensors that the rule declares, [layers, ...].
        gradient: the gradients with momentum, [layers, *g, out, d].
        velocity: the momenta that are stored if the step is taken.
        latest: the gradients without momentum.
        momentum: the share of the momentum that is kept from one step to the next.
        lr: the learning rate.
        annealing: the ratio of the learning rate to the highest one so far, at most 1.
        flat: True if the metric leaves gradients as they are: it has the power 0.
        is_head: True if the outputs of the layers are the logits of a softmax.
    """

    layers: tuple[Layer, ...]
    structure: Structure
    state: State
    gradient: Tensor
    velocity: Tensor
    latest: Tensor
    momentum: float
    lr: float
    annealing: float = 1.0
    flat: bool = False
    is_head: bool = False

    def preconditioned(self) -> Tensor:
        """Return (G + damping)^-power times the gradient."""
        return self.gradient if self.flat else self.structure.precondition(self.state, self.gradient)

    def whitened(self) -> Tensor:
        """Return R times the gradient, for rules that need roots."""
        return self.gradient if self.flat else self.structure.whiten(self.state, self.gradient)

    def unwhitened(self, field: Tensor) -> Tensor:
        """Return R' times a field in whitened coordinates."""
        return field if self.flat else self.structure.unwhiten(self.state, field)


class Step(NamedTuple):
    """The step of the layers of a move: they move by `-scale * direction`.

    Attributes:
        direction: the directions, [layers, *g, out, d].
        scale: one number for all layers, or one for each, [layers].
        is_finite: whether it can be taken, a boolean on the device, []; None lets the optimizer check that gradient and
            direction are finite.
    """

    direction: Tensor
    scale: float | Tensor
    is_finite: Tensor | None = None

    def change(self) -> Tensor:
        """Return what is subtracted from the layers' matrices."""
        scale = self.scale
        if not isinstance(scale, Tensor):
            return self.direction if scale == 1 else self.direction * scale
        return self.direction * scale.to(self.direction.dtype).view(-1, *(1,) * (self.direction.ndim - 1))


class StepRule(ABC):
    """The base class of step rules.

    To add a rule, define a subclass with a `name`, a `default_lr` and `steps`, and declare any tensors that it keeps
    between steps. `relfisher.testing.check_rule` checks it; `register_rule` makes it available by name.
    """

    #: The name in `step_rule=`.
    name: ClassVar[str]
    #: True if the rule whitens gradients; the factors are then roots R of the inverse.
    needs_root: ClassVar[bool] = False
    #: The default learning rate, momentum and averaging.
    default_lr: ClassVar[float]
    default_momentum: ClassVar[float] = 0.0
    default_averaging: ClassVar[float] = 0.0
    #: The default of `fit`; a decay of weights needs a rule whose steps do not vanish.
    default_fit: ClassVar[str] = "plain"
    #: True for Nesterov momentum: the gradient is added to its own momentum once more (Nesterov 1983).
    nesterov: ClassVar[bool] = False
    #: True if the step of a layer depends on that layer alone, so that processes may share out the work.
    is_layerwise: ClassVar[bool] = False

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the rule's tensors for a layer of the shape [*g, out, d], by key; none by default.

        The tensors are zero before the first step. `steps` finds those of all layers of a move in its state, and
        updates them in place; if the step is not taken, the optimizer restores them. They are saved, loaded and copied
        with the optimizer.
        """
        return {}

    @abstractmethod
    def steps(self, moves: Sequence[Move]) -> list[Step]:
        """Return one step per move. Whatever waits for numbers of the device, such as `float()`, makes it slow."""

    def checked_steps(self, moves: Sequence[Move]) -> list[Step]:
        """Return `steps`, or raise ValueError if there is not one per move."""
        steps = self.steps(moves)
        if len(steps) != len(moves):
            name = type(self).__name__
            raise ValueError(f"{name}.steps must return a step a move, got {len(steps)} for {len(moves)}")
        return steps


def by_device(moves: Sequence[Move]) -> list[list[int]]:
    """Return the places of moves on each device, so that their numbers can be computed together."""
    places: dict[torch.device, list[int]] = {}
    for place, move in enumerate(moves):
        places.setdefault(move.gradient.device, []).append(place)
    return list(places.values())


class Joint(NamedTuple):
    """What is kept of the layers of several moves, as one tensor.

    Attributes:
        whole: the tensor, [all layers, ...].
        parts: the tensors of the moves if it is a copy of them; none if they are its parts.
    """

    whole: Tensor
    parts: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, moves: Sequence[Move], key: str) -> Joint:
        """Return it for a key of the moves' states."""
        parts = [move.state[key] for move in moves]
        whole = parts[0]._base  # as the optimizer keeps small tensors
        if whole is not None and not [None for part in parts if part._base is not whole or part.ndim != whole.ndim]:
            starts = [part.storage_offset() for part in parts]
            if starts == sorted(starts) and whole.numel() == sum(part.numel() for part in parts):
                return cls(whole)
        return cls(torch.cat(parts), tuple(parts))

    def keep(self, new: Tensor) -> None:
        """Replace it."""
        if self.parts:
            torch._foreach_copy_(self.parts, new.split_with_sizes([len(part) for part in self.parts]))
        else:
            self.whole.copy_(new)


def norms(fields: Sequence[Tensor]) -> Tensor:
    """Return the norms of the layers of several moves, [all layers]."""
    return torch.stack(torch._foreach_norm([own for field in fields for own in _layers(field)]))


def _layers(field: Tensor) -> Sequence[Tensor]:
    return (field,) if field.shape[0] == 1 else field.unbind(0)
