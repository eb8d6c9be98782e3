"""What a response defines: its density given the pre-activation, and its information."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from relfisher.information import Diagonal, Information
from relfisher.shapes import Float, Num

__all__ = ["Response", "UnitResponse"]


class Response(ABC):
    """The conditional distribution p(y | z) of a layer's response given its pre-activation z, [..., out].

    The last axis holds units or classes. The axes before it hold samples and positions, whose responses are independent
    given z; a metric is a mean over all of them.
    """

    @abstractmethod
    def information(self, z: Float[Tensor, "*n out"]) -> Float[Tensor, "*n out"] | Float[Tensor, "*n out out"]:
        """Return F(z): its diagonal nu [..., out] for unit responses, else the matrices [..., out, out]."""

    @abstractmethod
    def operator(self, z: Float[Tensor, "n out"]) -> Information:
        """Return F(z) as an operator that does not store the matrices."""

    @abstractmethod
    def log_prob(self, z: Float[Tensor, "*n out"], y: Num[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return ln p(y | z): one entry per unit for unit responses, else one per sample."""

    @abstractmethod
    def sample(self, z: Float[Tensor, "*n out"], generator: torch.Generator | None = None) -> Num[Tensor, "*shape"]:
        """Draw y from p(y | z), using the generator if one is given."""

    @abstractmethod
    def outcomes(self, out: int) -> tuple[float, ...] | None:
        """Return all values that y can take (per unit, or per sample), or None if y is continuous."""

    def divergence(self, z: Float[Tensor, "*n out"], other: Float[Tensor, "*n out"]) -> Float[Tensor, "*shape"]:
        """Return the Kullback-Leibler divergence from p(y | z) to p(y | other), in nats, in the shape of `log_prob`.

        To second order it is half the squared difference of the pre-activations in F(z). A response of your own need
        not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `divergence`")


class UnitResponse(Response):
    """A response of independent units, so that F(z) = diag(nu(z)); subclasses define f and nu."""

    @abstractmethod
    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return f(z), the mean of the response."""

    @abstractmethod
    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return f'(z)."""

    @abstractmethod
    def information(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return nu(z), the Fisher information of each unit about its pre-activation, in the shape of z."""

    def operator(self, z: Float[Tensor, "n out"]) -> Information:
        """Return diag(nu(z_n)) for each sample."""
        return Diagonal(self.information(z))
