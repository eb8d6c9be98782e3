"""The interface of a structure: statistics -> average -> invert -> apply, and the running metric as an operator.

A structure represents the metric G of one layer, whose parameters are a matrix [out, d] with the bias last, or
[groups, out, d] if groups of units have different inputs. It holds no tensors: a layer's state is a flat dictionary of
tensors, whose names and shapes the structure declares. The steps are separate since they are due at different times.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from relfisher.metric import Metric
from relfisher.moments import add_second_moments
from relfisher.shapes import Float
from relfisher.structures.inverse import Factor, Inversion, LowRank
from relfisher.structures.operator import AppliedMetric
from relfisher.structures.refresh import refresh_together
from relfisher.structures.sketch import add_sketch, is_low_rank, is_sketch, reconstructed, sketch_columns, sketched
from relfisher.structures.state import Cost, Kept, Samples, State, Statistics, factor_key, scale_key

__all__ = ["Structure"]


class Structure(ABC):
    """A representation of the running metric of one layer.

    Attributes:
        rank: the rank of the inverses of blocks that are at least eight times as wide, which use the leading
            eigenvectors only; of such blocks only sketches are kept. None keeps and inverts every block in full.
    """

    #: The name in `structure=` and in tables.
    name: ClassVar[str]
    #: The names of the tensors that hold the metric: the keys of `shapes`. The first one is called "metric".
    tensors: ClassVar[tuple[str, ...]] = ("metric",)
    #: True if `accumulate` accepts sparse inputs.
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
        """Replace totals with keep * totals + share * (the metric summed over samples), in place, if the sum is finite.

        Args:
            totals: the tensors named in `tensors`; their values do not matter if keep is 0.
            samples: the samples of a batch.
            keep: the factor of the present totals.
            share: the factor of the sum.

        Returns:
            Whether the sum is finite; if not, the totals are unchanged.
        """

    @abstractmethod
    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Factor]) -> Float[Tensor, "*g out d"]:
        """Multiply the rows of a field from the right by matrices of this structure: the metric or its factors."""

    # Defaults for a metric that is stored as dense blocks.

    @property
    def alike(self) -> Hashable:
        """What is equal for structures that apply their factors alike: the steps of such layers are computed together.

        By default, a structure is like none but itself.
        """
        return id(self)

    def _alike(self, kind: type[Structure], *options: Hashable) -> Hashable:
        """Return a class and its options, or what is like none if this is of a class derived from it."""
        return (kind, *options) if type(self) is kind else id(self)

    def factors(self, shape: tuple[int, ...], *, root: bool) -> list[str]:
        """Return the keys of what is applied to a gradient: all that is declared but the metric and its average."""
        others = {"ema_weight", "updates", *self.tensors}
        return [key for key in self.declares(shape, root=root) if key not in others]

    def declares(self, shape: tuple[int, ...], *, root: bool) -> dict[str, Kept]:
        """Return everything in the state of a layer: the metric, its factors, and the weight of the moving average.

        Args:
            shape: the shape [*g, out, d] of the parameters.
            root: True if the factors are roots of the inverse.

        Returns:
            "ema_weight", the number of "updates", each of `tensors`, and for each of these its "inverse" or "root"
            (prefixed with the tensor's name for all but the first). A factor of low rank is a basis V and a "scale",
            for scale * (I - V V').
        """
        kept = {"ema_weight": Kept((), on_host=True), "updates": Kept((), on_host=True, dtype=torch.float32)}
        for name, size in self.shapes(shape).items():
            kept[name] = Kept(size)
            key = factor_key(name, root=root)
            if is_sketch(size, self.rank):
                kept[key], kept[scale_key(key)] = Kept((*size[:-1], int(self.rank or 0))), Kept(size[:-2])
            else:
                kept[key] = Kept(size)
        return kept

    def create(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, identity: bool, root: bool
    ) -> State:
        """Return the state of a layer without statistics.

        Args:
            shape: the shape [*g, out, d] of the parameters.
            dtype: the dtype of the metric.
            device: the device of the metric.
            identity: True starts the average at the identity with full weight, as published; False at 0 with no
                weight, so that the average is unbiased from the first batch on.
            root: True if the factors are roots of the inverse.

        Returns:
            The tensors that `declares` lists. The factors are identities.
        """
        state = {key: kept.zeros(dtype, device) for key, kept in self.declares(shape, root=root).items()}
        state["ema_weight"].fill_(float(identity))
        for name, size in self.shapes(shape).items():
            key = factor_key(name, root=root)
            if scale_key(key) in state:
                state[scale_key(key)].fill_(1.0)
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
        """Add the statistics of a batch to the moving average if they are finite.

        Args:
            state: the state of the layer.
            batch: the statistics.
            decay: the share of the previous average that is kept.

        Returns:
            Whether they were added.
        """
        # Diagonal entries bound all entries of a positive semi-definite matrix.
        if not all(math.isfinite(float(self.diagonals(total).sum())) for total in batch.totals.values()):
            return False
        for name, total in batch.totals.items():
            state[name].mul_(decay).add_(total, alpha=(1 - decay) / batch.samples)
        self._age(state, decay)
        return True

    def ema_update_from(self, state: State, samples: Samples, decay: float) -> bool:
        """Add a batch to the moving average: `ema_update` with its `batch_statistics`, in one pass over the metric.

        Args:
            state: the state of the layer.
            samples: the samples of the batch.
            decay: the share of the previous average that is kept.

        Returns:
            Whether it was added.
        """
        if not self.accumulate(state, samples, keep=decay, share=(1 - decay) / samples.x.shape[-2]):
            return False
        self._age(state, decay)
        return True

    def _age(self, state: State, decay: float) -> None:
        state["ema_weight"].mul_(decay).add_(1 - decay)
        state["updates"].add_(1)

    def average(self, state: State) -> State:
        """Return the tensors of the running metric, with the bias of the moving average corrected."""
        weight = float(state["ema_weight"])
        return {name: state[name] / (weight or 1.0) for name in self.tensors}

    def operator(self, state: State, shape: tuple[int, ...]) -> Metric:
        """Return the running metric G as one linear operator, without damping.

        Args:
            state: the state of the layer.
            shape: the shape [*g, out, d] of its parameters.

        Returns:
            A metric of parameters of this shape.
        """
        return AppliedMetric(self.apply, self.average(state), shape)

    def refresh(self, state: State, inversion: Inversion, frozen: Tensor | None = None) -> bool:
        """Recompute the factors from the moving average; a block that fails keeps its last good factor.

        Args:
            state: the state of the layer.
            inversion: the damping and power.
            frozen: True for columns [d] that are frozen and hence excluded from the metric.

        Returns:
            Whether all blocks are good.
        """
        if float(state["ema_weight"]) == 0 or (frozen is not None and bool(frozen.all())):
            return True  # no statistics yet, or no trainable column
        return bool(refresh_together(self, [state], inversion, frozen))

    def precondition(self, state: State, gradient: Float[Tensor, "*g out d"]) -> Float[Tensor, "*g out d"]:
        """Return (G + damping)^-power times the gradient, as of the last good refresh."""
        if "root" in state:
            return self.unwhiten(state, self.whiten(state, gradient))
        return self.apply(gradient, self._factors(state, root=False))

    def whiten(self, state: State, gradient: Float[Tensor, "*g out d"]) -> Float[Tensor, "*g out d"]:
        """Return R times the gradient, where R'R = (G + damping)^-power as of the last good refresh."""
        roots = self._factors(state, root=True)
        # Factors of low rank are symmetric.
        transposed = {name: self.transposed(root) if isinstance(root, Tensor) else root for name, root in roots.items()}
        return self.apply(gradient, transposed)

    def unwhiten(self, state: State, field: Float[Tensor, "*g out d"]) -> Float[Tensor, "*g out d"]:
        """Return R' times a field in whitened coordinates."""
        return self.apply(field, self._factors(state, root=True))

    def _factors(self, state: State, *, root: bool) -> dict[str, Factor]:
        factors: dict[str, Factor] = {}
        for name in self.tensors:
            key = factor_key(name, root=root)
            scale = state.get(scale_key(key))
            factors[name] = state[key] if scale is None else LowRank(state[key], scale)
        return factors

    def label(self, shape: tuple[int, ...]) -> str:
        """Return the name, followed by the rank if any inverse of the layer is of low rank."""
        low = any(is_sketch(size, self.rank) for size in self.shapes(shape).values())
        return f"{self.name}, rank {self.rank}" if low else self.name

    def product_cost(self, d: int) -> int:
        """Return the number of operations for the product of a row with the inverse of a block of width d."""
        return 4 * d * int(self.rank or 0) if is_low_rank(self.rank, d) else 2 * d**2

    def inversion_cost(self, d: int) -> int:
        """Return the number of operations for inverting a block of width d."""
        return 20 * d * int(self.rank or 0) ** 2 if is_low_rank(self.rank, d) else d**3

    def sample_cost(self, d: int) -> int:
        """Return the number of operations for adding a sample to a block of width d."""
        return 8 * d * int(self.rank or 0) if is_low_rank(self.rank, d) else 2 * d**2

    def block(self, groups: Sequence[int], d: int) -> tuple[int, ...]:
        """Return the shape of what is kept of a block of width d for each group: [*g, d, d], or that of its sketch."""
        return (*groups, d, sketch_columns(int(self.rank or 0)) if is_low_rank(self.rank, d) else d)

    def add(self, total: Tensor, inputs: Float[Tensor, "*g n d"], *, keep: float, share: float) -> bool:
        """Add the sum of products of inputs to what is kept of a block; see `accumulate`."""
        add = add_sketch if is_sketch(total.shape, self.rank) else add_second_moments
        return add(total, inputs, keep=keep, share=share)

    def dense(self, kept: Tensor) -> Float[Tensor, "*g d d"]:
        """Return the block of which this is kept, approximately if it is a sketch."""
        return reconstructed(kept) if is_sketch(kept.shape, self.rank) else kept

    def numbers(self, shape: tuple[int, ...]) -> int:
        """Return the number of scalars on the device for the state of parameters of the shape [*g, out, d]."""
        return sum(math.prod(kept.shape) for kept in self.declares(shape, root=False).values() if not kept.on_host)

    def identity(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the identity as a tensor of this size."""
        if is_sketch(size, self.rank):
            one = sketched(size[-2], int(self.rank or 0), torch.empty(0, dtype=dtype, device=device))
        else:
            one = torch.eye(size[-1], dtype=dtype, device=device)
        return one.expand(size).clone()

    def diagonals(self, blocks: Tensor) -> Tensor:
        """Return the diagonals [*q, d] of the blocks."""
        return blocks[..., -1] if is_sketch(blocks.shape, self.rank) else blocks.diagonal(dim1=-2, dim2=-1)

    def without(self, blocks: Tensor, columns: Tensor) -> Tensor:
        """Return the blocks with the given rows and columns replaced by those of the identity."""
        kept = (~columns).to(blocks.dtype)
        return blocks * kept * kept.unsqueeze(-1) + torch.diag(1 - kept)

    def inverted(self, blocks: Tensor, amounts: Tensor, inversion: Inversion, *, root: bool) -> tuple[Tensor, Tensor]:
        """Return the factors of the damped blocks, and a flag for each block: whether it is good."""
        return inversion.full(blocks, amounts, root=root)

    def transposed(self, blocks: Tensor) -> Tensor:
        """Return the transposed blocks."""
        return blocks.mT
