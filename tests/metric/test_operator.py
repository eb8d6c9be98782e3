"""Every operation of every kind of metric against the one dense matrix that it stands for."""

import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from cases import Problem, assert_close, problem, problems
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from relfisher import (
    BatchedMetric,
    Metric,
    layer_metric,
    observed_fisher,
    relative_fisher,
    responses,
    softmax_metric,
    two_layer_metric,
)
from relfisher.metric import (
    ConvergenceWarning,
    DenseMetric,
    IndefiniteMetricError,
    SingularMetricError,
    TransformedMetric,
)
from relfisher.metric.iterative import conjugate_residuals

TANH = responses.TanhBernoulli()


def random_jacobian(size: int) -> Tensor:
    return torch.randn(size, size + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def layer(p: Problem, response: responses.Response) -> Metric:
    return layer_metric(p.x, p.weight, p.bias, response)


def two_layers(p: Problem) -> Metric:
    return two_layer_metric(p.x, p.weight, p.bias, TANH, p.next_weight, p.next_bias, responses.Categorical())


def batched(p: Problem, response: responses.Response) -> Metric:
    pieces = p.x.split(2)
    return BatchedMetric(lambda x: layer_metric(x, p.weight, p.bias, response), pieces)


def transformed(p: Problem) -> Metric:
    metric = layer(p, TANH)
    return TransformedMetric(metric, random_jacobian(metric.shape[0]))


def pullback(p: Problem) -> Metric:
    def pre_activation(parameters: dict[str, Tensor]) -> Tensor:
        return torch.tanh(p.x @ parameters["weight"].T + parameters["bias"]) @ p.next_weight.T

    return relative_fisher(pre_activation, {"weight": p.weight, "bias": p.bias}, responses.Categorical())


KINDS = {
    "linear layer": lambda p: layer(p, responses.LinearGaussian(0.5)),
    "tanh layer": lambda p: layer(p, TANH),
    "softmax layer": lambda p: layer(p, responses.Categorical()),
    "layer without bias": lambda p: layer_metric(p.x, p.weight, None, TANH),
    "two layers": two_layers,
    "batched linear": lambda p: batched(p, responses.LinearGaussian(0.5)),
    "batched tanh": lambda p: batched(p, TANH),
    "batched softmax": lambda p: batched(p, responses.Categorical()),
    "transformed": transformed,
    "pullback": pullback,
    "dense": lambda p: DenseMetric(two_layers(p).to_dense(), (p.weight.shape[0], p.weight.shape[1] + 1), len(p.x)),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def spelled_out(metric: Metric) -> Tensor:
    """Return the matrix, a column a product."""
    return torch.stack([metric.matvec(column) for column in torch.eye(metric.shape[0], dtype=metric.dtype)], dim=1)


@every_kind
@given(p=problems())
def test_products_and_entries(kind: str, p: Problem) -> None:
    metric = KINDS[kind](p)
    dense = spelled_out(metric)
    size = metric.shape[0]
    right = torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert metric.samples == p.x.shape[0]
    assert_close(dense, dense.T)
    assert_close(metric.to_dense(), dense)
    assert_close(torch.block_diag(*metric.blocks()), dense)
    assert_close(metric.diagonal(), dense.diagonal())
    assert_close(metric.trace(), dense.trace())
    assert_close(metric.matmat(right), dense @ right)
    assert_close(metric @ right, dense @ right)
    assert_close(metric.inner(right[:, 0], right[:, 1]), right[:, 0] @ dense @ right[:, 1])
    assert_close(metric.norm(right[:, 0]).square(), right[:, 0] @ dense @ right[:, 0])


@every_kind
@given(p=problems(), damping=st.floats(1e-3, 10))
def test_spectra_and_solutions(kind: str, p: Problem, damping: float) -> None:
    metric = KINDS[kind](p)
    dense, size = spelled_out(metric), metric.shape[0]
    values = torch.linalg.eigvalsh(dense)
    # Eigenvalues near the threshold may be on either side of it, since it is relative to a unit diagonal.
    assume(not bool(((values > 1e-13 * values[-1]) & (values < 1e-5 * values[-1])).any()))
    damped = dense + damping * torch.eye(size, dtype=torch.float64)
    right = torch.randn(size, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_close(metric.eigvalsh(), values)
    assert_close(metric.eigvalsh(1), values[-1:])
    assert metric.rank(1e-8) == torch.linalg.matrix_rank(dense, hermitian=True, rtol=1e-8)
    assert_close(metric.logdet(damping), torch.logdet(damped))
    assert metric.condition_number(damping) == pytest.approx(float((values[-1] + damping) / (values[0] + damping)))
    assert_close(metric.solve(right, damping), torch.linalg.solve(damped, right))
    assert_close(metric.natural_gradient(right[:, 0], damping), torch.linalg.solve(damped, right[:, 0]))
    assert_close(metric.pinv_solve(right, 1e-8), torch.linalg.pinv(dense, hermitian=True, rtol=1e-8) @ right, 1e-6)


@every_kind
def test_vectors_come_back_in_their_own_shape(kind: str) -> None:
    metric = KINDS[kind](problem())
    size = metric.shape[0]
    flat = torch.linspace(-1, 1, size, dtype=torch.float64)
    shaped = flat.reshape(metric.parameter_shape)
    assert math.prod(metric.parameter_shape) == size
    for operation in (metric.matvec, metric.__matmul__, metric.pinv_solve, lambda v: metric.solve(v, 0.1)):
        assert operation(flat).shape == flat.shape
        assert operation(shaped).shape == shaped.shape
        assert torch.equal(operation(shaped).reshape(-1), operation(flat))
    assert metric.inner(shaped, flat) == metric.inner(flat, shaped)
    assert metric.solve(flat.unsqueeze(1).expand(size, 2), 0.1).shape == (size, 2)


@every_kind
def test_operator_of_scipy_has_the_same_products(kind: str) -> None:
    metric = KINDS[kind](problem())
    operator, dense = metric.to_scipy(), metric.to_dense().numpy()
    vectors = torch.randn(metric.shape[0], 2, dtype=torch.float64).numpy()
    assert operator.shape == metric.shape
    assert operator.dtype == "float64"
    for left, right in (
        (operator @ vectors, dense @ vectors),
        (operator @ vectors[:, 0], dense @ vectors[:, 0]),
        (operator.T @ vectors, dense @ vectors),
        (operator @ vectors[:, :1], dense @ vectors[:, :1]),
        (operator @ vectors[::-1], dense @ vectors[::-1]),
        (operator @ vectors[::-1, 0], dense @ vectors[::-1, 0]),
        (operator @ (vectors + 1j * vectors[::-1]), dense @ (vectors + 1j * vectors[::-1])),
        (operator @ (1j * vectors[:, 0]), dense @ (1j * vectors[:, 0])),
    ):
        assert left.shape == right.shape
        assert_close(torch.from_numpy(left), torch.from_numpy(right))


@pytest.mark.parametrize("kind", ["linear layer", "tanh layer", "softmax layer", "two layers", "batched tanh"])
def test_single_precision(kind: str) -> None:
    p = problem(n=20, out=3)
    single = Problem(*(getattr(p, name).float() for name in ("x", "weight", "bias", "next_weight", "next_bias")))
    metric, exact = KINDS[kind](single), KINDS[kind](p)
    vector = torch.linspace(-1, 1, metric.shape[0], dtype=torch.float64)
    assert metric.dtype == torch.float32
    for found, wanted in (
        (metric.to_dense(), exact.to_dense()),
        (metric @ vector.float(), exact @ vector),
        (metric.eigvalsh(), exact.eigvalsh()),
        (metric.solve(vector.float(), 0.1), exact.solve(vector, 0.1)),
        (metric.logdet(0.1), exact.logdet(0.1)),
    ):
        assert found.dtype == torch.float32
        assert_close(found.double(), wanted, 1e-4)
    assert metric.rank() == exact.rank()


def test_many_columns_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = two_layers(problem(n=6, out=3))
    whole = metric.to_dense()
    monkeypatch.setattr("relfisher.metric.layer._FIELD_NUMBERS", 40)
    assert_close(metric @ torch.eye(metric.shape[0], dtype=torch.float64), whole)


LARGE = ["linear layer", "batched linear", "tanh layer", "softmax layer", "two layers", "pullback"]


@pytest.fixture
def no_dense_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat every block as too large to be factorised."""
    monkeypatch.setattr("relfisher.metric.base._DENSE_BLOCK", 0)


@pytest.mark.usefixtures("no_dense_block")
@pytest.mark.parametrize("kind", LARGE)
def test_large_blocks_are_solved_without_being_formed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metric = KINDS[kind](problem(n=30, inputs=4, out=4))
    damped = metric.to_dense() + 1e-3 * torch.eye(metric.shape[0], dtype=torch.float64)
    right = torch.randn(metric.shape[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    right[:, 1] = 0
    monkeypatch.setattr(type(metric), "_direct_sum", None)
    solution = metric.solve(right, 1e-3)
    assert ((damped @ solution - right).norm(dim=0) <= 1e-12 * right.norm(dim=0)).all()
    one = right[:, 0].reshape(metric.parameter_shape)
    assert_close(metric.natural_gradient(one, 1e-3).reshape(-1), solution[:, 0], 1e-8)


@pytest.mark.usefixtures("no_dense_block")
@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize("k", [1, 3, 5])
def test_largest_eigenvalues_of_large_blocks_count_with_multiplicity(
    kind: str, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = KINDS[kind](problem(n=30, inputs=4, out=4))
    expected = torch.linalg.eigvalsh(metric.to_dense())[-k:]
    monkeypatch.setattr(type(metric), "_direct_sum", None)
    assert_close(metric.eigvalsh(k), expected)


def test_an_unfinished_iteration_warns() -> None:
    metric = two_layers(problem(n=30, out=3))
    ones = torch.ones(metric.shape[0], 1, dtype=torch.float64)
    with pytest.warns(ConvergenceWarning, match="stopped after 2 iterations at a relative residual of .*damping"):
        conjugate_residuals(metric._product, ones, ones[:, 0], max_iterations=2)


SINGULAR = ["softmax layer", "two layers", "tanh layer", "pullback"]


@pytest.mark.parametrize("kind", SINGULAR)
@given(seed=st.integers(0, 1000))
def test_singular_metrics(kind: str, seed: int) -> None:
    """Fewer samples than parameters a block: the metric is singular, whatever the rounding errors say."""
    metric = KINDS[kind](problem(n=3, inputs=4, out=2, seed=seed))
    size = metric.shape[0]
    gradient = metric @ torch.ones(size, dtype=torch.float64)
    assert metric.rank() < size
    assert metric.condition_number() == math.inf
    assert metric.logdet() == -math.inf
    with pytest.raises(SingularMetricError, match="singular with damping 0"):
        metric.solve(gradient)
    assert_close(metric @ metric.natural_gradient(gradient), gradient, 1e-6)


@given(seed=st.integers(0, 10**6), inputs=st.integers(1, 6))
def test_a_singular_metric_whose_factor_exists_by_rounding_errors_is_refused(seed: int, inputs: int) -> None:
    """One sample fewer than parameters: about every other of these has a Cholesky factor."""
    p = problem(n=inputs, inputs=inputs, out=1, seed=seed)
    metric = layer_metric(p.x, p.weight, p.bias, responses.SigmoidBernoulli())
    with pytest.raises(SingularMetricError, match="give a larger damping, or use pinv_solve"):
        metric.solve(torch.ones(inputs + 1, dtype=torch.float64))


def test_a_badly_scaled_metric_is_not_a_singular_one() -> None:
    p = problem(n=20)
    scale = torch.tensor([1e-9, 1.0, 1e6], dtype=torch.float64)
    metric = layer_metric(p.x * scale, p.weight / scale, p.bias, TANH)
    units = metric.diagonal().sqrt()
    correlations = metric.to_dense() / torch.outer(units, units)
    right = torch.ones_like(units)
    assert_close(metric.solve(units * right) * units, torch.linalg.solve(correlations, right), 1e-6)


def test_an_indefinite_metric_keeps_its_signs() -> None:
    metric = DenseMetric(torch.diag(torch.tensor([1.0, -0.5])))
    ones = torch.ones(2)
    assert metric.rank() == 2
    assert metric.condition_number() == 2
    assert float(metric.logdet(1.0)) == pytest.approx(0, abs=1e-7)
    for operation in (metric.solve, metric.pinv_solve, metric.natural_gradient):
        assert operation(ones).tolist() == [1, -2]
    assert metric.solve(ones, 1.0).tolist() == [0.5, 2]
    assert metric.condition_number(0.5) == math.inf
    assert metric.norm(torch.tensor([1.0, 0.0])) == 1
    with pytest.raises(IndefiniteMetricError, match=r"u must have a length, but u' G u is -0\.5 in"):
        metric.norm(torch.tensor([0.0, 1.0]))


def test_the_natural_gradient_of_an_observed_metric() -> None:
    """z = a b at (1/2, 1/2) and y = 3: minus the Hessian is [[1/4, 1/4 - 11/4], [1/4 - 11/4, 1/4]]."""
    at, y = torch.full((2,), 0.5, dtype=torch.float64), torch.full((1, 1), 3.0, dtype=torch.float64)
    metric = observed_fisher(lambda p: p.prod().reshape(1, 1), at, y, responses.LinearGaussian())
    direction = metric.natural_gradient(torch.tensor([1.0, 0.0], dtype=torch.float64))
    assert_close(direction, torch.tensor([0.25, 2.5], dtype=torch.float64) / (0.25**2 - 2.5**2))


def test_small_units_do_not_count_as_nothing() -> None:
    metric = DenseMetric(torch.diag(torch.tensor([1, 1e-17], dtype=torch.float64)))
    ones = torch.ones(2, dtype=torch.float64)
    for operation in (metric.solve, metric.pinv_solve, metric.natural_gradient):
        torch.testing.assert_close(operation(ones), torch.tensor([1, 1e17], dtype=torch.float64), rtol=1e-12, atol=0)
    assert float(metric.logdet()) == pytest.approx(math.log(1e-17))
    assert metric.condition_number() == pytest.approx(1e17)
    assert metric.rank() == 2


@pytest.mark.parametrize("z", [18.0, 40.0])
def test_a_saturated_unit_beside_another_one_keeps_its_step(z: float) -> None:
    x, bias = torch.randn(20, 2), torch.tensor([z, 0.0])
    metric = layer_metric(x, torch.zeros(2, 2), bias, responses.SigmoidBernoulli())
    step = metric.natural_gradient(torch.ones(2, 3))
    augmented = torch.cat([x, torch.ones(20, 1)], 1).double()
    block = torch.linalg.solve(augmented.T @ augmented / 20, torch.ones(3, dtype=torch.float64))
    for row, variance in zip(step, (math.exp(-z) / (1 + math.exp(-z)) ** 2, 0.25), strict=True):
        torch.testing.assert_close(row.double() * variance, block, rtol=1e-4, atol=1e-5)


def test_a_singular_metric_of_many_parameters_has_a_shortest_solution() -> None:
    """The range is that of the (class, sample) features: projections come from a matrix of 40 * 10 columns."""
    x = torch.randn(40, 449, dtype=torch.float64)
    metric = softmax_metric(x, torch.randn(10, 449, dtype=torch.float64) / 20, torch.zeros(10, dtype=torch.float64))
    gradient = torch.randn(4500, dtype=torch.float64)
    step = metric.natural_gradient(gradient)
    inputs = torch.linalg.qr(torch.cat([x, torch.ones(40, 1, dtype=torch.float64)], 1).T)[0]
    centered = lambda v: v - v.mean(0)  # noqa: E731
    in_range = lambda v: centered(v.reshape(10, 450) @ inputs @ inputs.T).reshape(-1)  # noqa: E731
    assert_close(metric @ step, in_range(gradient), 1e-8)
    assert_close(in_range(step), step, 1e-8)
    shift = torch.randn(1, 450, dtype=torch.float64).expand(10, 450).reshape(-1)
    assert float(metric.natural_gradient(shift).norm()) < 1e-8
    with pytest.raises(SingularMetricError):
        metric.solve(gradient)


@pytest.mark.usefixtures("no_dense_block")
@pytest.mark.parametrize("matrix", [[[1.0, 0.0], [0.0, -0.5]], [[0.0, 1.0], [1.0, 0.0]]])
def test_an_indefinite_metric_that_is_not_formed_is_refused(matrix: list[list[float]]) -> None:
    metric = DenseMetric(torch.tensor(matrix))
    for operation in (metric.solve, metric.natural_gradient):
        with pytest.raises(IndefiniteMetricError, match="must be positive to be solved without its matrix"):
            operation(torch.tensor([0.1, 1.0]) if matrix[0][0] else torch.tensor([0.0, 1.0]))


def test_a_pseudo_inverse_gives_the_shortest_solution() -> None:
    metric = layer(problem(n=3, inputs=4), TANH)
    gradient = metric @ torch.ones(metric.shape[0], dtype=torch.float64)
    solution = metric.natural_gradient(gradient)
    values, vectors = torch.linalg.eigh(metric.to_dense())
    assert_close(vectors[:, values < 1e-10].T @ solution, torch.zeros(4, dtype=torch.float64), 1e-6)


@pytest.mark.parametrize("kind", ["batched linear", "batched tanh", "batched softmax"])
@given(p=problems(max_n=7))
def test_batches_are_weighed_by_their_samples(kind: str, p: Problem) -> None:
    whole = KINDS[kind.replace("batched ", "") + " layer"](p)
    assert_close(KINDS[kind](p).to_dense(), whole.to_dense())


class Batches:
    """Batches that are made when they are asked for, and that count how many of them are alive."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.most = self.passes = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for seed in range(self.count):
            batch = problem(seed=seed).x
            self.alive.add(batch)
            self.most = max(self.most, len(self.alive))
            yield batch
            del batch


def test_one_batch_is_alive_at_a_time() -> None:
    p, batches = problem(), Batches(5)
    metric = BatchedMetric(lambda x: layer_metric(x, p.weight, p.bias, TANH), batches)
    metric @ torch.ones(metric.shape[0], dtype=torch.float64)
    metric.eigvalsh()
    assert batches.passes == 3
    assert batches.most == 1


def test_representation_says_what_it_is() -> None:
    text = repr(layer(problem(n=6, out=3), responses.LinearGaussian()))
    assert "LayerMetric(shape=(12, 12), parameters=[3, 4], samples=6, blocks=3 of 4x4 (1 distinct)" in text
