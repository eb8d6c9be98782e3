"""The normalised step: the natural gradient's direction, of a fixed length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from relfisher.optim.rules.base import Move, Step, StepRule
from relfisher.validation import check_positive

__all__ = ["Normalized", "scaled"]


class Normalized(StepRule):
    """D = M (G + damping)^-1 for each layer, scaled to the root mean square `rms * lr`.

    Nothing depends on the scale of the loss, and no gradient, however large, makes a long step; the learning rate means
    what it means for Adam, whose steps have a root mean square of about 0.2 lr. Steps do not shrink by themselves:
    average, or let the learning rate decay.

    Args:
        rms: of a layer's step, over the learning rate.

    Raises:
        ValueError: if it is not positive.
    """

    name = "normalized"
    default_lr = 3e-2
    default_averaging = 0.9
    nesterov = True

    def __init__(self, rms: float = 0.2) -> None:
        check_positive("rms", rms)
        self.rms = rms

    def steps(self, moves: Sequence[Move]) -> list[Step] | None:
        """Return the steps, unless a direction is not finite."""
        return scaled(moves, [move.structure.precondition(move.state, move.gradient) for move in moves], self.rms)


def scaled(moves: Sequence[Move], directions: Sequence[Tensor], rms: float) -> list[Step] | None:
    """Return steps along directions with the root mean square `rms * lr`, or None if one is not finite.

    Args:
        moves: what moves.
        directions: one a move; one of length 0 stays so.
        rms: over the learning rate.
    """
    if not directions:
        return []
    norms = [float(norm) for norm in torch._foreach_norm(list(directions))]
    if not all(map(math.isfinite, norms)):
        return None
    return [
        Step(direction, move.lr * rms * math.sqrt(direction.numel()) / norm if norm else 0.0)
        for move, direction, norm in zip(moves, directions, norms, strict=True)
    ]
