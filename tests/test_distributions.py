"""Closed forms of torch's distributions against expectations of the scores of their log-densities, in float64."""

import itertools
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch
from cases import assert_close
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import polygamma
from torch import Tensor, distributions
from torch.distributions import Distribution, Independent, TransformedDistribution, transforms
from torch.func import jacfwd

from relfisher import relative_fisher
from relfisher.distributions import has_closed_form

Grid = tuple[Tensor, Tensor]  # responses [k, ...], and the weights [k] that turn densities into probabilities

EVEN = torch.linspace(-40, 40, 2001, dtype=torch.float64)
STEP = 80 / 2000


def counts(_: Distribution) -> Grid:
    """Return the whole numbers up to where all masses of the tests vanish."""
    y = torch.arange(400, dtype=torch.float64)
    return y, torch.ones_like(y)


def classes(d: Distribution) -> Grid:
    y = torch.arange(d.probs.shape[-1])
    return y, torch.ones(len(y), dtype=torch.float64)


def corners(_: Distribution) -> Grid:
    return torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)


def positive(_: Distribution) -> Grid:
    return EVEN.exp(), EVEN.exp() * STEP


def line(d: Distribution) -> Grid:
    """Return both half-lines from the location, where a density may have a kink."""
    y, weight = positive(d)
    return torch.cat([d.loc.reshape(()) - y, d.loc.reshape(()) + y]), torch.cat([weight, weight])


def between(_: Distribution) -> Grid:
    return torch.sigmoid(EVEN), torch.sigmoid(EVEN) * torch.sigmoid(-EVEN) * STEP


def circle(_: Distribution) -> Grid:
    y = torch.linspace(-math.pi, math.pi, 401, dtype=torch.float64)[:-1]
    return y, torch.full_like(y, 2 * math.pi / 400)


def simplex(_: Distribution) -> Grid:
    """Return the points of a simplex of three from two fractions, the second one of what the first one left."""
    t = torch.linspace(-20, 20, 81, dtype=torch.float64)
    one, two = torch.cartesian_prod(torch.sigmoid(t), torch.sigmoid(t)).unbind(-1)
    y = torch.stack([one, (1 - one) * two, (1 - one) * (1 - two)], dim=-1)
    area = one * (1 - one) * two * (1 - two) * (1 - one) * 0.5**2
    inside = (y > 1e-12).all(-1)
    return y[inside], area[inside]


def multinomial(d: Distribution) -> Grid:
    y = [each for each in itertools.product(range(d.total_count + 1), repeat=3) if sum(each) == d.total_count]
    return torch.tensor(y, dtype=torch.float64), torch.ones(len(y), dtype=torch.float64)


def normal_nodes(d: Distribution) -> Grid:
    """Return a Gauss-Hermite rule of a normal in two dimensions, divided by its density."""
    nodes, masses = np.polynomial.hermite.hermgauss(6)
    z = torch.tensor(list(itertools.product(nodes, repeat=2))) * math.sqrt(2)
    weight = torch.tensor([a * b / math.pi for a, b in itertools.product(masses, repeat=2)])
    y = d.mean + z @ torch.linalg.cholesky(d.covariance_matrix).T
    return y, weight / d.log_prob(y).exp()


def tril(theta: Tensor) -> Tensor:
    return torch.diag_embed(theta[2:4].exp()) + torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=theta.dtype) * theta[0]


def logistic_normal(theta: Tensor) -> Distribution:
    return distributions.LogisticNormal(theta[:1] * theta[1], theta[2:3].exp())


def logistic_points(_: Distribution) -> Grid:
    y, weight = between(_)
    return torch.stack([y, 1 - y], dim=-1), weight


a = lambda theta: torch.exp(theta[0] * theta[1])  # noqa: E731
b = lambda theta: torch.exp(theta[2] - theta[0] / 2)  # noqa: E731
c = lambda theta: theta[3] + theta[1] * theta[2]  # noqa: E731
FAMILIES: dict[str, tuple[Callable[[Tensor], Distribution], Callable[[Distribution], Grid]]] = {
    "Bernoulli": (lambda t: distributions.Bernoulli(torch.sigmoid(c(t))), lambda d: tuple(g[:2] for g in counts(d))),
    "Bernoulli of logits": (lambda t: distributions.Bernoulli(logits=c(t)), lambda d: tuple(g[:2] for g in counts(d))),
    "Beta": (lambda t: distributions.Beta(1 + a(t), 1 + b(t)), between),
    "Binomial": (lambda t: distributions.Binomial(7, logits=c(t)), lambda d: tuple(g[:8] for g in counts(d))),
    "Categorical": (lambda t: distributions.Categorical(logits=t * c(t)), classes),
    "Categorical of probabilities": (lambda t: distributions.Categorical(torch.softmax(t, 0)), classes),
    "Cauchy": (lambda t: distributions.Cauchy(c(t), a(t)), line),
    "Chi2": (lambda t: distributions.Chi2(2 + a(t)), positive),
    "Dirichlet": (lambda t: distributions.Dirichlet(1 + torch.stack([a(t), b(t), c(t).square()])), simplex),
    "Exponential": (lambda t: distributions.Exponential(a(t)), positive),
    "Gamma": (lambda t: distributions.Gamma(0.7 + a(t), b(t)), positive),
    "Geometric": (lambda t: distributions.Geometric(0.1 + 0.8 * torch.sigmoid(c(t))), counts),
    "Gumbel": (lambda t: distributions.Gumbel(c(t), a(t)), line),
    "HalfNormal": (lambda t: distributions.HalfNormal(a(t)), positive),
    "InverseGamma": (lambda t: distributions.InverseGamma(0.7 + a(t), b(t)), positive),
    "Laplace": (lambda t: distributions.Laplace(c(t), a(t)), line),
    "LogNormal": (lambda t: distributions.LogNormal(c(t), a(t)), positive),
    "LogisticNormal": (logistic_normal, logistic_points),
    "LowRankMultivariateNormal": (
        lambda t: distributions.LowRankMultivariateNormal(t[:2] * t[1], t[1:3, None], t[2:4].exp()), normal_nodes,
    ),
    "Multinomial": (lambda t: distributions.Multinomial(4, logits=t[:3] * c(t)), multinomial),
    "MultivariateNormal": (lambda t: distributions.MultivariateNormal(t[:2], scale_tril=tril(t)), normal_nodes),
    "MultivariateNormal of a covariance": (
        lambda t: distributions.MultivariateNormal(t[1:3] * t[3], tril(t) @ tril(t).T), normal_nodes,
    ),
    "MultivariateNormal of a precision": (
        lambda t: distributions.MultivariateNormal(t[1:3], precision_matrix=tril(t) @ tril(t).T), normal_nodes,
    ),
    "Normal": (lambda t: distributions.Normal(c(t), a(t)), line),
    "OneHotCategorical": (lambda t: distributions.OneHotCategorical(logits=t * c(t)), corners),
    "Poisson": (lambda t: distributions.Poisson(a(t)), counts),
    "VonMises": (lambda t: distributions.VonMises(c(t), a(t)), circle),
    "TransformedDistribution": (
        lambda t: TransformedDistribution(distributions.Normal(c(t), a(t)), [transforms.SigmoidTransform()]), between,
    ),
}  # fmt: skip
thetas = st.lists(st.floats(-1, 1), min_size=4, max_size=4).map(lambda t: torch.tensor(t, dtype=torch.float64))


def expected(distribution: Callable[[Tensor], Distribution], grid: Grid, theta: Tensor) -> Tensor:
    """Return E[s s'] over a grid of responses of one sample."""
    y, weight = grid
    log_prob = lambda at: distribution(at).log_prob(y)  # noqa: E731
    mass = (log_prob(theta).exp() * weight).nan_to_num()
    scores = jacfwd(log_prob)(theta).nan_to_num(posinf=0.0, neginf=0.0)
    assert float(mass.sum()) == pytest.approx(1, rel=1e-6)
    return (scores * mass.unsqueeze(1)).T @ scores


@pytest.mark.parametrize(("distribution", "grid"), FAMILIES.values(), ids=FAMILIES)
@settings(max_examples=8)
@given(theta=thetas)
def test_closed_forms_are_the_expectation_over_the_responses(distribution, grid, theta: Tensor) -> None:
    found = relative_fisher(distribution, theta)
    assert found.standard_error is None
    assert_close(found.to_dense(), expected(distribution, grid(distribution(theta)), theta), 1e-6)


def test_samples_are_averaged_and_units_summed() -> None:
    """Binomials of different counts, which torch cannot enumerate: n / (p (1 - p)) in each probability."""
    counted = torch.tensor([[2.0, 5.0, 1.0], [4.0, 3.0, 9.0]], dtype=torch.float64)
    probs = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    found = relative_fisher(lambda p: distributions.Binomial(counted, p.expand(2, 3)), probs)
    assert found.samples == 2
    assert_close(found.to_dense(), torch.diag(counted.mean(0) / (probs * (1 - probs))))


def test_independent_bernoullis_are_exact() -> None:
    probs = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    found = relative_fisher(lambda p: Independent(distributions.Bernoulli(p.expand(6, 3)), 1), probs)
    assert found.samples == 6
    assert_close(found.to_dense(), torch.diag(1 / (probs * (1 - probs))))


@pytest.mark.parametrize("kappa", [1e-3, 2.0, 999.0, 1001.0, 1e6])
def test_von_mises_information_is_that_of_bessel_functions(kappa: float) -> None:
    """kappa A and A' = 1 - A / kappa - A^2, by quadrature of exp(kappa (cos y - 1)) over where its mass lies."""
    reach = min(np.pi, 12 / math.sqrt(kappa))
    y = np.linspace(-reach, reach, 20001)[:-1]
    mass = np.exp(-2 * kappa * np.sin(y / 2) ** 2)
    mass = mass / mass.sum()
    sine, cosine = np.sin(y), 2 * np.sin(y / 2) ** 2
    information = [kappa**2 * (mass * sine**2).sum(), (mass * (cosine - (mass * cosine).sum()) ** 2).sum()]
    theta = torch.tensor([0.4, kappa], dtype=torch.float64)
    found = relative_fisher(lambda t: distributions.VonMises(t[0], t[1]), theta).to_dense()
    np.testing.assert_allclose(found.diagonal(), information, rtol=1e-7)
    assert found[0, 1] == 0


@given(alpha=st.floats(0.05, 1e5))
def test_large_shapes_keep_their_precision(alpha: float) -> None:
    """The determinant of a gamma's information is (alpha psi'(alpha) - 1) / beta^2, which tends to 1 / (2 alpha)."""
    theta = torch.tensor([alpha, 1.0])
    found = relative_fisher(lambda t: distributions.Gamma(t[0], t[1]), theta).to_dense().double()
    trigamma = float(torch.polygamma(1, theta[0].double()))
    assert float(found[0, 0]) == pytest.approx(trigamma, rel=1e-5)
    assert float(found[1, 1]) == pytest.approx(alpha, rel=1e-5)
    assert float(found[0, 1]) == pytest.approx(-1, rel=1e-5)


@given(alpha=st.floats(0.01, 1e3), beta=st.floats(0.01, 1e3))
def test_polygammas_have_all_digits(alpha: float, beta: float) -> None:
    theta = torch.tensor([alpha, beta], dtype=torch.float64)
    found = relative_fisher(lambda t: distributions.Beta(t[0], t[1]), theta).to_dense()
    own = polygamma(1, [alpha, beta])
    right = np.diag(own) - polygamma(1, alpha + beta)
    np.testing.assert_allclose(found, right, rtol=1e-12, atol=1e-13 * own.max())


def test_impossible_classes_contribute_nothing() -> None:
    logits = torch.tensor([0.3, -1.0, -math.inf], dtype=torch.float64)
    found = relative_fisher(lambda t: distributions.Categorical(logits=logits + t), torch.zeros(3).double()).to_dense()
    p = torch.softmax(logits, -1)
    assert_close(found, torch.diag(p) - torch.outer(p, p))


class Unknown(distributions.Normal):
    """A subclass may have any density, so that it is no Normal."""


@pytest.mark.parametrize(
    "distribution",
    [
        Unknown(0.0, 1.0),
        Independent(Unknown(torch.zeros(2), 1.0), 1),
        distributions.NegativeBinomial(3, 0.5),
        TransformedDistribution(distributions.Normal(0.0, 1.0), [transforms.AffineTransform(0.0, 2.0)]),
        TransformedDistribution(Unknown(0.0, 1.0), [transforms.ExpTransform()]),
    ],
    ids=lambda d: type(d).__name__,
)
def test_other_families_are_sampled(distribution: Distribution) -> None:
    assert not has_closed_form(distribution)


def test_a_bijection_with_parameters_is_sampled_with_the_right_information() -> None:
    scaled = lambda t: TransformedDistribution(  # noqa: E731
        distributions.Normal(0.0, 1.0), [transforms.AffineTransform(t, 2.0)]
    )
    found = relative_fisher(scaled, torch.tensor(0.3), draws=600)
    assert found.standard_error > 0
    assert abs(float(found.to_dense()) - 0.25) <= 4 * float(found.standard_error)


@pytest.mark.parametrize("kind", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("p", [0.3, 1e-9, 1e-18])
def test_the_information_about_small_probabilities(p: float, kind: torch.dtype) -> None:
    """The logits of torch are clamped at the machine epsilon, and have no derivative there."""
    theta = torch.tensor(p, dtype=kind)
    n = 1 / (p * (1 - p))
    for distribution, wanted in (
        (lambda q: distributions.Bernoulli(q), n),
        (lambda q: distributions.Bernoulli(q.expand(2)).expand((3, 2)), 2 * n),
        (lambda q: Independent(distributions.Bernoulli(q.expand(4, 2)), 1), 2 * n),
        (lambda q: distributions.Binomial(7, q), 7 * n),
        (lambda q: distributions.Geometric(q), n / p),
        (lambda q: distributions.Categorical(torch.stack([q, 1 - q])), n),
        (lambda q: distributions.OneHotCategorical(torch.stack([q, 1 - q])), n),
        (lambda q: distributions.Multinomial(3, torch.stack([q, 1 - q])), 3 * n),
    ):
        assert float(relative_fisher(distribution, theta).to_dense()) == pytest.approx(wanted, rel=1e-5)


def test_certain_outcomes_contribute_nothing() -> None:
    z = torch.tensor([100.0, 0.0])
    found = relative_fisher(lambda t: distributions.Bernoulli(torch.sigmoid(t)), z).to_dense()
    assert_close(found, torch.diag(torch.tensor([0, 0.125])), 1e-6)


@pytest.mark.parametrize("alpha", [0.1, 19.0, 21.0, 1e6, 1e12, 1e16])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32], ids=str)
def test_shapes_of_any_size(alpha: float, kind: torch.dtype) -> None:
    theta = torch.tensor([alpha, 0.5], dtype=kind)
    with mpmath.workdps(60):
        large, small = (mpmath.mpf(float(each)) for each in theta)
        gamma = [[mpmath.psi(1, large), -1 / small], [-1 / small, large / small**2]]
        both = mpmath.psi(1, large + small)
        beta = [[mpmath.psi(1, large) - both, -both], [-both, mpmath.psi(1, small) - both]]
        three = mpmath.psi(1, 3 * large)
        dirichlet = [[3 * mpmath.psi(1, large) - 9 * three, 0], [0, 0]]
        chi2 = [[mpmath.psi(1, large / 2) / 4, 0], [0, 0]]
    for distribution, wanted in (
        (lambda t: distributions.Gamma(t[0], t[1]), gamma),
        (lambda t: distributions.InverseGamma(t[0], t[1]), gamma),
        (lambda t: distributions.Beta(t[0], t[1]), beta),
        (lambda t: distributions.Dirichlet(t[0].expand(3)), dirichlet),
        (lambda t: distributions.Chi2(t[0]), chi2),
    ):
        found = relative_fisher(distribution, theta).to_dense().double().numpy()
        digits = 1e-5 if kind == torch.float32 else 1e-12
        np.testing.assert_allclose(found, np.array(wanted, dtype=np.float64), rtol=digits, atol=0)


@pytest.mark.parametrize(
    ("transform", "base"),
    [
        (transforms.ExpTransform().inv, distributions.Gamma),
        (transforms.ComposeTransform([transforms.TanhTransform(), transforms.ExpTransform()]), distributions.Normal),
        (transforms.IndependentTransform(transforms.ExpTransform(), 1), distributions.Normal),
        (transforms.StickBreakingTransform(), distributions.Normal),
        (transforms.ReshapeTransform((4,), (2, 2)), distributions.Normal),
    ],
    ids=lambda value: type(value).__name__,
)
def test_bijections_without_parameters_change_nothing(transform: transforms.Transform, base: type) -> None:
    theta = torch.tensor([0.7, 0.4], dtype=torch.float64)
    plain = lambda t: Independent(base(t[0].expand(4), t[1]), 1)  # noqa: E731
    found = relative_fisher(lambda t: TransformedDistribution(plain(t), transform), theta)
    assert found.standard_error is None
    assert_close(found.to_dense(), relative_fisher(plain, theta).to_dense())
