"""Kronecker factors: G is approximated by mean_n F_n (x) mean_n x~_n x~_n', for units with a joint response.

The output factor is exact: the information of the response, equation (25) for a softmax layer, or that of the next
layer pulled back through it, equation (26). The only approximation replaces the mean of the product with the product of
the means, as in K-FAC (Martens & Grosse 2015), which samples its output factor from back-propagated gradients.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from relfisher.information import Information, Isotropic, PulledBack
from relfisher.metric import Metric
from relfisher.responses import Response, UnitResponse
from relfisher.shapes import Float
from relfisher.structures.base import Structure
from relfisher.structures.inverse import Factor, check_rank, times, transposed_times
from relfisher.structures.operator import kronecker_operator
from relfisher.structures.sketch import is_sketch, sketch
from relfisher.structures.state import Cost, Samples, State
from relfisher.validation import check_instance

__all__ = ["KroneckerFactors"]


@runtime_checkable
class Weighted(Protocol):
    """A linear layer or module, with a weight [out, in]."""

    @property
    def weight(self) -> Tensor:
        """The weight."""


class KroneckerFactors(Structure):
    """A factor of d^2 numbers for the inputs and one of out^2 for the outputs.

    Args:
        response: the layer's response, such as `Categorical()` for a softmax head; None for its units' own response.
        through: the next layer, whose inputs are this layer's activated units. The response is then the linear response
            of the next layer, pulled back through this layer's activation. Equation (26).
        rank: see `Structure`.

    Raises:
        ValueError: if both response and through are given, or the rank is not positive.
    """

    name = "kronecker"
    tensors = ("metric", "output")

    def __init__(
        self, response: Response | None = None, through: Weighted | None = None, rank: int | None = None
    ) -> None:
        check_rank(rank)
        self.rank = rank
        check_instance("response", response, Response, optional=True)
        check_instance("through", through, Weighted, optional=True)
        if response is not None and through is not None:
            raise ValueError("give response or through, not both: through says whose response it is")
        self._response = response
        self._through = through

    @property
    def alike(self) -> Hashable:
        """The class and the rank."""
        return self._alike(KroneckerFactors, self.rank)

    def shapes(self, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return [*g, d, d] for the inputs and [*g, out, out] for the outputs, or the shapes of sketches."""
        *groups, out, d = shape
        return {"metric": self.block(groups, d), "output": self.block(groups, out)}

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """Return 2 (d + out) per parameter, d^3 + out^3 and 2 (d^2 + out^2) per group; less with a low rank."""
        *groups, out, d = shape
        count = math.prod(groups)
        step = out * self.product_cost(d) + d * self.product_cost(out)
        refresh = self.inversion_cost(d) + self.inversion_cost(out)
        return Cost(count * step, count * refresh, count * (self.sample_cost(d) + 2 * out**2))

    def accumulate(self, totals: State, samples: Samples, *, keep: float, share: float) -> bool:
        """Add the sums over the inputs and over the information of the outputs."""
        outputs = self._outputs(samples.z, samples.response)
        if not math.isfinite(float(self.diagonals(outputs).sum())):
            return False
        if not self.add(totals["metric"], samples.x, keep=keep, share=share):
            return False
        if is_sketch(totals["output"].shape, self.rank):
            outputs = sketch(outputs, int(self.rank or 0))
        totals["output"].mul_(keep).add_(outputs, alpha=share)
        return True

    def operator(self, state: State, shape: tuple[int, ...]) -> Metric:
        """Return the Kronecker product of the two factors."""
        average = self.average(state)
        return kronecker_operator(self.dense(average["output"]), self.dense(average["metric"]))

    def _outputs(self, z: Float[Tensor, "*g n out"], response: UnitResponse) -> Float[Tensor, "*g out out"]:
        outputs = [self._information(group, response).total() for group in z.reshape(-1, *z.shape[-2:])]
        return torch.stack(outputs).view(*z.shape[:-2], z.shape[-1], z.shape[-1])

    def _information(self, z: Float[Tensor, "n out"], response: UnitResponse) -> Information:
        if self._through is None:
            return (self._response or response).operator(z)
        weight = self._through.weight.detach().to(z.dtype)
        after = Isotropic(1.0, z.new_empty(z.shape[0], weight.shape[0]))
        return PulledBack(after, weight, response.slope(z))

    def apply(self, field: Float[Tensor, "*g out d"], factors: Mapping[str, Factor]) -> Float[Tensor, "*g out d"]:
        """Multiply by the input factor from the right, and by the transposed output factor from the left."""
        return transposed_times(factors["output"], times(field, factors["metric"]))
