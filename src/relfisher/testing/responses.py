"""The check of a response."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

from relfisher.responses import Response, UnitResponse
from relfisher.shapes import Float
from relfisher.testing.comparison import same

__all__ = ["check_response"]

_NODES = 256
_REACH = 12.0


def check_response(response: Response, z: Float[Tensor, "n out"] | None = None, rtol: float = 1e-5) -> None:
    """Check that a response's information is the Fisher information of its own log-density. Equations (1), (2).

    At each z, check that the probabilities sum to 1, that the expected score is 0, and that `information(z)` equals
    both the expected outer product of scores and minus the expected Hessian of `log_prob`. Also check that
    `operator(z)` agrees with it on products, diagonal and matrices, and that the `slope` of a unit response is the
    derivative of its `activation`. A `divergence`, where it is defined, must be the expected ln p(y | z) / p(y | z').
    Expectations are sums over `outcomes`. For a continuous response they are integrals over `activation(z)` plus or
    minus 12 `sigma` (1 if the response has none), which must contain its mass.

    Args:
        response: the response to check.
        z: float64 pre-activations to check at, away from kinks of the activation; None for a grid between -3 and 3.
        rtol: the relative tolerance.

    Raises:
        AssertionError: if a check fails; the message says which one, and where.
    """
    points = torch.linspace(-3, 3, 14, dtype=torch.float64).reshape(-1, 2) if z is None else z
    for sample in points:
        _check_expectations(response, sample, rtol)
    information = response.information(points)
    dense = torch.diag_embed(information) if isinstance(response, UnitResponse) else information
    operator = response.operator(points)
    probe = torch.linspace(-1, 2, points.numel(), dtype=points.dtype).reshape(points.shape)
    same("operator(z).dense()", operator.dense(), dense, rtol)
    same("operator(z).diagonal()", operator.diagonal(), dense.diagonal(dim1=-2, dim2=-1), rtol)
    same("operator(z).apply(r)", operator.apply(probe), (dense @ probe.unsqueeze(-1)).squeeze(-1), rtol)
    if isinstance(response, UnitResponse):
        slope = vmap(grad(lambda point: response.activation(point.reshape(1, 1)).sum()))(points.reshape(-1))
        same("slope(z)", response.slope(points), slope.reshape(points.shape), rtol)


def _check_expectations(response: Response, z: Float[Tensor, "out"], rtol: float) -> None:
    """Compare F(z) of one sample with the two expectations that define it."""
    joint = not isinstance(response, UnitResponse)
    information = response.information(z.unsqueeze(0)).squeeze(0)
    expected = information if joint else torch.diag(information)

    def log_prob(point: Tensor, y: Tensor) -> Tensor:
        return response.log_prob(point.unsqueeze(0), y.unsqueeze(0)).sum()

    y, weights = _responses(response, z)
    scores = vmap(grad(log_prob), (None, 0))(z, y)
    hessians = vmap(jacrev(grad(log_prob)), (None, 0))(z, y)
    if joint:
        mean, outer = weights @ scores, (scores * weights.unsqueeze(1)).T @ scores
        curvature = -torch.einsum("k,kij->ij", weights, hessians)
    else:
        # Units are independent: integrate each one separately, along the diagonal.
        mean, outer = (weights * scores).sum(0), torch.diag((weights * scores.square()).sum(0))
        curvature = -torch.diag((weights * hessians.diagonal(dim1=-2, dim2=-1)).sum(0))
    mass = weights.sum(0)
    where = f"at z = {[round(value, 3) for value in z.tolist()]}"
    same(f"the total probability {where}", mass, torch.ones_like(mass), rtol)
    same(f"the expected score {where}", mean, torch.zeros_like(mean), rtol)
    same(f"information(z) against the outer product of scores {where}", expected, outer, rtol)
    same(f"information(z) against minus the expected Hessian {where}", expected, curvature, rtol)
    if type(response).divergence is not Response.divergence:
        other = z.flip(0) + 0.25
        before, after = (response.log_prob(point.expand(len(y), -1), y) for point in (z, other))
        divergence = response.divergence(z.unsqueeze(0), other.unsqueeze(0)).squeeze(0)
        same(f"divergence(z, z') {where}", divergence, (weights * (before - after)).sum(0), rtol)


def _responses(response: Response, z: Float[Tensor, "out"]) -> tuple[Tensor, Tensor]:
    """Return responses of one sample and their weights: probabilities, or densities times quadrature weights.

    Both are [k, out], with one weight per unit, or [k] if the response couples the units.

    Raises:
        AssertionError: if the response cannot be integrated.
    """
    values = response.outcomes(z.shape[0])
    unit = isinstance(response, UnitResponse)
    if values is not None:
        y = torch.tensor(values, dtype=z.dtype if unit else None)
        y = y.unsqueeze(1).expand(-1, z.shape[0]) if unit else y
        return y, response.log_prob(z.expand(len(values), -1), y).exp()
    if not isinstance(response, UnitResponse):
        raise AssertionError("a response with a continuum of outcomes must be a UnitResponse to be integrated")
    spread = _REACH * float(getattr(response, "sigma", 1.0))
    # The trapezoidal rule converges geometrically for a density that vanishes at both ends.
    offsets = torch.linspace(-spread, spread, _NODES + 1, dtype=z.dtype)
    y = response.activation(z) + offsets.unsqueeze(1)
    return y, response.log_prob(z.expand(len(y), -1), y).exp() * (2 * spread / _NODES)
