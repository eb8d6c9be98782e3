"""Momentum of a layer's gradient, applied before the metric, so that the step rule determines the step length."""

from __future__ import annotations

import torch

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
    def added(move: Move, *, nesterov: bool) -> Move:
        """Return a move with the momentum of its gradient; the new momentum is stored if the step is taken.

        Args:
            move: the move, whose state has the momentum so far, if there is any.
            nesterov: True adds the momentum to the gradient once more (Nesterov 1983).
        """
        last, latest = move.state.get("momentum"), move.latest
        if last is None:
            return move
        velocity = latest.add(last, alpha=move.momentum)
        return move._replace(
            gradient=latest.add(velocity, alpha=move.momentum) if nesterov else velocity, velocity=velocity
        )
