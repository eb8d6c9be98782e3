"""The trust region: the natural gradient step, of bounded length in the metric."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from relfisher.optim.rules.base import Move, Step, StepRule
from relfisher.validation import check_positive

__all__ = ["TrustRegion"]


class TrustRegion(StepRule):
    """D = (G + damping)^-1 M for each layer, all of them scaled by one number.

    The squared length of the whole step, lr^2 sum <D, M> over the layers, equation (10) in the damped metric, is at
    most `bound`. A step within it has the learning rate's own length, so that steps shrink with the gradient.

    Args:
        bound: on the squared length; None for no bound.

    Raises:
        ValueError: if the bound is not positive.
    """

    name = "trust-region"
    default_lr = 0.3

    def __init__(self, bound: float | None = 1e-2) -> None:
        if bound is not None:
            check_positive("trust_region", bound)
        self.bound = bound

    def steps(self, moves: Sequence[Move]) -> list[Step] | None:
        """Return the steps, unless their length is not finite or not positive."""
        directions = [move.structure.precondition(move.state, move.gradient) for move in moves]
        length = _squared_length(moves, directions)
        if not 0 <= length < math.inf:
            return None
        scale = 1.0 if self.bound is None or length <= self.bound else math.sqrt(self.bound / length)
        return [Step(direction, move.lr * scale) for move, direction in zip(moves, directions, strict=True)]


def _squared_length(moves: Sequence[Move], directions: Sequence[Tensor]) -> float:
    if not moves:
        return 0.0
    products = [
        move.lr**2 * torch.sum(direction * move.gradient) for move, direction in zip(moves, directions, strict=True)
    ]
    return float(torch.stack([product.to(products[0].device) for product in products]).sum())
