"""The normalized step: the direction of the natural gradient, with fixed length."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from relfisher.optim.rules.base import Joint, Move, Step, StepRule, by_device, norms
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
    is_layerwise = True

    def __init__(self, noise_floor: float = 0.1) -> None:
        check_interval("noise_floor", noise_floor, 0, math.inf)
        self.noise_floor = noise_floor

    @abstractmethod
    def rms(self, move: Move) -> float:
        """Return the root mean square of the steps of a move's layers, relative to the learning rate."""

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return what the lengths of steps depend on.

        "log_norm_stats" are the number of steps so far, the sum of their weights, and the weighted mean of their log
        sizes; "uncorrelated" is the root mean square norm of the momentum if gradients were uncorrelated.
        """
        return {
            "log_norm_stats": Kept((3,), dtype=torch.float32),
            "uncorrelated": Kept((), dtype=torch.float32),
        }

    def scaled(self, moves: Sequence[Move], directions: Sequence[Tensor], made_of: Sequence[Tensor]) -> list[Step]:
        """Return steps along directions.

        Args:
            moves: the moves.
            directions: the directions of each move; a zero direction gives a zero step.
            made_of: the tensors whose norms are the sizes; they grow with the gradient, as directions may not.
        """
        steps: dict[int, Step] = {}
        for places in by_device(moves):
            own = [moves[place] for place in places]
            fields = [directions[place] for place in places]
            if made_of is not directions:
                fields += [made_of[place] for place in places]
            measured = norms([*fields, *(move.velocity for move in own), *(move.latest for move in own)])
            is_finite = measured.amax() < math.inf
            rows = measured.view(-1, sum(len(move.layers) for move in own)).unbind()
            scales = self._scales(own, rows[0], *rows[-3:])
            steps |= {
                place: Step(directions[place], scale, is_finite) for place, scale in zip(places, scales, strict=True)
            }
        return [steps[place] for place in range(len(moves))]

    def _scales(
        self, moves: Sequence[Move], lengths: Tensor, sizes: Tensor, velocities: Tensor, latest: Tensor
    ) -> Sequence[Tensor]:
        """Return the factors of directions of these lengths, for the layers of each move."""
        counts = [len(move.layers) for move in moves]
        before, stats = Joint.of(moves, "uncorrelated"), Joint.of(moves, "log_norm_stats")
        longer, uncorrelated = coherence(velocities, latest, before.whole, _share(moves, latest))
        new, shortening = self._shortening(stats.whole, sizes)
        before.keep(uncorrelated)
        stats.keep(new)
        scales = (longer * shortening / lengths).nan_to_num(0.0, 0.0)
        full = [move.lr * self.rms(move) * _root(move) for move in moves]
        return torch._foreach_mul(scales.split_with_sizes(counts), full)

    def _shortening(self, stats: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the new statistics of the sizes of steps, and the factors of these steps, which are at most 1."""
        count, total, mean = stats.unbind(1)
        count = count + 1
        weight = (count / _YOUNG).clamp(max=1.0).square()
        total = total + weight
        mean = torch.addcmul(mean, weight / total, sizes.log() - mean)
        moves = sizes > 0
        new = torch.stack([count, total, mean], 1).where(moves.unsqueeze(1), stats)
        # What is kept, and is not finite, has no effect.
        return new, (sizes / (self.noise_floor * mean.exp())).nan_to_num(1.0).clamp(max=1.0).where(moves, 0.0)


def _share(moves: Sequence[Move], like: Tensor) -> float | Tensor:
    """Return the share of the momentum that is kept: one number, which no device waits for, unless layers differ."""
    shares = [move.momentum for move in moves for _ in move.layers]
    return shares[0] if len(set(shares)) == 1 else like.new_tensor(shares)


def _root(move: Move) -> float:
    """Return the root of the number of parameters of a layer."""
    return math.sqrt(math.prod(move.layers[0].shape))


def coherence(velocity: Tensor, latest: Tensor, uncorrelated: Tensor, share: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return the bounded coherence of gradients, and what the norm of their momentum would be without any.

    Args:
        velocity: the norms of the momenta of several layers.
        latest: the norms of the latest gradients.
        uncorrelated: the second result of the step before; 0 before the first.
        share: the share of the momentum that is kept.

    Returns:
        Both, as in `NormalizedRule`. What is not finite gives a coherence of 1.
    """
    uncorrelated = torch.hypot(share * uncorrelated, latest)
    ratio = (velocity / uncorrelated).nan_to_num(1.0, posinf=1.0)
    most = ((1 + share) / (1 - share)) ** 0.5
    return (ratio.clamp(1.0, most) if isinstance(most, float) else ratio.clamp(min=1.0).minimum(most)), uncorrelated


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

    def steps(self, moves: Sequence[Move]) -> list[Step]:
        """Return the steps."""
        directions = [move.preconditioned() for move in moves]
        return self.scaled(moves, directions, directions)
