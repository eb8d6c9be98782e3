"""The steps of the appendices that are more than their results: scores, Hessians, forms of one density."""

import pytest
import reference
import torch
from cases import Problem, assert_close, problems
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli
from torch.func import grad, hessian, vmap

from relfisher import layer_metric, observed_fisher, relative_fisher, responses

points = st.lists(st.floats(-8, 8), min_size=1, max_size=4).map(lambda z: torch.tensor(z, dtype=torch.float64))


def affine(p: Problem, theta: Tensor) -> Tensor:
    return reference.augment(p.x) @ theta.reshape(p.weight.shape[0], -1).T


@given(p=problems())
def test_equation_2_square_roots_of_the_probabilities(p: Problem) -> None:
    """F = 4 sum_y d sqrt(p(y)) d sqrt(p(y))'."""
    response = responses.Categorical()
    for z in p.z:
        roots = lambda at: (torch.exp(at) / torch.exp(at).sum()).sqrt()  # noqa: E731
        slopes = reference.jacobian(roots, z)
        assert_close(response.information(z.unsqueeze(0))[0], 4 * slopes.T @ slopes)


@given(z=points)
def test_tanh_and_sech(z: Tensor) -> None:
    """(34) to (37), and (12)."""
    plus, minus = torch.exp(z), torch.exp(-z)
    sech = 2 / (plus + minus)
    response = responses.TanhBernoulli()
    assert_close(response.activation(z), (plus - minus) / (plus + minus))
    assert_close(response.slope(z), sech.square())
    assert_close(response.information(z), (1 + torch.tanh(z)) * (1 - torch.tanh(z)))


@given(z=points)
def test_sigmoid_and_its_slope(z: Tensor) -> None:
    """(38), (39), and (14)."""
    mean = 1 / (1 + torch.exp(-z))
    response = responses.SigmoidBernoulli()
    assert_close(response.activation(z), mean)
    assert_close(response.slope(z), mean * (1 - mean))


@given(z=points, omega=st.floats(0.3, 2), iota=st.floats(0, 0.9))
def test_smoothed_relu_and_its_slope(z: Tensor, omega: float, iota: float) -> None:
    """(40) and (41), with iota where the text has lost it."""
    low, high = torch.exp(iota * z / omega), torch.exp(z / omega)
    response = responses.SmoothReLUGaussian(omega, iota)
    assert_close(response.activation(z), omega * torch.log(low + high))
    assert_close(response.slope(z), (iota * low + high) / (low + high))


@given(z=points, alpha=st.floats(0.2, 3))
def test_elu_and_its_slope(z: Tensor, alpha: float) -> None:
    """(42), (43), (62)."""
    response = responses.ELUGaussian(alpha)
    assert_close(response.activation(z), torch.where(z >= 0, z, alpha * (torch.exp(z) - 1)))
    assert_close(response.slope(z), torch.where(z >= 0, torch.ones_like(z), alpha * torch.exp(z)))


@pytest.mark.parametrize(("alpha", "jumps"), [(1.0, False), (0.5, True)])
def test_information_of_an_elu_is_continuous_for_alpha_one_alone(alpha: float, jumps: bool) -> None:
    """The remark after (20) does not say so."""
    below, above = responses.ELUGaussian(alpha).information(torch.tensor([-1e-6, 0.0], dtype=torch.float64))
    assert (abs(float(above - below)) > 0.1) is jumps


@given(w=st.floats(-2, 2))
def test_bernoulli_neuron_of_any_mean(w: float) -> None:
    """(44) to (46): the two outcomes' slopes cancel, and 1 / (p+ p-) times the outer product is left."""
    theta = torch.tensor([w, 0.3], dtype=torch.float64)
    mean = lambda at: 0.5 + 0.4 * torch.sin(at[0] * at[1] + at.sum())  # noqa: E731
    slope, p = grad(mean)(theta), mean(theta)
    assert_close(slope + grad(lambda at: 1 - mean(at))(theta), torch.zeros(2, dtype=torch.float64))
    found = relative_fisher(lambda at: Bernoulli(probs=mean(at)), theta).to_dense()
    assert_close(found, torch.outer(slope, slope) / (p * (1 - p)))


@given(z=points)
def test_probabilities_of_the_two_outcomes(z: Tensor) -> None:
    """(11), (47), (48) and their exponential form (51), (52); (13), (54), (55)."""
    tanh, sigmoid, one = responses.TanhBernoulli(), responses.SigmoidBernoulli(), torch.ones_like(z)
    for y in (-one, one):
        assert_close(tanh.log_prob(z, y).exp(), (1 + y * torch.tanh(z)) / 2)
        assert_close(tanh.log_prob(z, y).exp(), torch.exp(y * z) / (torch.exp(z) + torch.exp(-z)))
    assert_close(sigmoid.log_prob(z, one).exp(), reference.logistic(z))
    assert_close(sigmoid.log_prob(z, 0 * one).exp(), 1 - reference.logistic(z))


@given(p=problems())
def test_log_likelihood_of_a_linear_layer_and_its_score(p: Problem) -> None:
    """(65), with the constant for all units, and (66)."""
    response, out = responses.LinearGaussian(0.7), p.weight.shape[0]
    y = p.z.cos()
    terms = response.log_prob(p.z, y)
    constant = torch.log(torch.tensor(2 * torch.pi * 0.7**2, dtype=torch.float64)) * out / 2
    assert_close(terms.sum(1), -constant - (y - p.z).square().sum(1) / (2 * 0.7**2))
    one = lambda theta: response.log_prob(affine(p, theta), y)[0].sum()  # noqa: E731
    score = grad(one)(p.theta).reshape(out, -1)
    assert_close(score, -torch.outer((p.z - y)[0], reference.augment(p.x)[0]) / 0.7**2)


@given(p=problems())
def test_log_likelihood_of_independent_units_has_a_block_diagonal_hessian(p: Problem) -> None:
    """(71) to (74): also before the expectation is taken."""
    response, (out, inputs) = responses.ELUGaussian(), p.weight.shape
    observed = observed_fisher(lambda theta: affine(p, theta), p.theta, p.z.cos(), response).to_dense()
    blocks = observed.reshape(out, inputs + 1, out, inputs + 1)
    assert_close(observed, torch.block_diag(*(blocks[unit, :, unit] for unit in range(out))))


@given(p=problems())
def test_softmax_score_and_hessian(p: Problem) -> None:
    """(76), (77), and (78), which is the same for every class."""
    response, out = responses.Categorical(), p.weight.shape[0]
    eta, augmented = torch.softmax(p.z, -1)[0], reference.augment(p.x)[0]
    information = layer_metric(p.x[:1], p.weight, p.bias, response).to_dense()

    def one(theta: Tensor, y: Tensor) -> Tensor:
        return response.log_prob(affine(p, theta)[:1], y.reshape(1))[0]

    classes = torch.arange(out)
    scores = vmap(grad(one), (None, 0))(p.theta, classes)
    expected = torch.einsum("ij,a->ija", torch.eye(out, dtype=torch.float64) - eta, augmented)
    assert_close(scores, expected.reshape(out, -1))
    for y in classes:
        assert_close(hessian(one)(p.theta, y), -information)
