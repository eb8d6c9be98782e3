"""Conjugate residuals for metrics that are too large to factorize."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from relfisher.metric.operator import IndefiniteMetricError
from relfisher.shapes import Float

__all__ = ["ConvergenceWarning", "conjugate_residuals"]


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before it reached its tolerance."""


def conjugate_residuals(
    product: Callable[[Tensor], Tensor],
    right: Float[Tensor, "D k"],
    units: Float[Tensor, "D"],
    damping: float = 0.0,
    max_iterations: int = 2000,
) -> tuple[Float[Tensor, "D k"], bool]:
    """Solve (G + damping I) X = B for all columns of B at once, scaled by units (Stiefel 1955).

    The residual of a system without a solution becomes its component in the null space. All iterates have their null
    component along it. Without it, they are the least-norm solution (Liu, Milzarek & Roosta 2022), if all units are 1.

    Args:
        product: the function V -> G V on [D, k].
        right: the right-hand sides B.
        units: S, for iterations with S^-1 (G + damping I) S^-1. Only their ratios matter: matrix and right-hand sides
            are scaled so that their squares neither overflow nor vanish.
        damping: the damping, >= 0.
        max_iterations: the largest number of iterations.

    Returns:
        X, and whether all columns have a relative residual of at most 100 machine epsilons. The other columns solve the
        system in the sense of least squares, or are the last iterate, with a warning.

    Raises:
        IndefiniteMetricError: if a direction of negative curvature is met.
    """
    scale = (units / units.max()).unsqueeze(1)
    eps, tiny = torch.finfo(right.dtype).eps, torch.finfo(right.dtype).tiny

    def unscaled(vectors: Tensor) -> Tensor:
        vectors = vectors / scale
        return product(vectors).add(vectors, alpha=damping) / scale

    probe = torch.randn(len(right), 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(right)
    seen = unscaled(probe)
    level, sizes = _size(seen), _size(right / scale)

    def apply(vectors: Tensor) -> Tensor:
        return unscaled(vectors) / level

    residual = right / scale / sizes
    wanted = (scale * residual).norm(dim=0)
    solution, direction = torch.zeros_like(residual), residual.clone()
    change = apply(residual)
    image, energy = change.clone(), (residual * change).sum(0)
    largest = float((seen / level).norm() / probe.norm())  # of the eigenvalues, as far as they are seen
    for _ in range(max_iterations):
        length = residual.norm(dim=0)
        largest = max(largest, float((change.norm(dim=0) / length.clamp(min=tiny)).max()))
        if bool(((energy <= 0) & (change.norm(dim=0) > eps**0.25 * largest * length)).any()):
            raise IndefiniteMetricError(
                f"the metric with damping {damping} must be positive to be solved without its matrix, but it has a "
                "direction without a positive length: give a larger damping, or use pinv_solve"
            )
        missing = (scale * residual).norm(dim=0)
        solved = missing <= 100 * eps * wanted
        stuck = change.norm(dim=0) <= 10 * eps * largest * length
        if bool((solved | stuck).all()):
            break
        step = torch.where(solved | stuck, 0, energy / image.square().sum(0))
        solution += step * direction
        residual -= step * image
        change = apply(residual)
        fresh = (residual * change).sum(0)
        ratio = torch.where(energy > 0, fresh / energy, 0)
        direction, image = residual + ratio * direction, change + ratio * image
        energy = fresh
    else:
        worst = float((missing / wanted.clamp(min=tiny)).max())
        warnings.warn(
            f"conjugate residuals stopped after {max_iterations} iterations at a relative residual of {worst:.1e}: "
            "give more damping",
            ConvergenceWarning,
            stacklevel=3,
        )
        return solution / scale * (sizes / level), True
    along = (residual * solution).sum(0) / residual.square().sum(0)
    solution = torch.where(solved, solution, solution - along * residual)
    return solution / scale * (sizes / level), bool(solved.all())


def _size(vectors: Float[Tensor, "D k"]) -> Float[Tensor, "k"]:
    """Return the largest absolute entry of each column; 1 for columns of zeros."""
    size = vectors.abs().amax(0)
    return size.where(size > 0, 1)
