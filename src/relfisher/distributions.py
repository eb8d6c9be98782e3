"""The exact Fisher information of torch's distributions in closed form, as coordinates in which it is the identity.

For each family there is a map r from a distribution to real coordinates, with constants taken at the point theta of the
metric, such that the information about any parameters is J' J with J = dr / dtheta. For a Normal, for instance, r is
(loc, sqrt(2) scale) / scale(theta), so that G = (dloc dloc' + 2 dscale dscale') / scale^2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributions
from torch.distributions import Distribution, transforms

from relfisher.shapes import Float

__all__ = ["coordinates", "has_closed_form", "samples_of"]

#: Coordinates [*batch, m] of a distribution, given the distribution at the point of the metric, which is constant.
Coordinates = Callable[[Any, Any], Tensor]


def has_closed_form(distribution: Any) -> bool:
    """Return whether `coordinates` knows the family of a distribution; a subclass is a family of its own."""
    kind = type(distribution)
    if kind is distributions.TransformedDistribution and not all(map(_is_fixed, distribution.transforms)):
        return False
    return kind in _COORDINATES and (_COORDINATES[kind] is not _base or has_closed_form(distribution.base_dist))


def coordinates(distribution: Any, at: Any) -> Float[Tensor, "*batch m"]:
    """Return coordinates of a distribution in which its Fisher information is the identity.

    Args:
        distribution: a distribution with a closed form, as a differentiable function of its parameters.
        at: the same distribution at the point of the metric; it is a constant.

    Returns:
        The coordinates of each element of the batch. The elements that `Independent` joins are separate here.
    """
    return _COORDINATES[type(distribution)](distribution, at)


def samples_of(distribution: Distribution) -> int:
    """Return the number of samples and positions of a distribution.

    The last batch axis of a distribution of single numbers holds the units of a sample, as the last axis of a
    pre-activation does, and the axes before it samples and positions. If there is one batch axis, or an event is a
    vector or a class, all batch axes are samples and positions.
    """
    shape, family = distribution.batch_shape, distribution
    while isinstance(family, distributions.Independent):
        family = family.base_dist
    of_numbers = not distribution.event_shape and not isinstance(family, distributions.Categorical)
    return math.prod(shape[:-1] if of_numbers and len(shape) > 1 else shape)


def _scaled(*pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Return the parameters times their constants, side by side: an information that is diagonal."""
    return torch.stack([parameter * constant.to(parameter.dtype) for parameter, constant in pairs], dim=-1)


def _by_probabilities(d: Any) -> bool:
    """Return whether a distribution was made of probabilities, from which torch makes logits that are clamped."""
    known = vars(getattr(d, "_categorical", d))  # torch computes the other form when it is asked for it
    return "logits" not in known or known["logits"] is not known.get("_param", known["logits"])


def _inverse_root(variance: Tensor) -> Tensor:
    """Return 1 / sqrt(variance), and 0 where an outcome is certain or impossible."""
    return torch.where(variance > 0, variance.rsqrt(), 0)


def _location_scale(of_location: float, of_scale: float) -> Coordinates:
    """Return the coordinates of a symmetric family: both informations are those at scale 1 over scale^2."""
    return lambda d, at: _scaled((d.loc, math.sqrt(of_location) / at.scale), (d.scale, math.sqrt(of_scale) / at.scale))


def _bernoulli(d: Any, at: Any) -> Tensor:
    """(14) from the log-odds, times the number of trials of a binomial."""
    trials = torch.as_tensor(getattr(at, "total_count", 1)).sqrt()
    if _by_probabilities(d):
        return _scaled((d.probs, trials * _inverse_root(at.probs * (1 - at.probs))))
    return _scaled((d.logits, trials * (torch.sigmoid(at.logits) * torch.sigmoid(-at.logits)).sqrt()))


def _geometric(d: Any, at: Any) -> Tensor:
    if _by_probabilities(d):
        return _scaled((d.probs, _inverse_root(1 - at.probs) / at.probs))
    return _scaled((d.logits, torch.sigmoid(-at.logits).sqrt()))


def _classes(d: Any, at: Any) -> Tensor:
    """(25) from the normalized log-probabilities, times the draws of a multinomial; impossible classes count as 0."""
    trials = math.sqrt(getattr(at, "total_count", 1))
    if _by_probabilities(d):
        return d.probs * (trials * _inverse_root(at.probs))  # type: ignore[no-any-return]
    logits = torch.where(at.probs > 0, d.logits, torch.zeros_like(d.logits))
    return logits * (trials * at.probs.sqrt())  # type: ignore[no-any-return]


def _trigamma(x: Tensor) -> Tensor:
    """Return psi'(x) as a Hurwitz zeta function; torch.polygamma keeps nine digits only."""
    values: Tensor = torch.special.zeta(torch.full_like(x, 2.0), x)
    return values


def _excess(x: Tensor) -> Tensor:
    """Return psi'(x) - 1 / x, where it cancels by the asymptotic series."""
    inverse = (1 / x).square()
    series = 1 / 6 + inverse * (-1 / 30 + inverse * (1 / 42 + inverse * (-1 / 30 + inverse * 5 / 66)))
    return torch.where(x < 20, _trigamma(x) - 1 / x, inverse * (1 / 2 + series / x))


def _gamma(d: Any, at: Any) -> Tensor:
    """The scale at a fixed shape, and what psi' of the shape is more than 1 / shape."""
    shape, rate = at.concentration.double(), at.rate.double()
    scale = _scaled((d.rate, shape.sqrt() / rate), (d.concentration, -shape.rsqrt())).sum(-1, keepdim=True)
    return torch.cat([scale, _scaled((d.concentration, _excess(shape).sqrt()))], dim=-1)


def _dirichlet(d: Any, at: Any) -> Tensor:
    return _simplex(d.concentration, at.concentration.double())


def _beta(d: Any, at: Any) -> Tensor:
    alpha, constant = (torch.stack([each.concentration1, each.concentration0], dim=-1) for each in (d, at))
    return _simplex(alpha, constant.double())


def _simplex(alpha: Float[Tensor, "*batch m"], constant: Float[Tensor, "*batch m"]) -> Tensor:
    # The information diag(psi'(alpha)) - psi'(A), A = sum alpha, is the sum of two parts whose roots do not cancel:
    # diag(1 / alpha) - 1 / A, and the same with psi'(x) - 1 / x in place of 1 / x.
    unit = torch.eye(constant.shape[-1], dtype=constant.dtype, device=constant.device)
    total, others = constant.sum(-1, keepdim=True), constant @ (1 - unit)
    first = torch.where(unit > 0, (others / constant).unsqueeze(-1), -1) * (constant.sqrt() / total).unsqueeze(-1)
    excess = _excess(constant)
    shares = 1 / excess
    part = 1 - (1 - _excess(total) * shares.sum(-1, keepdim=True)).clamp(min=0).sqrt()
    along = (shares / shares.sum(-1, keepdim=True)).sqrt()
    second = (unit - part.unsqueeze(-1) * along.unsqueeze(-1) * along.unsqueeze(-2)) * excess.sqrt().unsqueeze(-2)
    roots = torch.cat([first, second], dim=-2).to(alpha.dtype)
    return (roots @ alpha.unsqueeze(-1)).squeeze(-1)


def _gumbel(d: Any, at: Any) -> Tensor:
    cross = -0.42278433509846713  # Euler's constant - 1
    of_scale = math.sqrt(math.pi**2 / 6)
    return _scaled((d.loc + cross * d.scale, 1 / at.scale), (d.scale, of_scale / at.scale))


def _von_mises(d: Any, at: Any) -> Tensor:
    """The ratio of Bessel functions A = I1 / I0 is the mean of the cosine, and its derivative the variance."""
    kappa = at.concentration.double()
    mean = torch.special.i1e(kappa) / torch.special.i0e(kappa)
    inverse = 1 / kappa
    series = inverse.square() * (1 / 2 + inverse * (1 / 4 + inverse * (3 / 8 + inverse * 25 / 32)))
    variance = torch.where(kappa < 1e3, 1 - mean * inverse - mean.square(), series)  # where the difference cancels
    return _scaled((d.loc, (kappa * mean).sqrt()), (d.concentration, variance.sqrt()))


def _multivariate_normal(d: Any, at: Any) -> Tensor:
    """The mean in units of L, and L^-1 dL + (L^-1 dL)' over root 2, which is half the trace of (S^-1 dS)^2."""
    mean = torch.linalg.solve_triangular(at.scale_tril, d.loc.unsqueeze(-1), upper=False).squeeze(-1)
    factor = torch.linalg.solve_triangular(at.scale_tril, d.scale_tril, upper=False)
    return torch.cat([mean, ((factor + factor.mT) / math.sqrt(2)).flatten(-2)], dim=-1)


def _low_rank_normal(d: Any, at: Any) -> Tensor:
    full = [distributions.MultivariateNormal(each.loc, each.covariance_matrix) for each in (d, at)]
    return _multivariate_normal(*full)


def _base(d: Any, at: Any) -> Tensor:
    """The information of a fixed bijection of a distribution, or of independent elements, is that of the base."""
    return coordinates(d.base_dist, at.base_dist)


#: Bijections without parameters.
_FIXED = {
    transforms.ExpTransform,
    transforms.ReshapeTransform,
    transforms.SigmoidTransform,
    transforms.SoftplusTransform,
    transforms.StickBreakingTransform,
    transforms.TanhTransform,
}


def _is_fixed(transform: Any) -> bool:
    """Return whether a transform is a bijection without parameters, an inverse of one, or made of some of them."""
    kind = type(transform)
    if kind is transforms.ComposeTransform:
        return all(map(_is_fixed, transform.parts))
    if kind is transforms.IndependentTransform:
        return _is_fixed(transform.base_transform)
    return (type(transform.inv) if kind is transforms._InverseTransform else kind) in _FIXED


_COORDINATES: dict[type[Distribution], Coordinates] = {
    distributions.Bernoulli: _bernoulli,
    distributions.Beta: _beta,
    distributions.Binomial: _bernoulli,
    distributions.Categorical: _classes,
    distributions.Cauchy: _location_scale(1 / 2, 1 / 2),
    distributions.Chi2: _gamma,
    distributions.Dirichlet: _dirichlet,
    distributions.Exponential: lambda d, at: _scaled((d.rate, 1 / at.rate)),
    distributions.Gamma: _gamma,
    distributions.Geometric: _geometric,
    distributions.Gumbel: _gumbel,
    distributions.HalfNormal: lambda d, at: _scaled((d.scale, math.sqrt(2) / at.scale)),
    distributions.Independent: _base,
    distributions.InverseGamma: _base,
    distributions.Laplace: _location_scale(1, 1),
    distributions.LogNormal: _base,
    distributions.LogisticNormal: _base,
    distributions.LowRankMultivariateNormal: _low_rank_normal,
    distributions.Multinomial: _classes,
    distributions.MultivariateNormal: _multivariate_normal,
    distributions.Normal: _location_scale(1, 2),
    distributions.OneHotCategorical: _classes,
    distributions.OneHotCategoricalStraightThrough: _classes,
    distributions.Poisson: lambda d, at: _scaled((d.rate, at.rate.rsqrt())),
    distributions.TransformedDistribution: _base,
    distributions.VonMises: _von_mises,
}
