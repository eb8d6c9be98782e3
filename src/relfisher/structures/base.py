"""What a running metric can do: gather a batch's statistics, refresh its inverse, precondition a gradient.

A structure is a way to keep the metric G of one layer, whose parameters are a matrix [out, d] with the bias last, or
[groups, out, d] where groups of units have inputs of their own. It owns no tensors: the state of a layer is a flat
dictionary of tensors, so that the optimizer's `state_dict` holds all of it, and a structure is the algorithm that reads
and writes it. The steps are separate, since they are due at different times.

What is inverted is kept in one of two forms: as the inverse, for steps that need no more, or as its root R with
R'R = (G + damping)^-1, for steps that whiten a gradient first. Either is a matrix, or of low rank for a wide block.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from relfisher.responses import UnitResponse
from relfisher.shapes import Float
from relfisher.structures.lowrank import LowRank, invert_leading
from relfisher.validation import check_interval

__all__ = ["Cost", "Damping", "Form", "State", "Structure", "invert"]

State = dict[str, Tensor]
Form = Literal["inverse", "root"]


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

    def of(self, diagonals: Float[Tensor, "*q d"]) -> Float[Tensor, "*q"]:
        """Return the number to add to the diagonal of each block, given the diagonals."""
        trace = diagonals.sum(-1)
        if self.pooled:
            trace = trace.mean().expand(trace.shape)
        return trace * (self.value / diagonals.shape[-1] if self.per_parameter else self.value)

    def split(self) -> Damping:
        """Return the damping of each of two Kronecker factors, whose product then has this one's on its diagonal."""
        return Damping(math.sqrt(self.value), self.per_parameter, self.pooled)


class Cost(NamedTuple):
    """Floating-point operations of one layer: of a step, a refresh, and the statistics of one sample."""

    step: int
    refresh: int
    sample: int


def invert(
    blocks: Float[Tensor, "*q d d"], damping: Float[Tensor, "*q"], form: Form = "inverse"
) -> tuple[Float[Tensor, "*q d d"], bool]:
    """Invert symmetric positive definite blocks by Cholesky factors.

    Args:
        blocks: the matrices.
        damping: what is added to the diagonal of each.
        form: "inverse", or "root" for the inverse of the lower Cholesky factor.

    Returns:
        The inverses, and whether all of them are good: False, and anything, if a factorisation failed or a value is
        not finite.
    """
    damped = blocks.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    factor, info = torch.linalg.cholesky_ex(damped)
    if bool((info != 0).any()):
        return damped, False
    if form == "inverse":
        inverse = torch.cholesky_inverse(factor)
    else:
        eye = torch.eye(blocks.shape[-1], dtype=blocks.dtype, device=blocks.device)
        inverse = torch.linalg.solve_triangular(factor, eye, upper=False)
    return inverse, bool(torch.isfinite(inverse).all())


# A low rank pays where it is at most this part of a block's width.
_NARROWEST = 8


class Structure(ABC):
    """A way to keep the running metric of one layer.

    Attributes:
        rank: of the inverses of blocks at least eight times as wide, which are then those of the leading eigenvectors;
            None inverts every block as it is.
    """

    #: What it is called in `structure=` and in tables.
    name: ClassVar[str]
    #: What the tensors are called that the metric is kept in: the keys of `shapes`.
    tensors: ClassVar[tuple[str, ...]] = ("metric",)
    rank: int | None = None

    @abstractmethod
    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor that the metric of parameters of the shape [*g, out, d] is kept in.

        Its keys are `tensors`: the first of them is called "metric", another one as the structure likes.
        """

    @abstractmethod
    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Return the leading terms of what parameters of the shape [*g, out, d] cost."""

    @abstractmethod
    def gather(self, x: Float[Tensor, "*g n d"], z: Float[Tensor, "*g n out"], response: UnitResponse) -> State:
        """Return the metric of one batch, summed over its samples.

        Args:
            x: the augmented inputs.
            z: the pre-activations.
            response: what the units say.

        Returns:
            A tensor for each of `shapes`.
        """

    @abstractmethod
    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Any]) -> Float[Tensor, "*g out d"]:
        """Multiply the rows of a field, from the right, by blocks of the shapes of this structure, or low ranks."""

    def layout(self, shape: tuple[int, ...], form: Form = "inverse") -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor that a state holds besides its mass: the metric and its inverse."""
        kept = self.shapes(shape)
        inverses: dict[str, tuple[int, ...]] = {}
        for name, size in kept.items():
            key = _inverted(name, form)
            if self.is_low_rank(size[-1]):
                inverses |= {key: (*size[:-1], int(self.rank or 0)), _scale(key): size[:-2]}
            else:
                inverses[key] = size
        return kept | inverses

    def label(self, shape: tuple[int, ...]) -> str:
        """Return the name, with the rank if one of the layer's inverses is of low rank."""
        low = any(self.is_low_rank(size[-1]) for size in self.shapes(shape).values())
        return f"{self.name}, rank {self.rank}" if low else self.name

    def is_low_rank(self, d: int) -> bool:
        """Return whether the inverse of a block of this width is kept by its leading eigenvectors."""
        return self.rank is not None and d >= _NARROWEST * self.rank

    def product_cost(self, d: int) -> int:
        """Return the operations of a row times the inverse of a block of this width."""
        return 4 * d * int(self.rank or 0) if self.is_low_rank(d) else 2 * d**2

    def inversion_cost(self, d: int) -> int:
        """Return the operations of inverting a block of this width."""
        return 6 * d**2 * int(self.rank or 0) if self.is_low_rank(d) else d**3

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Return how many numbers the metric of parameters of the shape [*g, out, d] and its inverse take."""
        return sum(math.prod(each) for each in self.layout(shape).values())

    def create(
        self, weight: Tensor, shape: tuple[int, ...], *, identity: bool = False, form: Form = "inverse"
    ) -> State:
        """Return the state of a layer that has seen nothing.

        Args:
            weight: the layer's weight, for the dtype and device.
            shape: [*g, out, d], that of its parameters.
            identity: True starts the average at the identity, with full weight, as published; False at 0 with no
                weight, so that the average is unbiased from the first batch on.
            form: how the inverse is kept.

        Returns:
            The average "metric", and other tensors of `shapes`, the weight "mass" that they have gathered, and for
            each tensor its "inverse" or "root" (with the tensor's name in front for all but the first), the identity.
            One of low rank is its basis V and a "scale", which stand for scale * (I - V V').
        """
        dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
        state: State = {"mass": torch.tensor(1.0 if identity else 0.0, dtype=dtype)}
        layout = self.layout(shape, form)
        for name, size in self.shapes(shape).items():
            key = _inverted(name, form)
            one = self.identity(size, dtype, weight.device)
            state[name] = one.clone() if identity else torch.zeros_like(one)
            if _scale(key) in layout:
                state[key] = torch.zeros(layout[key], dtype=dtype, device=weight.device)
                state[_scale(key)] = torch.ones(layout[_scale(key)], dtype=dtype, device=weight.device)
            else:
                state[key] = one
        return state

    def identity(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor of this size that stands for the identity."""
        return torch.eye(size[-1], dtype=dtype, device=device).expand(size).clone()

    def update(self, state: State, totals: State, samples: int, decay: float) -> bool:
        """Fold a batch's metric into the moving average, unless it is not finite.

        Args:
            state: the layer's state.
            totals: what `gather` returned, summed over batches where there are several.
            samples: how many samples it is a sum over.
            decay: the share of the past that is kept.

        Returns:
            Whether the batch was folded in.
        """
        # An entry of a positive semi-definite matrix is bounded by its diagonal.
        if not all(math.isfinite(float(self.diagonals(total).sum())) for total in totals.values()):
            return False
        weight = (1 - decay) / samples
        for name, total in totals.items():
            state[name].mul_(decay).add_(total, alpha=weight)
        self.age(state, decay)
        return True

    def fold(
        self,
        state: State,
        x: Float[Tensor, "*g n d"],
        z: Float[Tensor, "*g n out"],
        response: UnitResponse,
        decay: float,
    ) -> bool:
        """Fold a batch into the moving average: as `update` does with what `gather` returns, in fewer passes.

        Args:
            state: the layer's state.
            x: the augmented inputs.
            z: the pre-activations.
            response: what the units say.
            decay: the share of the past that is kept.

        Returns:
            Whether the batch was folded in.
        """
        return self.update(state, self.gather(x, z, response), x.shape[-2], decay)

    def age(self, state: State, decay: float) -> None:
        """Let the weight of the past decay by one batch."""
        state["mass"].mul_(decay).add_(1 - decay)

    def refresh(self, state: State, damping: Damping, frozen: Tensor | None = None) -> bool:
        """Recompute the inverse, or its root, from the moving average; a failure leaves the last good one in use.

        Args:
            state: the layer's state.
            damping: what is added to the diagonal.
            frozen: True for the columns [d] that do not move, which are then no part of the metric.

        Returns:
            Whether all is well: False if the metric could not be factorised.
        """
        mass = float(state["mass"])
        if mass == 0 or (frozen is not None and bool(frozen.all())):
            return True  # nothing was gathered yet, or nothing moves
        form: Form = "root" if "root" in state else "inverse"
        each = damping.split() if len(self.tensors) > 1 else damping
        found: State = {}
        for name in self.tensors:
            key = _inverted(name, form)
            metric = state[name] / mass
            diagonals = self.diagonals(metric)
            if frozen is not None and name == "metric":
                diagonals = diagonals[..., ~frozen]
                metric = self.without(metric, frozen)
            if not bool(diagonals.any()):
                return True  # nothing yet: the next layer's weights are 0, or no unit was active
            if _scale(key) in state:
                (found[key], found[_scale(key)]), good = invert_leading(
                    metric, each.of(diagonals), state[key], root=form == "root"
                )
            else:
                found[key], good = self.inverted(metric, each.of(diagonals), form)
            if not good:
                return False
        for key, inverse in found.items():
            state[key].copy_(inverse)
        return True

    def diagonals(self, blocks: Tensor) -> Tensor:
        """Return the diagonals [*q, d] of blocks."""
        return blocks.diagonal(dim1=-2, dim2=-1)

    def without(self, blocks: Tensor, columns: Tensor) -> Tensor:
        """Return the blocks with those columns and rows replaced by the identity's."""
        kept = (~columns).to(blocks.dtype)
        return blocks * kept * kept.unsqueeze(-1) + torch.diag(1 - kept)

    def inverted(self, blocks: Tensor, damping: Tensor, form: Form) -> tuple[Tensor, bool]:
        """Return the damped blocks' inverses or their roots, and whether all of them are good."""
        return invert(blocks, damping, form)

    def precondition(self, state: State, gradient: Float[Tensor, "*g out d"]) -> Float[Tensor, "*g out d"]:
        """Return (G + damping)^-1 times the gradient, as of the last good refresh."""
        if "root" in state:
            return self.unwhiten(state, self.whiten(state, gradient))
        return self.apply(gradient, self._factors(state, "inverse"))

    def whiten(self, state: State, gradient: Float[Tensor, "*g out d"]) -> Float[Tensor, "*g out d"]:
        """Return R times the gradient, where R'R = (G + damping)^-1 as of the last good refresh."""
        roots = self._factors(state, "root")
        # One of low rank is symmetric.
        turned = {name: self.transposed(root) if isinstance(root, Tensor) else root for name, root in roots.items()}
        return self.apply(gradient, turned)

    def unwhiten(self, state: State, field: Float[Tensor, "*g out d"]) -> Float[Tensor, "*g out d"]:
        """Return R' times a field of whitened coordinates."""
        return self.apply(field, self._factors(state, "root"))

    def transposed(self, blocks: Tensor) -> Tensor:
        """Return the blocks' transposes."""
        return blocks.mT

    def _factors(self, state: State, form: Form) -> dict[str, Tensor | LowRank]:
        factors: dict[str, Tensor | LowRank] = {}
        for name in self.tensors:
            key = _inverted(name, form)
            inverse, scale = state[key], state.get(_scale(key))
            factors[name] = inverse if scale is None else LowRank(inverse, scale)
        return factors


def _inverted(name: str, form: Form) -> str:
    """Return the key of the inverse of the tensor with this name."""
    return form if name == "metric" else f"{name}_{form}"


def _scale(key: str) -> str:
    """Return the key of the scale of an inverse of low rank."""
    return f"{key}_scale"
