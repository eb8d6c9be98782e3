"""What the paper says beside its numbered equations, or in them without a formula of its own, as properties."""

import itertools

import pytest
import reference
import torch
from cases import UNITS, Problem, assert_close, problem, problems
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Independent
from torch.func import grad, hessian

from relfisher import layer_metric, neuron_metric, relative_fisher, responses
from relfisher.metric import TransformedMetric


def log_mixture(x: Tensor, theta: Tensor, y: float) -> Tensor:
    """Return ln p(y | x_n) of a network with two sigmoid units that are drawn, (4): ln sum_h p(y | h) p(h | x_n)."""
    hidden, head = theta[:6].reshape(2, 3), theta[6:]
    p = torch.sigmoid(reference.augment(x) @ hidden.T)
    terms = []
    for h in itertools.product((0.0, 1.0), repeat=2):
        state = torch.tensor(h, dtype=x.dtype)
        said = Bernoulli(logits=head[:2] @ state + head[2])
        terms.append(Bernoulli(p).log_prob(state).sum(-1) + said.log_prob(torch.tensor(y, dtype=x.dtype)))
    return torch.logsumexp(torch.stack(terms), dim=0)


@given(seed=st.integers(0, 1000))
def test_equation_4_with_hidden_units_that_are_stochastic(seed: int) -> None:
    """The outcomes of the response are listed, and the hidden units summed out, by hand in the reference."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    theta = torch.randn(9, generator=generator, dtype=torch.float64)

    def chance(at: Tensor, sample: Tensor) -> Tensor:
        p = reference.logistic(at[:6].reshape(2, 3) @ reference.augment(sample))
        terms = (
            (p[0] if one else 1 - p[0])
            * (p[1] if two else 1 - p[1])
            * reference.logistic(one * at[6] + two * at[7] + at[8])
            for one, two in itertools.product((0, 1), repeat=2)
        )
        return sum(terms)

    expected = torch.zeros(9, 9, dtype=torch.float64)
    for sample in x:
        slope, p = grad(chance)(theta, sample), chance(theta, sample)
        expected += torch.outer(slope, slope) / (p * (1 - p)) / len(x)  # (46)
    found = relative_fisher(lambda at, y: log_mixture(x, at, y), theta, outcomes=[0.0, 1.0])
    assert_close(found.to_dense(), expected)


@given(p=problems(), sigma=st.floats(0.5, 2))
def test_equation_7_takes_means_for_the_loss_and_the_metric(p: Problem, sigma: float) -> None:
    """One step of length 1 solves least squares if the loss is a mean, as g is; for a sum it is n times too long."""
    x = torch.randn(4 * p.x.shape[1] + 8, p.x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y, theta = x.sin().sum(1), p.theta[: p.x.shape[1] + 1]
    metric = neuron_metric(x, theta[:-1], theta[-1], responses.LinearGaussian(sigma))
    total = lambda at: (reference.augment(x) @ at - y).square().sum() / (2 * sigma**2)  # noqa: E731
    step = -metric.natural_gradient(grad(total)(theta))
    best = torch.linalg.lstsq(reference.augment(x), y.unsqueeze(1)).solution.squeeze(1)
    assert_close(theta + step / len(x), best, 1e-7)


@given(p=problems(), scale=st.floats(1.5, 4))
def test_equation_8_does_not_hold_with_damping(p: Problem, scale: float) -> None:
    x = torch.randn(12, p.x.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = p.theta[: p.x.shape[1] + 1]
    metric = neuron_metric(x, theta[:-1], theta[-1], responses.TanhBernoulli())
    jacobian = scale * torch.eye(len(theta), dtype=torch.float64)
    gradient = torch.ones_like(theta)
    there = TransformedMetric(metric, jacobian)
    plain, damped = (
        jacobian @ there.natural_gradient(jacobian.T @ gradient, damping) - metric.natural_gradient(gradient, damping)
        for damping in (0.0, 1.0)
    )
    assert plain.norm() < 1e-9 * gradient.norm() / metric.eigvalsh()[0]
    assert damped.norm() > 1e-2


@pytest.mark.parametrize("name", UNITS)
@given(z=st.floats(-6, 6).filter(lambda z: abs(z) > 1e-3))
def test_nu_is_positive_except_for_a_relu_below_zero(name: str, z: float) -> None:
    """(21) calls it positive. It is 0 where the activation does not move."""
    nu = float(UNITS[name][0].information(torch.tensor([z], dtype=torch.float64)))
    assert nu == 0 if name == "relu" and z < 0 else nu > 0


@given(seed=st.integers(0, 1000), out=st.integers(1, 4), sigma=st.floats(0.3, 3))
def test_batch_norm_makes_the_diagonal_of_a_linear_layers_metric_uniform(seed: int, out: int, sigma: float) -> None:
    """Section 5.2: for normalized inputs every diagonal entry of (22) is 1 / sigma^2."""
    x = 3 * torch.randn(20, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 5
    x = (x - x.mean(0)) / x.std(0, correction=0)
    weight = torch.ones(out, 4, dtype=torch.float64)
    diagonal = layer_metric(x, weight, weight[:, 0], responses.LinearGaussian(sigma)).diagonal()
    assert_close(diagonal, torch.full_like(diagonal, sigma**-2))


@given(seed=st.integers(0, 1000), k=st.integers(1, 3))
def test_mixed_coordinates_make_the_metric_of_an_exponential_family_block_diagonal(seed: int, k: int) -> None:
    """Section 1: the first k natural and the other moment parameters, J by inverting the change of coordinates."""
    theta = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    potential = lambda at: torch.log(1 + torch.exp(at).sum())  # noqa: E731
    mixed = lambda at: torch.cat([at[:k], grad(potential)(at)[k:]])  # noqa: E731
    outcomes = [*torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)]
    metric = relative_fisher(lambda at, t: at @ t - potential(at), theta, outcomes=outcomes)
    assert_close(metric.to_dense(), hessian(potential)(theta))
    found = TransformedMetric(metric, torch.linalg.inv(reference.jacobian(mixed, theta))).to_dense()
    assert_close(found, torch.block_diag(found[:k, :k], found[k:, k:]))
    assert metric.to_dense()[:k, k:].abs().min() > 1e-6


@given(seed=st.integers(0, 1000))
def test_natural_and_moment_parameters_are_dual(seed: int) -> None:
    """Section 1: <e^i, e_j> is 1 for i = j and 0 otherwise."""
    p = problem(n=1, out=3, seed=seed)
    metric = relative_fisher(lambda logits: Independent(Bernoulli(logits=logits), 1), p.z[0])
    moments = reference.jacobian(torch.sigmoid, p.z[0])  # dH / dTheta
    assert_close(metric @ torch.linalg.inv(moments), torch.eye(3, dtype=torch.float64))


@given(seed=st.integers(0, 1000))
def test_a_statistic_has_no_more_information_and_as_much_if_it_is_sufficient(seed: int) -> None:
    """Section 6: I_T <= I_X. T joins two of four classes; or it is the sum of three draws, which is sufficient."""
    theta = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    whole = relative_fisher(lambda at, y: torch.log_softmax(at, 0)[y], theta, outcomes=range(4)).to_dense()

    def joined(at: Tensor, y: int) -> Tensor:
        logs = torch.log_softmax(at, 0)
        return torch.logaddexp(logs[0], logs[1]) if y == 0 else logs[y + 1]

    lost = whole - relative_fisher(joined, theta, outcomes=range(3)).to_dense()
    values = torch.linalg.eigvalsh(lost)
    assert values[0] > -1e-12
    assert values[-1] > 1e-4

    draws = relative_fisher(lambda at: Independent(Bernoulli(logits=at.sum().expand(3)), 1), theta[:2])
    counted = [1.0, 3.0, 3.0, 1.0]
    log_count = lambda at, t: (  # noqa: E731
        torch.log(torch.tensor(counted[t])) + t * at.sum() - 3 * torch.log(1 + torch.exp(at.sum()))
    )
    assert_close(relative_fisher(log_count, theta[:2], outcomes=range(4)).to_dense(), draws.to_dense(), 1e-6)
