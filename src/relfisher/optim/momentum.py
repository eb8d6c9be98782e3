"""Momentum of a layer's gradient, applied before the metric, so that the step rule sets the length of the step."""

from __future__ import annotations

from torch import Tensor

from relfisher.structures import Kept

__all__ = ["Momentum"]


class Momentum:
    """What is kept of a layer's gradients, and how it is added to a new one."""

    @staticmethod
    def declares(shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the momentum of a layer of the shape [*g, out, d]."""
        return {"momentum": Kept(shape)}

    @staticmethod
    def added(gradient: Tensor, last: Tensor | None, share: float, *, nesterov: bool) -> tuple[Tensor, Tensor]:
        """Return a gradient with its momentum, and the momentum that is kept if the step is taken.

        Args:
            gradient: new.
            last: the momentum so far; None before the first step.
            share: of it that is kept.
            nesterov: True adds the momentum to the gradient once more (Nesterov 1983).
        """
        if not share:
            return gradient, gradient
        velocity = gradient.clone() if last is None else gradient.add(last, alpha=share)
        return (gradient.add(velocity, alpha=share) if nesterov else velocity), velocity
