"""What the paper says of the metrics, as properties: sections 2, 4 and 6."""

import math

import pytest
import reference
import torch
from builders import mlp
from cases import RESPONSES, Problem, assert_close, problem, problems
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import grad, hessian

from relfisher import (
    fisher,
    layer_metric,
    module_metric,
    neuron_metric,
    relative_fisher,
    responses,
    softmax_metric,
    two_layer_metric,
)
from relfisher.metric import TransformedMetric

SIGMOID = responses.SigmoidBernoulli()


def two_layers(p: Problem, response: responses.Response) -> Tensor:
    activation = responses.TanhBernoulli()
    return two_layer_metric(p.x, p.weight, p.bias, activation, p.next_weight, p.next_bias, response).to_dense()


@given(p=problems(), shift=st.floats(-5, 5))
def test_softmax_annihilates_an_equal_shift_of_all_classes(p: Problem, shift: float) -> None:
    metric = softmax_metric(p.x, p.weight, p.bias)
    equal = shift * torch.ones_like(p.weight[0, 0]) * torch.linspace(-1, 1, p.weight.shape[1] + 1).double()
    moved = metric @ equal.expand(metric.parameter_shape)
    assert_close(moved, torch.zeros_like(moved))


@pytest.mark.parametrize("name", RESPONSES)
@given(p=problems())
def test_metrics_are_symmetric_and_positive_semi_definite(name: str, p: Problem) -> None:
    response = RESPONSES[name][0]
    for dense in (layer_metric(p.x, p.weight, p.bias, response).to_dense(), two_layers(p, response)):
        assert_close(dense, dense.T)
        assert torch.linalg.eigvalsh(dense)[0] >= -1e-12 * dense.abs().max()


@given(p=problems(), part=st.integers(1, 6))
def test_proposition_2_a_subset_of_the_parameters_has_the_sub_block(p: Problem, part: int) -> None:
    """With the rest of the parameters as reference, the metric is the restriction of the larger one."""
    size = p.theta.numel()
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(part))[: min(part, size)]
    whole = reference.two_layers(p.weight.shape[0], torch.tanh, p.next_weight, p.next_bias)

    def subsystem(some: Tensor) -> Tensor:
        theta = p.theta.index_put((chosen,), some)
        return torch.stack([whole(theta, x) for x in p.x])

    expected = two_layers(p, SIGMOID)[chosen][:, chosen]
    assert_close(relative_fisher(subsystem, p.theta[chosen], SIGMOID).to_dense(), expected)


def well_conditioned(p: Problem) -> tuple[Tensor, Tensor]:
    """Return parameters and inputs of a neuron whose metric is regular."""
    inputs = p.x.shape[1]
    generator = torch.Generator().manual_seed(0)
    return p.theta[: inputs + 1], torch.randn(4 * inputs + 8, inputs, generator=generator, dtype=torch.float64)


def logistic_loss(x: Tensor, theta: Tensor) -> Tensor:
    """Return (29) with targets that are the signs of the first input."""
    margin = reference.augment(x) @ theta
    return torch.nn.functional.softplus(torch.where(x[:, 0] > 0, -margin, margin)).mean()


@given(p=problems(), seed=st.integers(0, 1000))
def test_equation_8_holds_under_linear_reparametrisation(p: Problem, seed: int) -> None:
    theta, x = well_conditioned(p)
    generator = torch.Generator().manual_seed(seed)
    jacobian = torch.linalg.qr(torch.randn(len(theta), len(theta), generator=generator, dtype=torch.float64))[0]
    jacobian = jacobian * torch.linspace(0.5, 3, len(theta), dtype=torch.float64)
    metric = neuron_metric(x, theta[:-1], theta[-1], SIGMOID)
    gradient = grad(lambda point: logistic_loss(x, point))(theta)
    there = TransformedMetric(metric, jacobian)
    assert_close(there.to_dense(), jacobian.T @ metric.to_dense() @ jacobian)
    direction = there.natural_gradient(jacobian.T @ gradient)
    assert_close(jacobian @ direction, metric.natural_gradient(gradient), 1e-7)


@given(p=problems())
def test_equation_8_holds_under_non_linear_reparametrisation(p: Problem) -> None:
    """The same direction from the metric and the gradient that autodiff finds in the coordinates phi."""
    theta, x = well_conditioned(p)
    forward = lambda phi: torch.sinh(phi) + 0.3 * phi.sum()  # noqa: E731
    phi = p.theta[: len(theta)] / 2
    theta = forward(phi)
    jacobian = reference.jacobian(forward, phi)
    loss = lambda point: logistic_loss(x, point)  # noqa: E731
    metric = neuron_metric(x, theta[:-1], theta[-1], SIGMOID)
    there = relative_fisher(lambda at: reference.augment(x) @ forward(at), phi, SIGMOID)
    assert_close(there.to_dense(), TransformedMetric(metric, jacobian).to_dense())
    direction = there.natural_gradient(grad(lambda at: loss(forward(at)))(phi))
    assert_close(jacobian @ direction, metric.natural_gradient(grad(loss)(theta)), 1e-6)


@given(p=problems(), length=st.floats(0.1, 3))
def test_equations_6_and_10_length_is_the_expected_square_of_the_directional_score(p: Problem, length: float) -> None:
    response, density = RESPONSES["softmax"]
    step = length * torch.cos(torch.arange(p.theta.numel(), dtype=torch.float64))
    pre_activation = reference.layer(p.weight.shape[0])
    squared = torch.zeros((), dtype=torch.float64)
    for x in p.x:
        for y, weight in zip(*density.support(pre_activation(p.theta, x)), strict=True):
            score = grad(lambda theta, x=x, y=y: density.log(pre_activation(theta, x), y))(p.theta)
            squared += weight * (score @ step).square() / len(p.x)
    metric = layer_metric(p.x, p.weight, p.bias, response)
    assert_close(metric.inner(step, step), squared)
    assert_close(metric.norm(step), squared.sqrt(), 1e-7)


@given(p=problems())
def test_length_of_a_small_step_is_the_divergence_that_it_makes(p: Problem) -> None:
    """The squared length is twice the Kullback-Leibler divergence, to third order in the step."""
    metric = softmax_metric(p.x, p.weight, p.bias)
    step = 1e-4 * torch.cos(torch.arange(p.theta.numel(), dtype=torch.float64))
    pre_activation = reference.layer(p.weight.shape[0])
    before, after = (
        torch.stack([torch.log_softmax(pre_activation(theta, x), -1) for x in p.x])
        for theta in (p.theta, p.theta + step)
    )
    divergence = (before.exp() * (before - after)).sum(-1).mean()
    assert float(2 * divergence) == pytest.approx(float(metric.inner(step, step)), rel=1e-2, abs=1e-13)


@given(p=problems(), damping=st.floats(0.1, 2))
def test_equation_7_the_step_minimises_the_penalised_linear_model(p: Problem, damping: float) -> None:
    metric = softmax_metric(p.x, p.weight, p.bias)
    gradient = torch.sin(torch.arange(p.theta.numel(), dtype=torch.float64))
    rate = 0.3
    step = -rate * metric.natural_gradient(gradient, damping)
    penalised = lambda move: (  # noqa: E731
        gradient @ move + (metric.to_dense() @ move @ move + damping * move @ move) / (2 * rate)
    )
    slope = grad(penalised)(step)
    assert_close(slope, torch.zeros_like(slope), 1e-7)


@pytest.mark.parametrize("response", [responses.Categorical(), SIGMOID, responses.LinearGaussian(2.0)], ids=str)
@given(seed=st.integers(0, 1000))
def test_relative_metric_of_the_last_layer_is_its_block_of_the_global_metric(response, seed: int) -> None:
    model, x = mlp(nn.ReLU, (3, 4, 2), seed=seed), problem(n=5, seed=seed).x
    relative = module_metric(model, "2", x, response)
    block = fisher(model, x, response, ["2.weight", "2.bias"]).to_dense()
    # torch stacks the weights and then the biases; a layer's metric is neuron-major, the bias last.
    order = torch.cat([torch.arange(8).reshape(2, 4), torch.arange(8, 10).reshape(2, 1)], dim=1).reshape(-1)
    assert_close(relative.to_dense(), block[order][:, order])


@given(seed=st.integers(0, 1000))
def test_relative_metric_of_a_hidden_layer_is_not_its_block_of_the_global_metric(seed: int) -> None:
    model, x = mlp(nn.ReLU, (3, 4, 2), seed=seed), problem(n=5, seed=seed).x
    block = fisher(model, x, responses.Categorical(), ["0.weight", "0.bias"])
    relative = module_metric(model, "0", x)
    assert abs(float(relative.trace() - block.trace())) > 0.05 * float(relative.trace())


@given(p=problems(max_out=1), sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_equation_27_rank_of_the_metric_of_one_bernoulli_output_is_at_most_n(
    p: Problem, sizes: list[int], seed: int
) -> None:
    """Each sample adds one outer product: (mu (1 - mu))^-1 dmu dmu'."""
    n, inputs = p.x.shape
    model = mlp(nn.ReLU, (inputs, *sizes, 1), seed=seed)
    metric = fisher(model, p.x, SIGMOID)
    assert metric.rank() <= n
    names = dict(model.named_parameters())
    expected = torch.zeros(metric.shape, dtype=torch.float64)
    for x in p.x:
        mean = torch.sigmoid(model(x)).squeeze()
        slope = torch.cat([part.reshape(-1) for part in torch.autograd.grad(mean, list(names.values()))])
        expected += torch.outer(slope, slope) / (mean * (1 - mean)).detach() / n
    assert_close(metric.to_dense(), expected)


@given(p=problems(max_n=3, max_inputs=4, max_out=3))
def test_rank_of_a_layer_is_at_most_n_times_its_units_and_reaches_it(p: Problem) -> None:
    n, inputs = p.x.shape
    metric = layer_metric(p.x, p.weight, p.bias, responses.TanhBernoulli())
    assert metric.rank(1e-10) <= n * p.weight.shape[0]
    generic = torch.randn(n, inputs, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reached = layer_metric(generic, 0.1 * p.weight, p.bias, responses.TanhBernoulli()).rank(1e-10)
    assert reached == min(n, inputs + 1) * p.weight.shape[0]


@given(z=st.floats(0.05, 3), sign=st.sampled_from([-1.0, 1.0]), iota=st.floats(0, 0.9))
def test_smoothed_relu_tends_to_the_hard_one(z: float, sign: float, iota: float) -> None:
    point = torch.tensor([sign * z], dtype=torch.float64)
    hard = responses.ReLUGaussian(iota)
    errors = []
    for omega in (1.0, 0.1, 1e-3):
        smooth = responses.SmoothReLUGaussian(omega, iota)
        errors.append(float((smooth.information(point) - hard.information(point)).abs()))
        assert float((smooth.activation(point) - hard.activation(point)).abs()) <= omega * math.log(2)
    assert errors[0] >= errors[1] >= errors[2]
    assert errors[2] < 1e-6 + 2 * math.exp(-(1 - iota) * z / 1e-3)


FAMILIES = {
    "bernoulli": (lambda theta: torch.log(1 + torch.exp(theta)).sum(), 1, [1.0], responses.SigmoidBernoulli()),
    "categorical": (lambda theta: torch.log(1 + torch.exp(theta).sum()), 3, [0.2, 0.5, 0.1], None),
    "gaussian mean": (lambda theta: 0.5 * theta.square().sum() * 4, 2, [1.0, -3.0], responses.LinearGaussian(0.5)),
}


@pytest.mark.parametrize(("potential", "size", "statistics", "response"), FAMILIES.values(), ids=FAMILIES)
@given(seed=st.integers(0, 1000), rate=st.floats(0.01, 0.3))
def test_mirror_descent_is_natural_gradient_in_dual_coordinates(
    potential, size: int, statistics: list[float], response, seed: int, rate: float
) -> None:
    """Section 6: one mirror step in Theta, with the Bregman divergence of F, is one natural step in H = grad F.

    The metric of the dual coordinates is the inverse Hessian of F, J' G J with J = dTheta / dH, and the mirror step is
    the point where the gradient of its own objective vanishes.
    """
    theta = torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    loss = lambda point: (point - point.new_tensor(statistics)).square().sum() / 10  # noqa: E731
    mirror = grad(potential)
    information = hessian(potential)(theta)
    metric = exponential_family(theta, potential, response)
    assert_close(metric.to_dense(), information)
    dual = TransformedMetric(metric, torch.linalg.inv(information))
    gradient_in_dual = torch.linalg.solve(information, grad(loss)(theta))
    new_dual = mirror(theta) - rate * dual.natural_gradient(gradient_in_dual)
    moved = mirror_step(potential, grad(loss)(theta), theta, rate)
    assert_close(mirror(moved), new_dual, 1e-7)


def exponential_family(theta: Tensor, potential, response):
    """Return the metric of natural parameters: of the response that the library has, or of the enumerated family."""
    if isinstance(response, responses.LinearGaussian):
        return relative_fisher(lambda point: (point / 1.0).unsqueeze(0), theta, response)
    if response is not None:
        return relative_fisher(lambda point: point.unsqueeze(0), theta, response)
    outcomes = [*torch.eye(theta.numel(), dtype=torch.float64), torch.zeros_like(theta)]
    return relative_fisher(lambda point, t: point @ t - potential(point), theta, outcomes=outcomes)


def mirror_step(potential, gradient: Tensor, theta: Tensor, rate: float) -> Tensor:
    """Minimise <theta', gradient> + B_F(theta', theta) / rate over theta' by Newton's method."""
    bregman = lambda point: potential(point) - potential(theta) - (point - theta) @ grad(potential)(theta)  # noqa: E731
    objective = lambda point: point @ gradient + bregman(point) / rate  # noqa: E731
    point = theta.clone()
    for _ in range(60):
        step = torch.linalg.solve(hessian(objective)(point), grad(objective)(point))
        point = point - step / max(1.0, 2 * float(step.norm()))
        if step.norm() < 1e-10:
            break
    assert grad(objective)(point).norm() < 1e-7
    return point
