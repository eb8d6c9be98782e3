"""The metric of a layer, G = mean_n F_n (x) x~_n x~_n', the common form of equations (12) to (26)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from relfisher.information import Information, Isotropic
from relfisher.memory import check_fits
from relfisher.metric.base import Metric
from relfisher.moments import augment, weighted_second_moments
from relfisher.shapes import Float

__all__ = ["LayerMetric"]

_FIELD_NUMBERS = 1 << 25


class LayerMetric(Metric):
    """The relative Fisher information metric of a layer's parameters [out, d], neuron-major, bias last.

    A product with V [out, d] takes two matrix products over the samples, (F (X V'))' X / n, and never forms G.

    Args:
        information: the Fisher information F_n of the layer's response about its pre-activation.
        x: the layer's inputs.
        bias: whether the layer has a bias, so that x~ = (x, 1) and d = in + 1.

    Raises:
        ValueError: if the products F_n x~_nj x~_nk are not finite.
        TypeError: if the dtype is not float32 or float64.
    """

    def __init__(self, information: Information, x: Float[Tensor, "n in"], *, bias: bool) -> None:
        n, inputs = x.shape
        out = information.out
        super().__init__((out, inputs + bias), n, x.dtype, x.device)
        self.information = information
        self.x = x
        self.bias = bias
        probe = torch.linspace(1, 2, out, dtype=x.dtype, device=x.device).expand(n, out)
        largest = max(float(x.abs().max()), 1.0) if inputs else 1.0
        known = float(information.apply(probe).abs().max())
        if not known * largest * largest <= torch.finfo(x.dtype).max:
            raise ValueError(
                f"the metric must be finite in {x.dtype}, but for inputs up to {largest:.3g} and an information about "
                f"the pre-activation up to {known:.3g} it is not: scale the inputs or the weights"
            )

    def _augmented(self) -> Float[Tensor, "n d"]:
        return augment(self.x) if self.bias else self.x

    def _product(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        if vectors.shape[1] == 1:
            return self._product_one(vectors.reshape(self.parameter_shape)).reshape(-1, 1)
        width = max(1, _FIELD_NUMBERS // (self.samples * self.parameter_shape[0]))
        return torch.cat([self._product_some(piece) for piece in torch.split(vectors, width, dim=1)], dim=1)

    def _product_one(self, v: Float[Tensor, "out d"]) -> Float[Tensor, "out d"]:
        if not self.bias:
            field = self.information.apply(self.x @ v.T)
            return (field.T @ self.x).div_(self.samples)
        field = self.information.apply(torch.addmm(v[:, -1], self.x, v[:, :-1].T))
        image = torch.empty_like(v)
        image[:, :-1].addmm_(field.T, self.x, beta=0, alpha=1 / self.samples)
        image[:, -1] = field.mean(0)
        return image

    def _product_some(self, vectors: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        (out, d), k = self.parameter_shape, vectors.shape[1]
        augmented = self._augmented()
        stacked = vectors.reshape(out, d, k).permute(2, 0, 1).reshape(k * out, d)
        field = (augmented @ stacked.T).reshape(self.samples, k, out).transpose(0, 1)
        field = self.information.apply(field)
        image = field.transpose(1, 2).reshape(k * out, self.samples) @ augmented
        return image.reshape(k, out * d).T.div(self.samples)

    def overlap(self, other: LayerMetric) -> Float[Tensor, ""]:
        """Return tr(G G') with the metric of the same parameters over other samples: their Frobenius inner product.

        Args:
            other: the other metric.

        Returns:
            mean_nm tr(F_n F'_m) <x~_n, x~'_m>^2, in float64, without forming either metric.

        Raises:
            ValueError: if it has other parameters.
        """
        if other.parameter_shape != self.parameter_shape:
            raise ValueError(f"other must have parameters {self.parameter_shape}, got {other.parameter_shape}")
        products = (self._augmented().double() @ other._augmented().double().T).square()
        return (products * self.information.overlaps(other.information)).mean()

    def within_span(self) -> LayerMetric:
        """Return a metric with the same eigenvalues other than 0, of at most as many inputs as samples."""
        if self.parameter_shape[1] <= self.samples:
            return self
        return LayerMetric(self.information, torch.linalg.qr(self._augmented().T).R.T, bias=False)

    def diagonal(self) -> Float[Tensor, "D"]:
        """Return mean_n F_n,ii x~_nj^2."""
        return (self.information.diagonal().T @ self._augmented().square()).div_(self.samples).reshape(-1)

    def _direct_sum_shape(self) -> tuple[int, int]:
        out, d = self.parameter_shape
        if isinstance(self.information, Isotropic):
            return 1, d
        return (out, d) if self.information.is_diagonal else (1, out * d)

    def _direct_sum(self) -> Float[Tensor, "q b b"]:
        augmented = self._augmented()
        information = self.information
        if isinstance(information, Isotropic):
            return (augmented.T @ augmented).mul_(information.value / self.samples).unsqueeze(0)
        if information.is_diagonal:
            return weighted_second_moments(information.diagonal(), augmented).div_(self.samples)
        out, d = self.parameter_shape
        check_fits(
            f"the information of {self.samples} samples about {out} units", self.samples * out**2, self.dtype,
            self.device, "use @ and solve, or a BatchedMetric over smaller batches",
        )  # fmt: skip
        pairs = weighted_second_moments(information.dense().flatten(1), augmented).div_(self.samples)
        size = math.prod(self.parameter_shape)
        return pairs.reshape(out, out, d, d).permute(0, 2, 1, 3).reshape(1, size, size)
