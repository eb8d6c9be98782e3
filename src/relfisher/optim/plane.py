"""The step in the plane of two directions that lowers a sum of squares most, by the global metric of the residuals.

As in section 7 of Martens & Grosse 2015, the metric of the layers gives a direction, and the global metric, restricted
to this direction and the last step, the length along each. Only the derivatives of the residuals along both enter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["along", "chosen", "damped"]

LEAST, MOST = 1e-8, 1e6


def along(residuals: Tensor, parameters: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, Sequence[Tensor]]:
    """Return the gradient of the sum of squares, and what `chosen` needs to differentiate along directions.

    Args:
        residuals: the residuals [residuals], with their graph.
        parameters: the parameters.

    Returns:
        The gradient by each parameter, the weights of the residuals in it, and the gradients with their graph.
    """
    weights = (2 * residuals.detach()).requires_grad_()
    gradients = torch.autograd.grad(residuals, parameters, weights, create_graph=True, materialize_grads=True)
    return [gradient.detach() for gradient in gradients], weights, gradients


def chosen(
    residuals: Tensor,
    weights: Tensor,
    gradients: Sequence[Tensor],
    directions: Sequence[Sequence[Tensor]],
    damping: float,
) -> tuple[list[float], float]:
    """Return the share of each direction in the best step.

    Args:
        residuals: the residuals r [residuals].
        weights: from `along`.
        gradients: from `along`.
        directions: one or several directions, with a tensor for each parameter.
        damping: added to the Gram matrix of the derivatives J d, each scaled to length 1.

    Returns:
        The shares c that minimize |r + J sum_i c_i d_i|^2 plus damping, and the decrease that they promise.
    """
    used = [place for place, gradient in enumerate(gradients) if gradient.requires_grad]
    outputs = [gradients[place] for place in used]
    found = [
        torch.autograd.grad(outputs, weights, [each[place] for place in used], retain_graph=True)[0]
        for each in directions
    ]
    slopes, flat = torch.stack(found).double(), residuals.detach().double()
    lengths = slopes.norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)
    slopes = slopes / lengths[:, None]
    gram = slopes @ slopes.mT
    gram.diagonal().add_(damping)
    shares = -torch.linalg.solve(gram, slopes @ flat)
    promised = flat.square().sum() - (flat + shares @ slopes).square().sum()
    scaled: list[float] = (shares / lengths).tolist()
    return scaled, float(promised)


def damped(damping: float, decrease: float, promised: float) -> float:
    """Return the damping for the next step, by the share of the promised decrease that came true (Marquardt 1963)."""
    share = decrease / promised if promised > 0 else 0.0
    if share > 0.75:
        return max(damping / 2, LEAST)
    return damping if share > 0.25 and math.isfinite(share) else min(damping * 4, MOST)
