"""The contract of a structure: statistics -> average -> invert -> apply, and the running metric as an operator.

A structure is a way to keep the metric G of one layer, whose parameters are a matrix [out, d] with the bias last, or
[groups, out, d] if groups of units have inputs of their own. It holds no tensors: a layer's state is a flat dictionary
of tensors, whose names and shapes the structure declares. The steps are separate: they are due at different times.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from relfisher.metric import Metric
from relfisher.shapes import Float
from relfisher.structures.inverse import Factor, Inversion, LowRank, is_low_rank
from relfisher.structures.operator import AppliedMetric
from relfisher.structures.state import Cost, Kept, Samples, State, Statistics

__all__ = ["Structure"]


class Structure(ABC):
    """A way to keep the running metric of one layer.

    Attributes:
        rank: of the inverses of blocks at least eight times as wide, which are then inverted along their leading
            eigenvectors; None inverts every block in full.
    """

    #: Its name in `structure=` and in tables.
    name: ClassVar[str]
    #: The names of the tensors that hold the metric: the keys of `shapes`. The first one is called "metric".
    tensors: ClassVar[tuple[str, ...]] = ("metric",)
    #: True if `accumulate` takes sparse inputs.
    reads_sparse: ClassVar[bool] = False
    rank: int | None = None

    @abstractmethod
    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shape of each of `tensors` for parameters of the shape [*g, out, d]."""

    @abstractmethod
    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Return the leading terms of the cost for parameters of the shape [*g, out, d]."""

    @abstractmethod
    def accumulate(self, totals: State, samples: Samples, *, keep: float, share: float) -> bool:
        """Replace totals by keep * totals + share * (the metric summed over samples), in place, if that is finite.

        Args:
            totals: `tensors`; with keep = 0 they may hold anything.
            samples: of a batch.
            keep: the factor of what is there.
            share: the factor of the sum.

        Returns:
            Whether the sum is finite; False leaves the totals as they were.
        """

    @abstractmethod
    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Factor]) -> Float[Tensor, "*g out d"]:
        """Multiply the rows of a field, from the right, by matrices of this structure: the metric, or its factors."""

    # The rest follows for a metric that is held as dense blocks.

    def declares(self, shape: tuple[int, ...], *, root: bool) -> dict[str, Kept]:
        """Return everything that the state of a layer holds: the metric, its factors, and the average's weight.

        Args:
            shape: [*g, out, d] of the parameters.
            root: True if the factors are roots of the inverse.

        Returns:
            "ema_weight", each of `tensors`, and for each of them its "inverse" or "root" (with the tensor's name in
            front for all but the first). A factor of low rank is a basis V and a "scale", for scale * (I - V V').
        """
        kept = {"ema_weight": Kept((), on_host=True)}
        for name, size in self.shapes(shape).items():
            kept[name] = Kept(size)
            key = factor_key(name, root=root)
            if is_low_rank(self.rank, size[-1]):
                kept[key], kept[_scale(key)] = Kept((*size[:-1], int(self.rank or 0))), Kept(size[:-2])
            else:
                kept[key] = Kept(size)
        return kept

    def create(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, identity: bool, root: bool
    ) -> State:
        """Return the state of a layer without statistics.

        Args:
            shape: [*g, out, d] of the parameters.
            dtype: of the metric.
            device: of the metric.
            identity: True starts the average at the identity with full weight, as published; False at 0 with no
                weight, so that the average has no bias from the first batch on.
            root: True if the factors are roots of the inverse.

        Returns:
            What `declares` says. The factors are identities.
        """
        state = {key: kept.zeros(dtype, device) for key, kept in self.declares(shape, root=root).items()}
        state["ema_weight"].fill_(float(identity))
        for name, size in self.shapes(shape).items():
            key = factor_key(name, root=root)
            if _scale(key) in state:
                state[_scale(key)].fill_(1.0)
            else:
                state[key].copy_(self.identity(size, dtype, device))
            if identity:
                state[name].copy_(self.identity(size, dtype, device))
        return state

    def batch_statistics(self, samples: Samples) -> Statistics:
        """Return the metric of a batch, summed over its samples; NaN if it is not finite."""
        x, z = samples.x, samples.z
        shape = (*x.shape[:-2], z.shape[-1], x.shape[-1])
        totals = {name: z.new_zeros(size) for name, size in self.shapes(shape).items()}
        if not self.accumulate(totals, samples, keep=0.0, share=1.0):
            for total in totals.values():
                total.fill_(math.nan)
        return Statistics(totals, x.shape[-2])

    def ema_update(self, state: State, batch: Statistics, decay: float) -> bool:
        """Add the statistics of a batch to the moving average, unless they are not finite.

        Args:
            state: of the layer.
            batch: its statistics.
            decay: the share of the past that is kept.

        Returns:
            Whether they were added.
        """
        # An entry of a positive semi-definite matrix is bounded by its diagonal.
        if not all(math.isfinite(float(self.diagonals(total).sum())) for total in batch.totals.values()):
            return False
        for name, total in batch.totals.items():
            state[name].mul_(decay).add_(total, alpha=(1 - decay) / batch.samples)
        self._age(state, decay)
        return True

    def ema_update_from(self, state: State, samples: Samples, decay: float) -> bool:
        """Add a batch to the moving average: `ema_update` of its `batch_statistics`, in one pass over the metric.

        Args:
            state: of the layer.
            samples: of the batch.
            decay: the share of the past that is kept.

        Returns:
            Whether it was added.
        """
        if not self.accumulate(state, samples, keep=decay, share=(1 - decay) / samples.x.shape[-2]):
            return False
        self._age(state, decay)
        return True

    def _age(self, state: State, decay: float) -> None:
        state["ema_weight"].mul_(decay).add_(1 - decay)

    def average(self, state: State) -> State:
        """Return the tensors of the running metric, corrected for the weight that they lack."""
        weight = float(state["ema_weight"])
        return {name: state[name] / (weight or 1.0) for name in self.tensors}

    def operator(self, state: State, shape: tuple[int, ...]) -> Metric:
        """Return the running metric G as one linear operator, without damping.

        Args:
            state: of the layer.
            shape: [*g, out, d] of its parameters.

        Returns:
            A metric of parameters of this shape.
        """
        return AppliedMetric(self.apply, self.average(state), shape)

    def refresh(self, state: State, inversion: Inversion, frozen: Tensor | None = None) -> bool:
        """Recompute the factors from the moving average; a block that fails keeps its last good factor.

        Args:
            state: of the layer.
            inversion: the damping and power.
            frozen: True for the columns [d] that are not trained and so are no part of the metric.

        Returns:
            Whether all blocks are good.
        """
        weight = float(state["ema_weight"])
        if weight == 0 or (frozen is not None and bool(frozen.all())):
            return True  # there are no statistics yet, or nothing is trained
        root = "root" in state
        inversion = replace(inversion if len(self.tensors) == 1 else inversion.halved(), rank=self.rank)
        found: list[tuple[str, Tensor, Tensor]] = []
        for name in self.tensors:
            key = factor_key(name, root=root)
            metric = state[name] / weight
            diagonals = self.diagonals(metric)
            if frozen is not None and name == "metric":
                diagonals = diagonals[..., ~frozen]
                metric = self.without(metric, frozen)
            if not bool(diagonals.any()):
                return True  # nothing yet: the next layer's weights are 0, or no unit was active
            amounts = inversion.amounts(diagonals)
            if _scale(key) in state:
                low, good = inversion.leading(metric, amounts, state[key], root=root)
                found += [(key, low.basis, good), (_scale(key), low.scale, good)]
            else:
                found.append((key, *self.inverted(metric, amounts, inversion, root=root)))
        good = found[0][2]
        for _, _, each in found[1:]:
            good = good & each  # the factors of a block stay together
        all_good = bool(good.all())
        for key, factor, _ in found:
            flags = good[(..., *(None,) * (factor.ndim - good.ndim))]
            state[key].copy_(factor if all_good else torch.where(flags, factor, state[key]))
        return all_good

    def precondition(self, state: State, gradient: Float[Tensor, "*g out d"]) -> Float[Tensor, "*g out d"]:
        """Return (G + damping)^-power times the gradient, as of the last good refresh."""
        if "root" in state:
            return self.unwhiten(state, self.whiten(state, gradient))
        return self.apply(gradient, self._factors(state, root=False))

    def whiten(self, state: State, gradient: Float[Tensor, "*g out d"]) -> Float[Tensor, "*g out d"]:
        """Return R times the gradient, where R'R = (G + damping)^-power as of the last good refresh."""
        roots = self._factors(state, root=True)
        # One of low rank is symmetric.
        transposed = {name: self.transposed(root) if isinstance(root, Tensor) else root for name, root in roots.items()}
        return self.apply(gradient, transposed)

    def unwhiten(self, state: State, field: Float[Tensor, "*g out d"]) -> Float[Tensor, "*g out d"]:
        """Return R' times a field of whitened coordinates."""
        return self.apply(field, self._factors(state, root=True))

    def _factors(self, state: State, *, root: bool) -> dict[str, Factor]:
        factors: dict[str, Factor] = {}
        for name in self.tensors:
            key = factor_key(name, root=root)
            scale = state.get(_scale(key))
            factors[name] = state[key] if scale is None else LowRank(state[key], scale)
        return factors

    def label(self, shape: tuple[int, ...]) -> str:
        """Return the name, with the rank if one of the layer's inverses is of low rank."""
        low = any(is_low_rank(self.rank, size[-1]) for size in self.shapes(shape).values())
        return f"{self.name}, rank {self.rank}" if low else self.name

    def product_cost(self, d: int) -> int:
        """Return the operations of a row times the inverse of a block of this width."""
        return 4 * d * int(self.rank or 0) if is_low_rank(self.rank, d) else 2 * d**2

    def inversion_cost(self, d: int) -> int:
        """Return the operations of inverting a block of this width."""
        return 6 * d**2 * int(self.rank or 0) if is_low_rank(self.rank, d) else d**3

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Return how many numbers on the device the metric of parameters of the shape [*g, out, d] takes."""
        return sum(math.prod(kept.shape) for kept in self.declares(shape, root=False).values() if not kept.on_host)

    def identity(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the tensor of this size that stands for the identity."""
        return torch.eye(size[-1], dtype=dtype, device=device).expand(size).clone()

    def diagonals(self, blocks: Tensor) -> Tensor:
        """Return the diagonals [*q, d] of blocks."""
        return blocks.diagonal(dim1=-2, dim2=-1)

    def without(self, blocks: Tensor, columns: Tensor) -> Tensor:
        """Return the blocks with those columns and rows replaced by the identity's."""
        kept = (~columns).to(blocks.dtype)
        return blocks * kept * kept.unsqueeze(-1) + torch.diag(1 - kept)

    def inverted(self, blocks: Tensor, amounts: Tensor, inversion: Inversion, *, root: bool) -> tuple[Tensor, Tensor]:
        """Return the factors of the damped blocks, and for each block whether it is good."""
        return inversion.full(blocks, amounts, root=root)

    def transposed(self, blocks: Tensor) -> Tensor:
        """Return the blocks' transposes."""
        return blocks.mT


def factor_key(name: str, *, root: bool) -> str:
    """Return the key of the factor of the tensor with this name."""
    form = "root" if root else "inverse"
    return form if name == "metric" else f"{name}_{form}"


def _scale(key: str) -> str:
    """Return the key of the scale of a factor of low rank."""
    return f"{key}_scale"
