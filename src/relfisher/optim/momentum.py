"""Momentum of a layer's gradient, applied before the metric, so that the step rule determines the step length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from relfisher.optim.rules import Move
from relfisher.structures import Kept

__all__ = ["Momentum"]


class Momentum:
    """The momentum of a layer's gradients.

    Args:
        dtype: its dtype; None for that of the metric.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the momentum tensor of a layer of the shape [*g, out, d]."""
        return {"momentum": Kept(shape, dtype=self.dtype)}

    @staticmethod
    def added(moves: Sequence[Move], *, nesterov: bool) -> list[Move]:
        """Return moves with the momentum of their gradients; the new momentum is stored if the step is taken.

        Args:
            moves: the moves, whose states have the momentum so far, if there is any.
            nesterov: True adds the momentum to the gradient once more (Nesterov 1983).
        """
        found, alike = list(moves), defaultdict[float, list[int]](list)
        for place, move in enumerate(moves):
            if "momentum" in move.state:
                alike[move.momentum].append(place)
        for share, places in alike.items():
            latest = [moves[place].latest for place in places]
            velocities = torch._foreach_add(latest, [_so_far(moves[place]) for place in places], alpha=share)
            gradients = torch._foreach_add(latest, velocities, alpha=share) if nesterov else velocities
            for place, gradient, velocity in zip(places, gradients, velocities, strict=True):
                found[place] = moves[place]._replace(gradient=gradient, velocity=velocity)
        return found


def _so_far(move: Move) -> Tensor:
    """Return the momentum so far of layers, without what rounding has added along directions without a gradient.

    No softmax sees what is common to all classes, so that the gradients of heads have a mean of 0 over them. A rounded
    momentum has not, and what is small in all other directions is not small for a polar factor.
    """
    momentum: Tensor = move.state["momentum"]
    if not move.is_head or momentum.dtype == move.latest.dtype:
        return momentum
    precise = momentum.to(move.latest.dtype)
    return precise - precise.mean(-2, keepdim=True)
