"""Many systems (G + epsilon I) d = g at once, where G = mean_n w_n u_n u_n' is the metric of a neuron, equation (14).

Forming every G would cost n r^2 operations per problem and step. Instead, all problems on the same data are solved by
joint conjugate gradient iterations, of two matrix products each, to a residual of 1e-11. The preconditioner is the
inverse of an earlier G of the same configuration. It is close, since the weights w change slowly; it is shared by the
runs that share data; and it is recomputed once the iterations spent with it have cost as much as computing it.

Axes: `s` data sets, `c` configurations, `m` runs on the same data, `n` samples, `r` coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.shapes import Float

__all__ = ["DampedSystems"]

_RESIDUAL = 1e-11
_NEGLIGIBLE = 1e-7


class DampedSystems:
    """Solves the systems of one optimization, step after step, and keeps their preconditioners.

    Args:
        features: u_n of each data set.
        configurations: the number of configurations on each data set.
        damping: epsilon relative to the mean of the diagonal of G, as in section 5.1.
        parameters: D, the number of diagonal entries in that mean; more than r if the data are singular.
    """

    def __init__(self, features: Float[Tensor, "s n r"], configurations: int, damping: float, parameters: int) -> None:
        self._features = features
        self._squares = features.square().sum(2)
        self._damping = damping / parameters
        second = features.square().mean(1)
        inverse = 1 / (second / second.sum(1, keepdim=True) + self._damping)
        sets, _, rank = features.shape
        self._inverse = torch.diag_embed(inverse).unsqueeze(1).expand(sets, configurations, rank, rank).clone()
        self._spent = torch.zeros(sets, configurations)

    def keep(self, configurations: Tensor) -> None:
        """Keep only the configurations with the given indices."""
        self._inverse = self._inverse[:, configurations]
        self._spent = self._spent[:, configurations]

    def solve(self, weights: Float[Tensor, "s c m n"], gradient: Float[Tensor, "s c m r"]) -> Float[Tensor, "s c m r"]:
        """Return (G + epsilon I)^-1 g for every problem.

        Args:
            weights: w_n, non-negative and not all 0.
            gradient: g; if the g of a problem is not finite, its solution is not finite either.

        Returns:
            The solutions.
        """
        traces = weights @ self._squares[:, None, :, None] / weights.shape[-1]
        scaled = weights / traces
        self._refresh(scaled)
        return self._iterate(scaled, gradient) / traces

    def _refresh(self, weights: Float[Tensor, "s c m n"]) -> None:
        due = self._spent > self._features.shape[2] / 2
        for data, configuration in due.nonzero().tolist():
            mean = weights[data, configuration].mean(0)
            self._inverse[data, configuration] = self._inverted(mean, self._features[data])
            self._spent[data, configuration] = 0

    def _inverted(self, weights: Float[Tensor, "n"], features: Float[Tensor, "n r"]) -> Float[Tensor, "r r"]:
        """Return (G + epsilon I)^-1, ignoring samples of negligible weight, which is allowed in a preconditioner."""
        counted = weights > _NEGLIGIBLE * weights.max()
        rooted = features[counted] * weights[counted].div(len(features)).sqrt().unsqueeze(1)
        metric = rooted.T @ rooted
        metric.diagonal().add_(self._damping)
        return torch.cholesky_inverse(torch.linalg.cholesky(metric))

    def _iterate(
        self, weights: Float[Tensor, "s c m n"], gradient: Float[Tensor, "s c m r"]
    ) -> Float[Tensor, "s c m r"]:
        """Run preconditioned conjugate gradients (Hestenes & Stiefel 1952)."""
        tiny = torch.finfo(gradient.dtype).tiny
        finite = gradient.isfinite().all(dim=3, keepdim=True)
        solution = torch.where(finite, 0.0, gradient)
        residual = torch.where(finite, gradient, 0.0)
        preconditioned = residual @ self._inverse
        direction = preconditioned.clone()
        energy = (residual * preconditioned).sum(3, keepdim=True)
        target = _RESIDUAL * residual.norm(dim=3, keepdim=True)
        for _ in range(4 * gradient.shape[3]):
            unsolved = residual.norm(dim=3, keepdim=True) > target
            active = unsolved.any(dim=3).any(dim=2).any(dim=0).nonzero().squeeze(1)
            if len(active) == 0:
                break
            self._spent[:, active] += unsolved[:, active, :, 0].float().sum(2) / gradient.shape[2] * gradient.shape[2]
            some = direction[:, active]
            image = self._product(weights[:, active], some)
            length = energy[:, active] / (some * image).sum(3, keepdim=True).clamp(min=tiny)
            solution[:, active] += length * some
            residual[:, active] -= length * image
            preconditioned = residual[:, active] @ self._inverse[:, active]
            fresh = (residual[:, active] * preconditioned).sum(3, keepdim=True)
            direction[:, active] = preconditioned + fresh / energy[:, active].clamp(min=tiny) * some
            energy[:, active] = fresh
        return solution

    def _product(
        self, weights: Float[Tensor, "s c m n"], vectors: Float[Tensor, "s c m r"]
    ) -> Float[Tensor, "s c m r"]:
        stacked = vectors.flatten(1, 2)
        responses = (stacked @ self._features.mT).mul_(weights.flatten(1, 2))
        image = (responses @ self._features).div_(weights.shape[-1]).add_(stacked, alpha=self._damping)
        return image.view_as(vectors)
