"""The step of all parameters at once in the metric of the residuals, solved for rows of residuals in place of weights.

With J the derivatives of residuals r by all parameters, the metric of the whole network is J'J, and the step of natural
gradient descent is -(J'J + e)^-1 J'r = -J' (JJ' + e)^-1 r (Woodbury). JJ' is a sum over layers, which need the inner
products of their rows alone: the cost grows with layers and with the square of rows, not with that of parameters.

It is the step of Gauss and Newton with the damping of Levenberg 1944 and Marquardt 1963. Müller & Zeinhofer 2023 take
it for equations (energy natural gradient); Rende et al. 2024 and Goldshlager et al. 2024 solve it for samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from relfisher.optim.rows import Rows

__all__ = ["descend", "next_damping", "step_of_rows"]

LEAST, MOST = 1e-12, 1e6
HALVINGS = 6
ENOUGH = 1e-4


def step_of_rows(rows: Rows, damping: float, kept: Sequence[Tensor] = ()) -> tuple[list[Tensor], float]:
    """Return the damped step of some rows: the step d with the least |r + J d|^2 + e |d - kept|^2.

    Args:
        rows: residuals and their derivatives.
        damping: the multiple of the mean of the diagonal of JJ' that is added to it.
        kept: what is kept of the last step, in the form of the result; nothing for 0.

    Returns:
        The step of each layer [out, d] and then that of all other parameters [others], and the damping, which is larger
        than the given one if the factorization failed with that. No step if the derivatives are not finite or all 0.
    """
    # Products in single precision have errors of some 1e-6 of the mean.
    gram = rows.gram(torch.float32 if damping >= ENOUGH else rows.residuals.dtype).double()
    mean = float(gram.diagonal().mean())
    while math.isfinite(mean) and mean > 0 and damping <= MOST:
        damped = gram.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            expected = rows.residuals + rows.along(kept[:-1], kept[-1]) if kept else rows.residuals
            shares = torch.cholesky_solve(expected.double()[:, None], factor)[:, 0].to(expected)
            layers, others = rows.combined(-shares)
            step = [*layers, others]
            return [a + b for a, b in zip(step, kept, strict=True)] if kept else step, damping
        damping *= 10
    return [], damping


@torch.no_grad()
def descend(
    parameters: Sequence[Tensor], step: Sequence[Tensor], evaluate: Callable[[], float], loss: float
) -> tuple[float, float] | None:
    """Move parameters by a step, or by the largest half, quarter, ... of it that lowers the loss.

    Args:
        parameters: the parameters.
        step: the step of each.
        evaluate: returns the loss.
        loss: the loss before the step.

    Returns:
        The share of the step that was taken, and the loss after it; None if nothing has moved, since none lowers it.
    """
    before = [parameter.clone() for parameter in parameters]
    for length in [0.5**halvings for halvings in range(HALVINGS)]:
        for parameter, start, part in zip(parameters, before, step, strict=True):
            parameter.copy_(start.add(part, alpha=length))
        after = evaluate()
        if after < loss:
            return length, after
    for parameter, start in zip(parameters, before, strict=True):
        parameter.copy_(start)
    return None


def next_damping(damping: float, length: float) -> float:
    """Return the damping of the next step: half of it after a whole step, twice after less, ten times after none."""
    factor = 0.5 if length == 1 else 2.0 if length else 10.0
    return min(max(damping * factor, LEAST), MOST)
