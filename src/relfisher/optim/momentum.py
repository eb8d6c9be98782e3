"""Momentum of a layer's gradient, applied before the metric, so that the step rule determines the step length."""

from __future__ import annotations

from torch import Tensor

from relfisher.structures import Kept

__all__ = ["Momentum"]


class Momentum:
    """The momentum of a layer's gradients."""

    @staticmethod
    def declares(shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the momentum tensor of a layer of the shape [*g, out, d]."""
        return {"momentum": Kept(shape)}

    @staticmethod
    def added(gradient: Tensor, last: Tensor | None, share: float, *, nesterov: bool) -> tuple[Tensor, Tensor]:
        """Return a gradient with momentum, and the new momentum, which is stored if the step is taken.

        Args:
            gradient: the new gradient.
            last: the momentum so far; None before the first step.
            share: the share of the momentum that is kept.
            nesterov: True adds the momentum to the gradient once more (Nesterov 1983).
        """
        if not share:
            return gradient, gradient
        velocity = gradient.clone() if last is None else gradient.add(last.to(gradient), alpha=share)
        return (gradient.add(velocity, alpha=share) if nesterov else velocity), velocity
