"""Definition 1 by automatic differentiation: all of its modes, the global metric, the observed one, sampling."""

import math
from functools import partial

import pytest
import reference
import torch
from builders import Following, mlp
from cases import RESPONSES, UNITS, Problem, assert_close, problem, problems
from hypothesis import given
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Exponential,
    Independent,
    NegativeBinomial,
    Normal,
    OneHotCategorical,
)

from relfisher import as_function, fisher, layer_metric, observed_fisher, relative_fisher, responses

SIGMOID = responses.SigmoidBernoulli()


def affine(p: Problem, theta: Tensor) -> Tensor:
    """Return the pre-activations [n, out] of stacked parameters."""
    return reference.augment(p.x) @ theta.reshape(p.weight.shape[0], -1).T


def curve(p: Problem, theta: Tensor) -> Tensor:
    """Return pre-activations that are not linear in the parameters."""
    return torch.tanh(affine(p, theta)) @ p.next_weight.T + theta[0] * theta[-1]


@pytest.mark.parametrize(("response", "density"), RESPONSES.values(), ids=RESPONSES)
@given(p=problems(max_out=2))
def test_response_mode_is_the_expected_outer_product(response, density: reference.Density, p: Problem) -> None:
    metric = relative_fisher(partial(curve, p), p.theta, response)
    one = lambda theta, x: curve(Problem(x[None], *vars_of(p)), theta)[0]  # noqa: E731
    outer, curvature = reference.expectations(one, density, p.theta, p.x)
    assert_close(metric.to_dense(), outer)
    assert_close(metric @ torch.eye(metric.shape[0], dtype=torch.float64), outer)
    assert_close(outer, curvature, 1e-7)


def vars_of(p: Problem) -> tuple[Tensor, ...]:
    return p.weight, p.bias, p.next_weight, p.next_bias


MODES = {
    "distribution": lambda p: relative_fisher(lambda theta: Bernoulli(logits=curve(p, theta)), p.theta),
    "outcomes": lambda p: relative_fisher(
        lambda theta, y: Bernoulli(logits=curve(p, theta)).log_prob(y), p.theta,
        outcomes=[torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)],
    ),
    "parameters by name": lambda p: relative_fisher(
        lambda parts: curve(p, torch.cat([parts["head"], parts["tail"]])),
        {"head": p.theta[:1], "tail": p.theta[1:]}, SIGMOID,
    ),
    "shaped parameters": lambda p: relative_fisher(
        lambda theta: curve(p, theta.reshape(-1)), p.theta.reshape(p.weight.shape[0], -1), SIGMOID
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
@given(p=problems())
def test_modes_agree(mode: str, p: Problem) -> None:
    expected = relative_fisher(partial(curve, p), p.theta, SIGMOID)
    found = MODES[mode](p)
    assert found.samples == p.x.shape[0]
    assert_close(found.to_dense(), expected.to_dense())


@pytest.mark.parametrize("distribution", [Categorical, OneHotCategorical])
@given(p=problems())
def test_distributions_over_classes(distribution: type, p: Problem) -> None:
    found = relative_fisher(lambda theta: distribution(logits=affine(p, theta)), p.theta)
    assert_close(found.to_dense(), layer_metric(p.x, p.weight, p.bias, responses.Categorical()).to_dense())


@given(p=problems())
def test_normal_with_a_scale_that_depends_on_the_parameters(p: Problem) -> None:
    """Both expectations by quadrature: the information about the scale is 2 / sigma^2."""
    theta = torch.cat([p.theta, p.theta.new_tensor([0.3])])

    def distribution(flat: Tensor) -> Normal:
        return Normal(affine(p, flat[:-1]), torch.exp(flat[-1]))

    points, masses = reference.np.polynomial.hermite.hermgauss(8)
    nodes = torch.tensor(points * math.sqrt(2) * math.exp(0.3))
    at = distribution(theta)
    outer = torch.zeros(len(theta), len(theta), dtype=torch.float64)
    for node, mass in zip(nodes, masses / math.sqrt(math.pi), strict=True):
        y = at.loc + node
        scores = reference.jacobian(lambda flat, y=y: distribution(flat).log_prob(y), theta).reshape(-1, len(theta))
        outer += mass * scores.T @ scores / len(p.x)
    assert_close(relative_fisher(distribution, theta).to_dense(), outer)


def test_a_scalar_parameter_of_one_scalar_response() -> None:
    metric = relative_fisher(lambda rate: Normal(rate.square(), 2.0), torch.tensor(3.0))
    assert metric.shape == (1, 1)
    assert float(metric.to_dense()) == pytest.approx((2 * 3 / 2) ** 2)


class Unknown(Exponential):
    """A subclass may have any density: it has no closed form."""


SAMPLED = {
    "Exponential(rate)": (lambda theta: Unknown(theta), [2.0], [[0.25]]),
    "Exponential(exp)": (lambda theta: Unknown(torch.exp(theta).expand(3, 1)), [0.4], [[1.0]]),
    "joined": (lambda theta: Independent(Unknown(theta.expand(4, 2)), 1), [0.1, 0.2], [[100.0, 0.0], [0.0, 25.0]]),
    "NegativeBinomial": (lambda theta: NegativeBinomial(3.0, logits=theta), [0.0], [[1.5]]),
}


@pytest.mark.parametrize(("distribution", "theta", "exact"), SAMPLED.values(), ids=SAMPLED)
def test_sampled_metrics_lie_within_their_standard_errors(distribution, theta, exact) -> None:
    metric = relative_fisher(distribution, torch.tensor(theta), draws=600, seed=1)
    assert (metric.standard_error > 0).all()
    assert ((metric.to_dense() - torch.tensor(exact)).abs() <= 4 * metric.standard_error).all()


def test_the_standard_error_is_that_of_repeated_estimates() -> None:
    distribution = lambda theta: Unknown(torch.exp(theta).expand(2))  # noqa: E731
    runs = [relative_fisher(distribution, torch.zeros(1), draws=40, seed=seed) for seed in range(60)]
    spread = float(torch.stack([run.to_dense() for run in runs]).std())
    stated = float(torch.stack([run.standard_error for run in runs]).square().mean().sqrt())
    assert stated == pytest.approx(spread, rel=0.35)


def test_more_draws_make_a_smaller_standard_error() -> None:
    distribution = lambda theta: Independent(type("Own", (Normal,), {})(theta, 1.0), 1)  # noqa: E731
    metrics = [relative_fisher(distribution, torch.zeros(2), draws=draws) for draws in (40, 640)]
    ratio = metrics[0].standard_error / metrics[1].standard_error
    torch.testing.assert_close(ratio, torch.full((2, 2), 4.0), rtol=0.5, atol=0)


def test_a_sampler_of_ones_own() -> None:
    p = problem(n=3, out=1)
    log_prob = lambda theta, y: responses.LinearGaussian(0.5).log_prob(affine(p, theta), y)  # noqa: E731
    sampler = lambda theta: affine(p, theta) + 0.5 * torch.randn(3, 1, dtype=torch.float64)  # noqa: E731
    metric = relative_fisher(log_prob, p.theta, sampler=sampler, draws=600)
    exact = layer_metric(p.x, p.weight, p.bias, responses.LinearGaussian(0.5)).to_dense()
    assert metric.samples == 3
    assert ((metric.to_dense() - exact).abs() <= 4 * metric.standard_error).all()


def test_draws_follow_the_seed_and_spare_the_global_state() -> None:
    make = partial(relative_fisher, Unknown, torch.tensor([2.0, 3.0]), draws=10)
    before = torch.get_rng_state()
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.to_dense(), again.to_dense())
    assert not torch.equal(first.to_dense(), other.to_dense())


@pytest.mark.parametrize("name", ["sigmoid", "softmax", "linear"])
def test_fisher_of_a_network_is_both_expectations(name: str) -> None:
    response, density = RESPONSES[name]
    model, x = mlp(sizes=(2, 3, 2)), problem(n=4, inputs=2).x
    function, parameters = as_function(model, x)
    theta = torch.cat([value.reshape(-1) for value in parameters.values()])

    def pre_activation(flat: Tensor, sample: Tensor) -> Tensor:
        first, second = flat[:9], flat[9:]
        hidden = torch.tanh(first[:6].reshape(3, 2) @ sample + first[6:])
        return second[:6].reshape(2, 3) @ hidden + second[6:]

    outer, curvature = reference.expectations(pre_activation, density, theta, x)
    metric = fisher(model, x, response)
    assert_close(metric.to_dense(), outer)
    assert_close(metric.to_dense(), curvature, 1e-7)
    assert_close(function(parameters), model(x).detach())


def test_fisher_of_some_parameters_is_a_block_of_the_whole() -> None:
    model, x = mlp(sizes=(2, 3, 2)), problem(n=4, inputs=2).x
    block = fisher(model, x, responses.Categorical(), ["0.bias", "2.weight"]).to_dense()
    assert_close(block, fisher(model, x, responses.Categorical()).to_dense()[6:15, 6:15])


def test_fisher_leaves_the_model_as_it_was_and_knows_no_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double().train()
    model[3].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    metric = fisher(model, problem().x, responses.Categorical())
    dense = metric.to_dense()
    assert_close(metric @ torch.eye(metric.shape[0], dtype=torch.float64), dense)
    assert metric.shape[0] == 12 + 4 + 4 + 4 + 8
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_positions_are_samples() -> None:
    p = problem(n=6, out=3)
    stacked = lambda theta: affine(p, theta).reshape(2, 3, 3)  # noqa: E731
    y = torch.tensor([[0, 1, 2], [2, 1, 0]])
    expected = layer_metric(p.x, p.weight, p.bias, responses.Categorical()).to_dense()
    assert_close(relative_fisher(stacked, p.theta, responses.Categorical()).to_dense(), expected)
    observed = observed_fisher(stacked, p.theta, y, responses.Categorical())
    assert observed.samples == 6
    assert_close(observed.to_dense(), expected)


# The same response of [2 samples, 3 positions, 2 units or classes], as the library's and as torch's.
PAIRS = {
    "classes": (responses.Categorical(), lambda z: Categorical(logits=z)),
    "one-hot": (responses.Categorical(), lambda z: OneHotCategorical(logits=z)),
    "units": (responses.SigmoidBernoulli(), lambda z: Bernoulli(logits=z)),
    "joined units": (responses.SigmoidBernoulli(), lambda z: Independent(Bernoulli(logits=z), 1)),
    "normal": (responses.LinearGaussian(0.5), lambda z: Normal(z, 0.5)),
    "sampled": (responses.SigmoidBernoulli(), lambda z: type("Own", (Bernoulli,), {})(logits=z)),
}


@pytest.mark.parametrize(("response", "distribution"), PAIRS.values(), ids=PAIRS)
def test_responses_and_distributions_have_one_convention_of_positions(response, distribution) -> None:
    p = problem(n=6, out=2)
    z = lambda theta: affine(p, theta).reshape(2, 3, 2)  # noqa: E731
    expected = layer_metric(p.x, p.weight, p.bias, response).to_dense()
    for found, positions in (
        (relative_fisher(z, p.theta, response), 1),
        (relative_fisher(lambda theta: distribution(z(theta)), p.theta), 1),
        (relative_fisher(z, p.theta, response, samples=2), 3),
        (relative_fisher(lambda theta: distribution(z(theta)), p.theta, samples=2), 3),
    ):
        assert found.samples == 6 / positions
        assert_close(found.to_dense(), positions * expected)
        assert_close(found @ torch.eye(len(p.theta)).double(), positions * expected)


def test_independent_makes_positions_part_of_a_sample() -> None:
    p = problem(n=6, out=2)
    joined = lambda theta: Independent(Categorical(logits=affine(p, theta).reshape(2, 3, 2)), 1)  # noqa: E731
    found = relative_fisher(joined, p.theta)
    assert found.samples == 2
    assert_close(found.to_dense(), 3 * layer_metric(p.x, p.weight, p.bias, responses.Categorical()).to_dense())


@pytest.mark.parametrize("name", ["sigmoid", "linear", "softmax"])
def test_observed_metrics_and_log_probabilities_have_the_same_convention(name: str) -> None:
    p, response = problem(n=6, out=2), RESPONSES[name][0]
    z = lambda theta: affine(p, theta).reshape(2, 3, 2)  # noqa: E731
    y = torch.zeros(2, 3, dtype=torch.long) if name == "softmax" else torch.zeros(2, 3, 2).double()
    expected = layer_metric(p.x, p.weight, p.bias, response).to_dense()
    assert_close(observed_fisher(z, p.theta, y, response).to_dense(), expected)
    assert_close(observed_fisher(z, p.theta, y, response, samples=2).to_dense(), 3 * expected)
    log_prob = lambda theta, y: response.log_prob(z(theta), y)  # noqa: E731
    samples = 6 if name == "softmax" else None  # log-probabilities [2, 3] would be two samples of three units
    assert_close(observed_fisher(log_prob, p.theta, y, samples=samples).to_dense(), expected)
    values = response.outcomes(2)
    if values is not None:
        given_outcomes = [torch.tensor(value) + torch.zeros_like(y) for value in values]
        found = relative_fisher(log_prob, p.theta, outcomes=given_outcomes, samples=samples)
        assert_close(found.to_dense(), expected)


@pytest.mark.parametrize(
    ("outcomes", "sums"),
    [([0], "0.598688"), ([0, 1, 1], "1.4"), ([0, 1, 2], "1.59869")],
    ids=["missing", "twice", "new"],
)
def test_outcomes_must_be_complete(outcomes: list[int], sums: str) -> None:
    def log_prob(theta: Tensor, y: int) -> Tensor:
        return torch.nn.functional.logsigmoid(torch.where(torch.tensor(y == 1), theta, -theta))

    with pytest.raises(ValueError, match=f"outcomes must be all values of y.* must sum to 1, got sums from {sums}"):
        relative_fisher(log_prob, torch.tensor([-0.4]), outcomes=outcomes)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


TOKENS = torch.tensor([[0, 1, 2], [2, 2, 0]])
SEQUENCE = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WITHOUT_DERIVATIVES = {
    "attention": (Attending, SEQUENCE),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), SEQUENCE),
    "transformer": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 2), SEQUENCE),
    "bag": (lambda: nn.EmbeddingBag(3, 4, padding_idx=0), TOKENS),
    "bag of maxima": (lambda: nn.EmbeddingBag(3, 4, mode="max"), TOKENS),
    "padding": (lambda: nn.Embedding(3, 4, padding_idx=0), TOKENS),
    "recurrent": (lambda: Following(nn.LSTM(4, 4, batch_first=True), torch.tanh), SEQUENCE),
}  # fmt: skip


@pytest.mark.parametrize(("layer", "x"), WITHOUT_DERIVATIVES.values(), ids=WITHOUT_DERIVATIVES)
def test_products_and_matrices_are_one_metric_for_every_layer(layer, x: Tensor) -> None:
    """Against the Jacobian by reverse mode, an output at a time, and the information of a softmax."""
    model = nn.Sequential(layer(), nn.Linear(4, 3)).double().eval()
    metric = fisher(model, x, responses.Categorical())
    z = model(x).reshape(-1, 3)
    eta = torch.softmax(z, -1).detach()
    expected = torch.zeros(metric.shape, dtype=torch.float64)
    for row, p in zip(z, eta, strict=True):
        gradients = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in row]
        jacobian = torch.stack([torch.cat([part.reshape(-1) for part in gradient]) for gradient in gradients])
        expected += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(z)
    assert_close(metric.to_dense(), expected)
    assert_close(metric @ torch.eye(len(expected)).double(), expected)
    assert_close(metric @ torch.ones(len(expected)).double(), expected.sum(1))


def test_observed_metric_of_attention_is_the_expected_one_of_its_canonical_head() -> None:
    model = nn.Sequential(Attending(), nn.Linear(4, 3)).double()
    function, parameters = as_function(model, SEQUENCE, ["1.weight", "1.bias"])
    observed = observed_fisher(function, parameters, torch.zeros(2, 3), responses.Categorical())
    assert_close(observed.to_dense(), relative_fisher(function, parameters, responses.Categorical()).to_dense())


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
def test_gradients_that_are_no_derivatives_are_refused(option: dict) -> None:
    model = nn.Sequential(nn.Embedding(3, 2, **option), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no embedding with max_norm or scale_grad_by_freq, but '0' has it"):
        fisher(model, TOKENS, responses.Categorical())


@pytest.mark.parametrize("name", ["tanh", "sigmoid", "softmax", "linear"])
@given(p=problems())
def test_observed_is_expected_where_the_link_is_canonical(name: str, p: Problem) -> None:
    response = RESPONSES[name][0]
    y = response.sample(p.z, torch.Generator().manual_seed(0))
    found = observed_fisher(partial(affine, p), p.theta, y, response)
    assert found.samples == len(p.x)
    assert_close(found.to_dense(), layer_metric(p.x, p.weight, p.bias, response).to_dense())


@pytest.mark.parametrize("name", ["elu", "softplus", "gelu"])
def test_observed_tends_to_expected(name: str) -> None:
    response, _ = UNITS[name]
    """The error falls as the root of n: ten times over a hundred times as many observations."""
    theta, x = torch.tensor([-0.7, 0.3], dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    expected = layer_metric(x, theta[:1].reshape(1, 1), theta[1:], response).to_dense()

    def error(n: int, seed: int) -> float:
        z = lambda flat: (reference.augment(x) @ flat).expand(n).unsqueeze(1)  # noqa: E731
        y = response.sample(z(theta), torch.Generator().manual_seed(seed))
        return float((observed_fisher(z, theta, y, response).to_dense() - expected).abs().max())

    few, many = (math.fsum(error(n, seed) ** 2 for seed in range(12)) ** 0.5 for n in (50, 5000))
    assert 5 < few / many < 20


def test_observed_without_a_response() -> None:
    p = problem(n=4, out=2)
    y = torch.tensor([[0.0, 1.0]] * 4, dtype=torch.float64)
    log_prob = lambda theta, y: SIGMOID.log_prob(affine(p, theta), y)  # noqa: E731
    found = observed_fisher(log_prob, p.theta, y)
    assert_close(found.to_dense(), layer_metric(p.x, p.weight, p.bias, SIGMOID).to_dense())


def test_observed_metric_of_one_scalar_log_likelihood() -> None:
    found = observed_fisher(lambda theta, y: -((y - theta) ** 2).sum() / 8, torch.zeros(2), torch.zeros(2))
    assert found.samples == 1
    assert_close(found.to_dense(), torch.eye(2) / 4)


def test_a_metric_is_semi_definite_where_the_observed_one_is_not() -> None:
    p = problem(n=1, out=1)
    response = responses.ELUGaussian()
    theta = torch.tensor([0.0, 0.0, 0.0, -1.0], dtype=torch.float64)
    observed = observed_fisher(partial(affine, p), theta, torch.full((1, 1), 5.0, dtype=torch.float64), response)
    assert observed.eigvalsh()[0] < -0.1
    assert relative_fisher(partial(affine, p), theta, response).eigvalsh()[0] > -1e-12


@pytest.mark.parametrize("z", [20.0, -20.0])
@pytest.mark.parametrize("outcomes", [[0.0], [1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], ids=str)
def test_outcomes_that_leave_out_or_repeat_a_rare_one_are_refused(z: float, outcomes: list[float]) -> None:
    log_prob = lambda t, y: Bernoulli(logits=t).log_prob(torch.full_like(t, y))  # noqa: E731
    with pytest.raises(ValueError, match="outcomes must be all values of y, each once"):
        relative_fisher(log_prob, torch.tensor([z], dtype=torch.float64), outcomes=outcomes)


@pytest.mark.parametrize("z", [-90.0, -20.0, 0.0, 20.0, 90.0])
@pytest.mark.parametrize("kind", [torch.float64, torch.float32], ids=str)
def test_complete_outcomes_of_saturated_units_are_accepted(z: float, kind: torch.dtype) -> None:
    theta = torch.tensor([z], dtype=kind)
    for log_prob in (
        lambda t, y: Bernoulli(logits=t).log_prob(torch.full_like(t, y)),
        lambda t, y: nn.functional.logsigmoid(t if y else -t),
        lambda t, y: torch.log_softmax(torch.stack([t * 0, t]), 0)[int(y)],
    ):
        found = relative_fisher(log_prob, theta, outcomes=[0.0, 1.0]).to_dense()
        wanted = math.exp(-abs(z)) / (1 + math.exp(-abs(z))) ** 2
        assert float(found) == pytest.approx(wanted, rel=1e-4, abs=1e-38)


def test_probabilities_that_sum_to_one_at_one_point_only_are_refused() -> None:
    with pytest.raises(ValueError, match="their expected score must be 0"):
        relative_fisher(lambda t, y: y * t - math.log(2), torch.zeros(1).double(), outcomes=[0.0, 1.0])


@pytest.mark.parametrize(("z", "y"), [((5, 1), (5,)), ((5, 3), (5, 1, 1)), ((5, 3), (4, 3)), ((5,), (5, 1))], ids=str)
def test_there_is_one_observation_per_unit(z: tuple, y: tuple) -> None:
    with pytest.raises(ValueError, match=r"y must have shape \[5"):
        observed_fisher(lambda t: t.expand(z), torch.zeros(1), torch.zeros(y), SIGMOID)


def test_there_is_one_observation_per_sample_of_several_units() -> None:
    class Softmax(responses.Categorical):
        def log_prob(self, z, y):
            return torch.log_softmax(z, -1)[range(len(y)), y]

    with pytest.raises(ValueError, match=r"y must have shape \[5\], got \[2\]"):
        observed_fisher(lambda t: t.expand(5, 3), torch.zeros(1), torch.tensor([0, 1]), Softmax())


def test_a_vector_of_logits_has_no_samples() -> None:
    theta, softmax = torch.zeros(3), responses.Categorical()
    for call in (
        lambda: relative_fisher(lambda t: t, theta, softmax),
        lambda: observed_fisher(lambda t: t, theta, torch.tensor(1), softmax),
        lambda: fisher(nn.Linear(2, 3), torch.zeros(2), softmax),
    ):
        with pytest.raises(ValueError, match=r"pre-activation of Categorical must be \[n, out\], got \[3\]"):
            call()


def test_parameters_that_do_not_reach_the_output_have_no_metric() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.other(x)
            return self.main(x)

    metric = fisher(Heads(), torch.ones(4, 3), SIGMOID, ["other.weight"])
    assert torch.equal(metric @ torch.ones(6), torch.zeros(6))
    assert torch.equal(metric @ torch.ones(6, 2), torch.zeros(6, 2))
    assert torch.equal(metric.to_dense(), torch.zeros(6, 6))
