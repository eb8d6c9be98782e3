"""The trust region: the natural gradient step of each layer, with bounded length in the metric."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from relfisher.optim.rules.base import Move, Step, StepRule, by_device
from relfisher.validation import check_positive

__all__ = ["TrustRegion"]


class TrustRegion(StepRule):
    """D = (G + damping)^-1 M for each layer, shortened if it moves the layer's response too far.

    The squared length of a layer's step in the damped metric, equation (10), is lr^2 <D, M>. To second order it is
    twice the Kullback-Leibler divergence between the layer's responses before and after the step, or more because of
    the damping. It is at most `bound`, regardless of other layers. A step within the bound keeps the length given by
    the learning rate, so that steps shrink with the gradient. If a scheduler lowers the learning rate, the maximum
    length shrinks in proportion, so that the schedule affects every step.

    Args:
        bound: the bound on the squared length of each layer's step; None for no bound.

    Raises:
        ValueError: if the bound is not positive.
    """

    name = "trust-region"
    default_lr = 0.3
    is_layerwise = True

    def __init__(self, bound: float | None = 2e-3) -> None:
        if bound is not None:
            check_positive("bound", bound)
        self.bound = bound

    def steps(self, moves: Sequence[Move]) -> list[Step]:
        """Return the steps, which are not taken if a squared length is negative or not finite."""
        directions = [move.preconditioned() for move in moves]
        lengths = [_squared_lengths(move, each) for move, each in zip(moves, directions, strict=True)]
        steps: dict[int, Step] = {}
        for places in by_device(moves):
            joint = torch.cat([lengths[place] for place in places])
            is_finite = ((joint >= 0) & (joint < math.inf)).all()
            for place in places:
                scale = moves[place].lr * self._shortening(moves[place], lengths[place])
                steps[place] = Step(directions[place], scale, is_finite)
        return [steps[place] for place in range(len(moves))]

    def _shortening(self, move: Move, lengths: Tensor) -> Tensor:
        """Return the factors that shorten steps of the given squared lengths."""
        bound = math.inf if self.bound is None else self.bound * move.annealing**2
        return (bound / lengths).sqrt().clamp(max=1.0)


def _squared_lengths(move: Move, direction: Tensor) -> Tensor:
    return move.lr**2 * (direction * move.gradient).flatten(1).sum(1)
