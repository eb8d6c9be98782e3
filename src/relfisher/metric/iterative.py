"""Conjugate gradients for metrics that are too large to factorize."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from relfisher.shapes import Float

__all__ = ["ConvergenceWarning", "conjugate_gradients", "least_correlation_eigenvalues"]


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before it reached its tolerance."""


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    right: Float[Tensor, "D k"],
    diagonal: Float[Tensor, "D"],
    damping: float,
    max_iterations: int = 2000,
) -> Float[Tensor, "D k"]:
    """Solve (G + damping I) X = B for all columns of B at once, preconditioned by the diagonal (Hestenes & Stiefel).

    Args:
        product: the function V -> G V on [D, k].
        right: the right-hand sides B.
        diagonal: the diagonal of G.
        damping: the damping, >= 0.
        max_iterations: the largest number of iterations.

    Returns:
        X, to a relative residual of 100 machine epsilons in every column, or the last iterate, with a warning.
    """
    preconditioner = diagonal.add(damping)
    preconditioner = torch.where(preconditioner > 0, preconditioner, torch.ones_like(preconditioner)).unsqueeze(1)
    tolerance = 100 * torch.finfo(right.dtype).eps * right.norm(dim=0)
    solution = torch.zeros_like(right)
    residual = right.clone()
    scaled = residual / preconditioner
    direction = scaled.clone()
    energy = (residual * scaled).sum(0)
    for _ in range(max_iterations):
        if bool((residual.norm(dim=0) <= tolerance).all()):
            return solution
        image = product(direction).add(direction, alpha=damping)
        curvature = (direction * image).sum(0)
        # A column whose residual is exactly 0 has zero energy and zero curvature.
        length = torch.where(curvature > 0, energy / curvature, torch.zeros_like(energy))
        solution += length * direction
        residual -= length * image
        scaled = residual / preconditioner
        fresh = (residual * scaled).sum(0)
        direction = scaled + torch.where(energy > 0, fresh / energy, torch.zeros_like(energy)) * direction
        energy = fresh
    worst = float((residual.norm(dim=0) / right.norm(dim=0).clamp(min=torch.finfo(right.dtype).tiny)).max())
    warnings.warn(
        f"conjugate gradients stopped after {max_iterations} iterations at a relative residual of {worst:.1e}: "
        "give more damping",
        ConvergenceWarning,
        stacklevel=3,
    )
    return solution


def least_correlation_eigenvalues(
    factors: Float[Tensor, "q b b"], diagonals: Float[Tensor, "q b"]
) -> Float[Tensor, "q"]:
    """Estimate the least eigenvalue of each matrix scaled to a unit diagonal, by two inverse iterations.

    Rounding errors can make the last pivot of a singular matrix positive, so that its Cholesky factorization succeeds.
    The least eigenvalue of the scaled matrix is then one or two machine epsilons, whatever the size and the units.

    Args:
        factors: the Cholesky factors.
        diagonals: the diagonals of the factorized matrices, > 0.

    Returns:
        The estimates, which are never below the true eigenvalues.
    """
    scale = diagonals.sqrt().unsqueeze(-1)
    start = torch.randn(scale.shape[1:], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = (start / start.norm()).to(factors).expand_as(scale)
    growth = scale.new_ones(scale.shape[0], 1, 1)
    for _ in range(2):
        image = scale * torch.cholesky_solve(scale * vector, factors)
        growth = image.norm(dim=1, keepdim=True)
        vector = image / growth
    return (1 / growth).reshape(-1)
