"""The damped systems of section 5.1 for runs with few samples each, solved exactly in the space of samples.

With S = diag(w)^1/2 and U the samples, (U'S S U / n + epsilon I)^-1 g = (g - U'S (n epsilon I + S U U' S)^-1 S U g) /
epsilon (Woodbury). The inner products U U' are formed once. A step needs a Cholesky factor with one row per sample of
significant weight; if most samples are far on the correct side, there are few of these.

Axes: `s` data sets, `c` configurations, `m` runs on the same data, `n` samples, `r` coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from relfisher.shapes import Float

__all__ = ["SampleSpaceSystems"]

# The samples left out change G by less than this factor times epsilon.
_NEGLIGIBLE = 1e-14


class SampleSpaceSystems:
    """Solves (G + epsilon I) d = g for many problems with G = mean_n w_n u_n u_n'.

    Args:
        features: u_n of each data set.
        damping: epsilon relative to the mean of the diagonal of G, as in section 5.1.
        parameters: D, the number of diagonal entries in that mean.
    """

    def __init__(self, features: Float[Tensor, "s n r"], damping: float, parameters: int) -> None:
        self._features = features
        self._products = features @ features.mT
        self._squares = features.square().sum(2)
        self._damping = damping / parameters

    def keep(self, configurations: Tensor) -> None:
        """Do nothing, since no data are kept about configurations."""

    def solve(self, weights: Float[Tensor, "s c m n"], gradient: Float[Tensor, "s c m r"]) -> Float[Tensor, "s c m r"]:
        """Return (G + epsilon I)^-1 g for every problem.

        Args:
            weights: w_n, non-negative and not all 0.
            gradient: g; if the g of a problem is not finite, its solution is not finite either.

        Returns:
            The solutions.
        """
        traces = weights @ self._squares[:, None, :, None] / weights.shape[-1]
        epsilon = self._damping * traces
        responses = (gradient.flatten(1, 2) @ self._features.mT).view_as(weights)
        counted = weights * self._squares[:, None, None] > _NEGLIGIBLE * epsilon
        corrections = torch.zeros_like(weights)
        for index in gradient.isfinite().all(3).nonzero().tolist():
            problem = tuple(index)
            some = counted[problem]
            roots = weights[problem][some].sqrt()
            inner = self._products[index[0]][some][:, some] * roots * roots.unsqueeze(1)
            inner.diagonal().add_(epsilon[problem] * len(some))
            factor = torch.linalg.cholesky(inner)
            right = (roots * responses[problem][some]).unsqueeze(1)
            corrections[problem][some] = roots * torch.cholesky_solve(right, factor).squeeze(1)
        correction = (corrections.flatten(1, 2) @ self._features).view_as(gradient)
        return (gradient - correction) / epsilon
