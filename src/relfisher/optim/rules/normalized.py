"""The normalized step: the direction of the natural gradient, with fixed length."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from relfisher.optim.rules.base import Move, Step, StepRule, on_host
from relfisher.structures import Kept
from relfisher.validation import check_interval, check_rate

__all__ = ["Normalized", "NormalizedRule", "coherence"]

# The first gradients are not typical of the run: their sizes weigh less during this many steps.
_YOUNG = 500


class NormalizedRule(StepRule):
    """Steps whose length does not depend on the scale of gradients; they are longer while successive gradients agree.

    A step has the root mean square `lr * rms(move) * coherence`. The coherence is the norm of the layer's momentum,
    relative to what it would be on average if the same gradients were uncorrelated:

        ||sum_i b^i g_i|| / (sum_i b^2i ||g_i||^2)^1/2

    for the gradients g_i of i steps before, and the share b of the momentum that is kept. It is about 1 for noise, and
    grows with the root of the number of steps that agree, up to ((1 + b) / (1 - b))^1/2 for a constant
    gradient, 4.4 for b = 0.9. That is its upper bound here. Its lower bound is 1: steps are not shortened where
    gradients change their sign from one to the next. Without momentum it is 1.

    Once all samples are fitted, the remaining gradient is the noise of a few samples, and such steps would be a random
    walk. Each step therefore has a size: the norm of the tensor that it is computed from. If the size is below the
    share `noise_floor` of its geometric mean over the run, the step is shortened in proportion.

    Args:
        noise_floor: the share of the geometric mean of sizes below which steps are shortened; 0 never shortens steps.

    Raises:
        ValueError: if `noise_floor` is negative.
    """

    default_lr = 1e-2
    default_averaging = 0.1
    default_fit = "generalize"
    nesterov = True
    checks_finite = True

    def __init__(self, noise_floor: float = 0.1) -> None:
        check_interval("noise_floor", noise_floor, 0, math.inf)
        self.noise_floor = noise_floor

    @abstractmethod
    def rms(self, move: Move) -> float:
        """Return the root mean square of a layer's step, relative to the learning rate."""

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return what the lengths of steps depend on.

        "log_norm_stats" are the number of steps so far, the sum of their weights, and the weighted mean of their log
        sizes; "uncorrelated" is the root mean square norm of the momentum if gradients were uncorrelated.
        """
        return {
            "log_norm_stats": Kept((3,), on_host=True, dtype=torch.float32),
            "uncorrelated": Kept((), on_host=True, dtype=torch.float32),
        }

    def scaled(
        self, moves: Sequence[Move], directions: Sequence[Tensor], made_of: Sequence[Tensor]
    ) -> list[Step] | None:
        """Return steps along directions, or None if any is not finite.

        Args:
            moves: the moves.
            directions: one direction per move; a zero direction gives a zero step.
            made_of: the tensors whose norms are the sizes; they grow with the gradient, as directions may not.
        """
        if not directions:
            return []
        measured = [*directions, *(move.velocity for move in moves), *(move.latest for move in moves)]
        if made_of is not directions:
            measured += made_of
        norms = on_host(torch._foreach_norm(measured))
        if not all(map(math.isfinite, norms)):
            return None
        steps, count = [], len(moves)
        for place, (move, direction) in enumerate(zip(moves, directions, strict=True)):
            norm, velocity, latest, *own = norms[place::count]
            size = own[0] if own else norm
            length = move.lr * self.rms(move) * _coherence(move, velocity, latest) * self._shortening(move, size)
            steps.append(Step(direction, length * math.sqrt(direction.numel()) / norm if norm else 0.0))
        return steps

    def _shortening(self, move: Move, size: float) -> float:
        """Return the factor for a step of this size, at most 1, and update the statistics of sizes."""
        if size == 0:
            return 0.0
        kept = move.state["log_norm_stats"]
        count, total, mean = kept.tolist()
        weight = min(1.0, (count + 1) / _YOUNG) ** 2
        total += weight
        mean += weight / total * (math.log(size) - mean)
        kept.copy_(torch.tensor([count + 1, total, mean], dtype=kept.dtype))
        floor = self.noise_floor * math.exp(mean)
        return min(1.0, size / floor) if floor else 1.0


def _coherence(move: Move, velocity: float, latest: float) -> float:
    """Return the bounded coherence of a layer's gradients, given the norms of its momentum and its latest gradient."""
    kept = move.state["uncorrelated"]
    ratio, uncorrelated = coherence(velocity, latest, kept.item(), move.momentum)
    kept.fill_(uncorrelated)
    return ratio


def coherence(velocity: float, latest: float, uncorrelated: float, share: float) -> tuple[float, float]:
    """Return the bounded coherence of gradients, and what the norm of their momentum would be without any.

    Args:
        velocity: the norm of the momentum.
        latest: the norm of the latest gradient.
        uncorrelated: the second result of the step before; 0 before the first.
        share: the share of the momentum that is kept.

    Returns:
        Both, as in `NormalizedRule`.
    """
    uncorrelated = math.hypot(share * uncorrelated, latest)
    ratio = velocity / uncorrelated if uncorrelated else 1.0
    return min(max(1.0, ratio), math.sqrt((1 + share) / (1 - share))), uncorrelated


class Normalized(NormalizedRule):
    """D = M (G + damping)^-1 for each layer, scaled to the root mean square `relative_rms * lr`.

    The step does not depend on the scale of the loss, and a large gradient cannot make it long. The learning rate means
    the same as for Adam, whose steps have a root mean square of about 0.2 lr where gradients are mostly noise. Steps do
    not shrink further on their own unless gradients nearly vanish: use averaging, or decay the learning rate.

    Args:
        relative_rms: the root mean square of a layer's step, relative to the learning rate.
        noise_floor: see `NormalizedRule`.

    Raises:
        ValueError: if `relative_rms` is not positive, or `noise_floor` is negative.
    """

    name = "normalized"
    default_momentum = 0.9

    def __init__(self, relative_rms: float = 0.2, noise_floor: float = 0.1) -> None:
        super().__init__(noise_floor)
        check_rate("relative_rms", relative_rms)
        self.relative_rms = relative_rms

    def rms(self, move: Move) -> float:
        """Return the same for all layers."""
        return self.relative_rms

    def steps(self, moves: Sequence[Move]) -> list[Step] | None:
        """Return the steps, or None if a direction is not finite."""
        directions = [move.preconditioned() for move in moves]
        return self.scaled(moves, directions, directions)
