"""What a running metric can do: gather a batch's statistics, refresh its inverse, precondition a gradient.

A structure is a way to keep the metric G of one layer. It owns no tensors: the state of a layer is a flat dictionary
of tensors, so that the optimizer's `state_dict` holds all of it, and a structure is the algorithm that reads and
writes it. The three steps are separate, since they are due at different times.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from relfisher.responses import UnitResponse
from relfisher.shapes import Float
from relfisher.validation import check_interval

__all__ = ["Damping", "State", "Structure", "invert"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Damping:
    """What is added to a metric's diagonal before it is inverted.

    Args:
        value: the multiple of the trace, >= 0.
        per_parameter: True divides the trace by the number of parameters of a block, so that `value` is relative to
            the mean eigenvalue; False takes the trace itself, as the published preset does.
        pooled: True takes the trace averaged over a layer's blocks, so that a block that is near 0, as that of a dead
            unit, is damped as much as its neighbours; False takes each block's own.

    Raises:
        ValueError: if `value` is negative or not finite.
    """

    value: float
    per_parameter: bool = True
    pooled: bool = True

    def __post_init__(self) -> None:
        check_interval("damping", self.value, 0, math.inf)

    def of(self, blocks: Float[Tensor, "*q d d"]) -> Float[Tensor, "*q"]:
        """Return the number to add to each block's diagonal."""
        trace = blocks.diagonal(dim1=-2, dim2=-1).sum(-1)
        if self.pooled:
            trace = trace.mean().expand(trace.shape)
        return trace * (self.value / blocks.shape[-1] if self.per_parameter else self.value)


def invert(blocks: Float[Tensor, "*q d d"], damping: Float[Tensor, "*q"]) -> tuple[Float[Tensor, "*q d d"], bool]:
    """Invert symmetric positive definite blocks by Cholesky factors.

    Args:
        blocks: the matrices.
        damping: what is added to the diagonal of each.

    Returns:
        The inverses, and whether all of them are good: False, and anything, if a factorisation failed or a value is
        not finite.
    """
    damped = blocks.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool((info != 0).any()):
        return damped, False
    inverse = torch.cholesky_inverse(factor)
    return inverse, bool(torch.isfinite(inverse).all())


class Structure(ABC):
    """A way to keep the running metric of one layer, whose parameters are a matrix [out, d] with the bias last."""

    @abstractmethod
    def gather(self, augmented: Float[Tensor, "n d"], z: Float[Tensor, "n out"], response: UnitResponse) -> Tensor:
        """Return the metric of one batch, summed over its samples, in this structure's own shape."""

    @abstractmethod
    def shape(self, out: int, d: int) -> tuple[int, ...]:
        """Return the shape of the metric of a layer with `out` units and `d` augmented inputs."""

    @abstractmethod
    def precondition(self, state: State, gradient: Float[Tensor, "out d"]) -> Float[Tensor, "out d"]:
        """Return (G + damping)^-1 times the gradient, with the inverse of the last good refresh."""

    def create(self, weight: Tensor, out: int, d: int, *, identity: bool) -> State:
        """Return the state of a layer that has seen nothing.

        Args:
            weight: the layer's weight, for the dtype and device.
            out: the number of units.
            d: the number of augmented inputs.
            identity: True starts the average at the identity, with full weight, as published; False at 0 with no
                weight, so that the average is unbiased from the first batch on.

        Returns:
            The average "metric", the weight "mass" that it has gathered, and "inverse", the identity.
        """
        dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
        eye = torch.eye(d, dtype=dtype, device=weight.device).expand(self.shape(out, d))
        return {
            "metric": eye.clone() if identity else torch.zeros_like(eye),
            "mass": torch.tensor(1.0 if identity else 0.0, dtype=dtype),
            "inverse": eye.clone(),
        }

    def update(self, state: State, total: Tensor, samples: int, decay: float) -> bool:
        """Fold a batch's metric into the moving average, unless it is not finite.

        Args:
            state: the layer's state.
            total: what `gather` returned, [*q, d, d], summed over batches where there are several.
            samples: how many samples it is a sum over.
            decay: the share of the past that is kept.

        Returns:
            Whether the batch was folded in.
        """
        # An entry of a positive semi-definite matrix is bounded by its diagonal.
        if not bool(torch.isfinite(total.diagonal(dim1=-2, dim2=-1)).all()):
            return False
        state["metric"].mul_(decay).add_(total, alpha=(1 - decay) / samples)
        state["mass"].mul_(decay).add_(1 - decay)
        return True

    def refresh(self, state: State, damping: Damping) -> bool:
        """Recompute the inverse from the moving average; a failure leaves the last good one in use.

        Args:
            state: the layer's state.
            damping: what is added to the diagonal.

        Returns:
            Whether all is well: False if the metric could not be factorised.
        """
        if float(state["mass"]) == 0:
            return True  # nothing was gathered yet
        metric = state["metric"] / state["mass"].to(state["metric"].device)
        inverse, good = invert(metric, damping.of(metric))
        if good:
            state["inverse"].copy_(inverse)
        return good
