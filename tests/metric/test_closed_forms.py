"""The closed forms of section 3 against the expectations that define them, computed without the library."""

import math

import pytest
import reference
import torch
from cases import GAUSSIAN, RESPONSES, UNITS, Problem, assert_close, problem, problems
from hypothesis import given
from torch import Tensor

from relfisher import layer_metric, neuron_metric, responses, softmax_metric, two_layer_metric


def agrees(found: Tensor, both: tuple[Tensor, Tensor]) -> None:
    outer, curvature = both
    assert_close(found, outer)
    assert_close(found, curvature, 1e-7)


@pytest.mark.parametrize(("response", "density"), UNITS.values(), ids=UNITS)
@given(given_problem=problems())
def test_neuron_is_both_expectations(response, density: reference.Density, given_problem: Problem) -> None:
    weight, bias, x = given_problem.weight[0], given_problem.bias[0], given_problem.x
    theta = torch.cat([weight, bias.reshape(1)])
    metric = neuron_metric(x, weight, bias, response)
    agrees(metric.to_dense(), reference.expectations(reference.layer(1), density, theta, x))
    assert_close(metric.to_dense(), neuron_metric(x, weight, float(bias), response).to_dense())


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("response", "density"), RESPONSES.values(), ids=RESPONSES)
@given(given_problem=problems(max_n=5))
def test_layer_is_both_expectations(response, density, with_bias: bool, given_problem: Problem) -> None:
    weight, x = given_problem.weight, given_problem.x
    theta = given_problem.theta if with_bias else weight.reshape(-1)
    metric = layer_metric(x, weight, given_problem.bias if with_bias else None, response)
    expected = reference.expectations(reference.layer(weight.shape[0], with_bias), density, theta, x)
    assert metric.parameter_shape == (weight.shape[0], weight.shape[1] + with_bias)
    agrees(metric.to_dense(), expected)


@given(given_problem=problems())
def test_softmax_is_both_expectations(given_problem: Problem) -> None:
    density = RESPONSES["softmax"][1]
    metric = softmax_metric(given_problem.x, given_problem.weight, given_problem.bias)
    layer = reference.layer(given_problem.weight.shape[0])
    agrees(metric.to_dense(), reference.expectations(layer, density, given_problem.theta, given_problem.x))


def test_softmax_has_the_blocks_of_equation_25() -> None:
    given_problem = problem(n=1, out=3)
    x, eta = reference.augment(given_problem.x)[0], torch.softmax(given_problem.z, -1)[0]
    dense = softmax_metric(given_problem.x, given_problem.weight, given_problem.bias).to_dense()
    blocks = dense.reshape(3, 4, 3, 4).transpose(1, 2)
    for i in range(3):
        for j in range(3):
            factor = eta[i] - eta[i] ** 2 if i == j else -eta[i] * eta[j]
            assert_close(blocks[i, j], factor * torch.outer(x, x))


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 17), (torch.float32, 14), (torch.float64, 40)])
def test_softmax_of_a_nearly_certain_class(dtype: torch.dtype, gap: int) -> None:
    metric = softmax_metric(torch.ones(20, 1, dtype=dtype), torch.tensor([[gap], [0], [-1]]).to(dtype), None)
    powers = [math.exp(-gap), math.exp(-gap - 1)]
    one, other = (power / (1 + sum(powers)) for power in powers)
    exact = [(one + other) * (1 - one - other), one * (1 - one), other * (1 - other)]
    for unit, length in zip(torch.eye(3, dtype=dtype), exact, strict=True):
        assert float(metric.inner(unit, unit)) == pytest.approx(length, rel=1e-5)
        assert float(metric.norm(unit)) == pytest.approx(length**0.5, rel=1e-5)
    assert float(metric.trace()) == pytest.approx(sum(exact), rel=1e-5)
    assert float(metric.to_dense().trace()) == pytest.approx(sum(exact), rel=1e-5)
    assert metric.rank() == 2


def test_linear_layer_shares_one_block() -> None:
    given_problem = problem(n=6, out=3)
    metric = layer_metric(given_problem.x, given_problem.weight, given_problem.bias, responses.LinearGaussian(0.5))
    augmented = reference.augment(given_problem.x)
    assert metric.blocks().shape == (3, 4, 4)
    assert metric.blocks().stride()[0] == 0
    for block in metric.blocks():
        assert_close(block, augmented.T @ augmented / (6 * 0.5**2))


def test_layer_of_independent_units_is_the_direct_sum_of_its_neurons() -> None:
    given_problem = problem(n=6, out=3)
    response = responses.TanhBernoulli()
    layer = layer_metric(given_problem.x, given_problem.weight, given_problem.bias, response)
    for block, weight, bias in zip(layer.blocks(), given_problem.weight, given_problem.bias, strict=True):
        assert_close(block, neuron_metric(given_problem.x, weight, bias, response).to_dense())
    assert_close(layer.to_dense(), torch.block_diag(*layer.blocks()))


OUTPUTS = {name: RESPONSES[name] for name in ("sigmoid", "tanh", "linear", "prelu", "softmax")}


@pytest.mark.parametrize(("activation", "hidden"), UNITS.values(), ids=UNITS)
@pytest.mark.parametrize(("response", "density"), OUTPUTS.values(), ids=[f"{name} output" for name in OUTPUTS])
def test_two_layers_are_both_expectations(activation, hidden, response, density) -> None:
    given_problem = problem(n=4, inputs=2, out=3, seed=3, scale=0.8)
    weight, bias = given_problem.next_weight, given_problem.next_bias
    metric = two_layer_metric(
        given_problem.x, given_problem.weight, given_problem.bias, activation, weight, bias, response
    )
    outer, curvature = reference.expectations(
        reference.two_layers(3, hidden.mean, weight, bias), density, given_problem.theta, given_problem.x
    )
    agrees(metric.to_dense(), (outer, curvature))


@given(given_problem=problems())
def test_two_layers_of_all_shapes(given_problem: Problem) -> None:
    weight, bias = given_problem.next_weight, given_problem.next_bias
    metric = two_layer_metric(
        given_problem.x, given_problem.weight, given_problem.bias, responses.TanhBernoulli(), weight, bias,
        responses.SigmoidBernoulli(),
    )  # fmt: skip
    pre_activation = reference.two_layers(given_problem.weight.shape[0], torch.tanh, weight, bias)
    expected = reference.expectations(pre_activation, RESPONSES["sigmoid"][1], given_problem.theta, given_problem.x)
    agrees(metric.to_dense(), expected)


def test_two_layers_without_biases() -> None:
    given_problem = problem(n=4, out=3)
    zeros = torch.zeros_like(given_problem.next_bias)
    activation, output = responses.TanhBernoulli(), responses.Categorical()
    metric = two_layer_metric(
        given_problem.x, given_problem.weight, None, activation, given_problem.next_weight, None, output
    )
    first = reference.layer(3, bias=False)
    expected = reference.expectations(
        lambda theta, x: given_problem.next_weight @ torch.tanh(first(theta, x)) + zeros,
        RESPONSES["softmax"][1],
        given_problem.weight.reshape(-1),
        given_problem.x,
    )
    agrees(metric.to_dense(), expected)


PRINTED = {"tanh": True, "sigmoid": True, "relu": True, "prelu": False, "elu": False, "smooth relu": False}


@pytest.mark.parametrize(("name", "holds"), PRINTED.items(), ids=PRINTED)
def test_where_the_printed_two_layer_formula_holds(name: str, holds: bool) -> None:
    """(26) has nu_f as the hidden factor where the derivation gives f'."""
    activation, hidden = UNITS[name]
    given_problem = problem(n=6, out=3, seed=1)
    weight, bias = given_problem.next_weight, given_problem.next_bias
    nu = torch.stack([reference.information(hidden, row)[0].diagonal() for row in given_problem.z])
    mean = reference.logistic(hidden.mean(given_problem.z) @ weight.T + bias)
    printed = reference.printed_two_layers(given_problem.x, nu, mean * (1 - mean), weight)
    true, _ = reference.expectations(
        reference.two_layers(3, hidden.mean, weight, bias),
        RESPONSES["sigmoid"][1],
        given_problem.theta,
        given_problem.x,
    )
    metric = two_layer_metric(
        given_problem.x, given_problem.weight, given_problem.bias, activation, weight, bias,
        responses.SigmoidBernoulli(),
    )  # fmt: skip
    assert_close(metric.to_dense(), true)
    error = float((printed - true).abs().max() / true.abs().max())
    assert (error < 1e-9) if holds else (error > 0.05)


@given(given_problem=problems())
def test_a_metric_does_not_depend_on_the_noise_of_a_deterministic_hidden_layer(given_problem: Problem) -> None:
    found = [
        two_layer_metric(
            given_problem.x, given_problem.weight, given_problem.bias, responses.ELUGaussian(sigma=sigma),
            given_problem.next_weight, given_problem.next_bias, responses.Categorical(),
        ).to_dense()
        for sigma in (0.5, 3.0)
    ]  # fmt: skip
    assert torch.equal(*found)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_metrics_keep_single_precision(name: str) -> None:
    given_problem = problem(n=8, out=3)
    arguments = (given_problem.x, given_problem.weight, given_problem.bias)
    response = GAUSSIAN[name][0]
    single = layer_metric(*(tensor.float() for tensor in arguments), response).to_dense()
    assert single.dtype == torch.float32
    assert_close(single.double(), layer_metric(*arguments, response).to_dense(), 1e-5)


def test_metrics_do_not_track_gradients() -> None:
    given_problem = problem()
    weight = given_problem.weight.clone().requires_grad_()
    next_weight = given_problem.next_weight.clone().requires_grad_()
    one = layer_metric(given_problem.x.clone().requires_grad_(), weight, given_problem.bias, responses.TanhBernoulli())
    two = two_layer_metric(
        given_problem.x, weight, given_problem.bias, responses.TanhBernoulli(), next_weight, given_problem.next_bias,
        responses.SigmoidBernoulli(),
    )  # fmt: skip
    assert not one.to_dense().requires_grad
    assert not two.to_dense().requires_grad
