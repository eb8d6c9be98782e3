"""Wrong arguments: each error is of the right kind and says what was given and what was expected."""

import math

import pytest
import torch
from cases import problem
from torch import Tensor, nn

from relfisher import (
    BatchedMetric,
    as_function,
    fisher,
    layer_metric,
    neuron_metric,
    observed_fisher,
    relative_fisher,
    responses,
    softmax_metric,
    two_layer_metric,
)
from relfisher.memory import available_bytes, check_fits
from relfisher.metric import BlockMetric, DenseMetric, DiagonalMetric, KroneckerMetric, LayerMetric, TransformedMetric

P = problem(n=5, inputs=3, out=2, following=4)
TANH, SIGMOID = responses.TanhBernoulli(), responses.SigmoidBernoulli()


def layer(x: Tensor = P.x, weight: Tensor = P.weight, bias: Tensor | None = P.bias) -> LayerMetric:
    return layer_metric(x, weight, bias, TANH)


def softmax(x: Tensor = P.x, weight: Tensor = P.weight, bias: Tensor | None = P.bias) -> LayerMetric:
    return softmax_metric(x, weight, bias)


def two_layers(
    x: Tensor = P.x,
    weight: Tensor = P.weight,
    bias: Tensor | None = P.bias,
    next_weight: Tensor = P.next_weight,
    next_bias: Tensor | None = P.next_bias,
) -> LayerMetric:
    return two_layer_metric(x, weight, bias, TANH, next_weight, next_bias, SIGMOID)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


makers = pytest.mark.parametrize("make", [layer, softmax, two_layers])

SHAPES = {
    "features": ({"x": zeros(5, 4)}, r"x must have shape \[n, in\] = \[any, 3\], got \[5, 4\]"),
    "a vector for x": ({"x": zeros(3)}, r"x must have shape \[n, in\] = \[any, 3\], got \[3\]"),
    "a sequence for x": ({"x": zeros(2, 5, 3)}, r"x must have shape \[n, in\] = \[any, 3\], got \[2, 5, 3\]"),
    "a vector for weight": ({"weight": zeros(3)}, r"weight must have shape \[out, in\] = \[any, any\], got \[3\]"),
    "bias": ({"bias": zeros(3)}, r"bias must have shape \[out\] = \[2\], got \[3\]"),
    "bias as a matrix": ({"bias": zeros(2, 1)}, r"bias must have shape \[out\] = \[2\], got \[2, 1\]"),
    "an empty batch": ({"x": zeros(0, 3)}, r"x must not be empty, got shape \(0, 3\)"),
}


@makers
@pytest.mark.parametrize(("arguments", "message"), SHAPES.values(), ids=SHAPES)
def test_shape_errors_name_both_shapes(make, arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


NEXT = {
    "next weight": (
        {"next_weight": zeros(4, 3)},
        r"next_weight must have shape \[next, out\] = \[any, 2\], got \[4, 3\]",
    ),
    "bias": ({"next_bias": zeros(2)}, r"next_bias must have shape \[out\] = \[4\], got \[2\]"),
}


@pytest.mark.parametrize(("arguments", "message"), NEXT.values(), ids=NEXT)
def test_shape_errors_of_the_next_layer(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        two_layers(**arguments)


@makers
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_values_must_be_finite(make, name: str, bad: float) -> None:
    tensor = getattr(P, name).clone()
    tensor.view(-1)[1] = bad
    with pytest.raises(ValueError, match=f"{name} must be finite, got 1 NaN or infinite values of {tensor.numel()}"):
        make(**{name: tensor})


@pytest.mark.parametrize("name", ["next_weight", "next_bias"])
def test_values_of_the_next_layer_must_be_finite(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        two_layers(**{name: getattr(P, name) * math.nan})


@makers
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex128])
def test_dtypes_must_be_floating(make, name: str, dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"{name} must have a floating-point dtype, got {dtype}"):
        make(**{name: getattr(P, name).to(dtype)})


@makers
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_dtypes_must_be_one(make, name: str) -> None:
    with pytest.raises(TypeError, match=r"must have one dtype, got torch\.float"):
        make(**{name: getattr(P, name).float()})


@pytest.mark.parametrize("name", ["next_weight", "next_bias"])
def test_dtypes_of_the_next_layer(name: str) -> None:
    with pytest.raises(TypeError, match=r"must have one dtype, got torch\.float"):
        two_layers(**{name: getattr(P, name).float()})
    with pytest.raises(TypeError, match=f"{name} must have a floating-point dtype"):
        two_layers(**{name: getattr(P, name).long()})


NEURON = {
    "a layer": ((P.x, P.weight, 0.0), ValueError, r"weight must have shape \[in\], got \[2, 3\]; for a layer"),
    "features": ((P.x, zeros(4), 0.0), ValueError, r"x must have shape \[n, in\] = \[any, 4\], got \[5, 3\]"),
    "two biases": ((P.x, P.weight[0], P.bias), ValueError, r"bias must be one number, got shape \[2\]"),
    "a NaN bias": ((P.x, P.weight[0], math.nan), ValueError, "bias must be finite"),
    "integers": ((P.x, torch.ones(3, dtype=torch.int64), 0.0), TypeError, "weight must have a floating-point dtype"),
    "integer bias": ((P.x, P.weight[0], P.bias[0].long()), TypeError, "bias must have a floating-point dtype"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "kind", "message"), NEURON.values(), ids=NEURON)
def test_arguments_of_a_neuron(arguments, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        neuron_metric(*arguments, SIGMOID)


VECTORS = {
    "matvec": lambda metric, v: metric.matvec(v),
    "matmul": lambda metric, v: metric @ v,
    "inner": lambda metric, v: metric.inner(zeros(8), v),
    "inner from the left": lambda metric, v: metric.inner(v, zeros(8)),
    "norm": lambda metric, v: metric.norm(v),
    "solve": lambda metric, v: metric.solve(v, 0.1),
    "pinv_solve": lambda metric, v: metric.pinv_solve(v),
    "natural_gradient": lambda metric, v: metric.natural_gradient(v),
}
operations = pytest.mark.parametrize("operation", VECTORS.values(), ids=VECTORS)


@operations
@pytest.mark.parametrize("shape", [(7,), (9, 2), (4, 2), (2, 2, 2)], ids=str)
def test_vectors_must_fit(operation, shape: tuple[int, ...]) -> None:
    given = f"got {list(shape)}".replace("[", r"\[").replace("]", r"\]")
    with pytest.raises(ValueError, match=rf"must have shape \[.*8.*\].*{given}"):
        operation(layer(), zeros(*shape))


@operations
def test_vectors_must_have_the_dtype_of_the_metric(operation) -> None:
    with pytest.raises(TypeError, match=r"must have the metric's dtype torch.float64, got torch.float32"):
        operation(layer(), torch.zeros(8))
    with pytest.raises(TypeError, match=r"must have a floating-point dtype, got torch.int64"):
        operation(layer(), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("name", ["solve", "pinv_solve", "natural_gradient"])
def test_right_sides_must_be_finite(name: str) -> None:
    v = zeros(8)
    v[3] = math.nan
    with pytest.raises(ValueError, match="v must be finite, got 1 NaN or infinite values of 8"):
        getattr(layer(), name)(v)


DAMPED = {
    "solve": lambda metric, damping: metric.solve(zeros(8), damping),
    "natural_gradient": lambda metric, damping: metric.natural_gradient(zeros(8), damping),
    "logdet": lambda metric, damping: metric.logdet(damping),
    "condition_number": lambda metric, damping: metric.condition_number(damping),
}


@pytest.mark.parametrize("damping", [-1e-6, -1.0, math.inf, math.nan])
@pytest.mark.parametrize("operation", DAMPED.values(), ids=DAMPED)
def test_damping_must_not_be_negative(operation, damping: float) -> None:
    with pytest.raises(ValueError, match=rf"damping must lie in \[0, inf\), got {damping}"):
        operation(layer(), damping)


@pytest.mark.parametrize("k", [0, -1, 9])
def test_numbers_of_eigenvalues(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be a whole number in \[1, 8\], got {k}"):
        layer().eigvalsh(k)


@pytest.mark.parametrize("rtol", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("operation", [lambda m, r: m.rank(r), lambda m, r: m.pinv_solve(zeros(8), r)])
def test_relative_thresholds(operation, rtol: float) -> None:
    with pytest.raises(ValueError, match=rf"rtol must lie in \[0, 1\), got {rtol}"):
        operation(layer(), rtol)


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have room for a thousand numbers."""
    monkeypatch.setattr("relfisher.memory.available_bytes", lambda _: 8_000)


LARGE = problem(n=5, inputs=30, out=30)
FORMING = {
    "to_dense": lambda metric: metric.to_dense(),
    "blocks": lambda metric: metric.blocks(),
    "eigvalsh": lambda metric: metric.eigvalsh(),
    "solve": lambda metric: metric.solve(zeros(930), 0.1),
    "pinv_solve": lambda metric: metric.pinv_solve(zeros(930)),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("form", FORMING.values(), ids=FORMING)
def test_what_does_not_fit_is_refused_with_its_size_and_the_alternative(form) -> None:
    metric = layer(LARGE.x, LARGE.weight, LARGE.bias)
    with pytest.raises(ValueError, match=r"would take .* GiB, more than half of the .* GiB that are free on cpu; \w+"):
        form(metric)
    assert (metric @ zeros(930)).shape == (930,)


@pytest.mark.usefixtures("little_memory")
def test_information_and_jacobians_that_do_not_fit_are_refused() -> None:
    few = problem(n=300, inputs=1, out=2)
    with pytest.raises(ValueError, match=r"the information of 300 samples about 2 units would take"):
        softmax(few.x, few.weight, few.bias).to_dense()
    metric = relative_fisher(lambda theta: few.x @ theta.T, few.weight, SIGMOID)
    with pytest.raises(ValueError, match="the Jacobian of all samples would take"):
        metric.diagonal()


def test_half_of_the_free_memory_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relfisher.memory.available_bytes", lambda _: 16_000)
    check_fits("a matrix", 1000, torch.float64, torch.device("cpu"), "nothing")
    with pytest.raises(ValueError, match="a matrix would take"):
        check_fits("a matrix", 1001, torch.float64, torch.device("cpu"), "nothing")


def test_free_memory_is_found_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < available_bytes(torch.device("cpu")) < 2**50
    monkeypatch.setattr("builtins.open", lambda _: (_ for _ in ()).throw(FileNotFoundError))
    assert available_bytes(torch.device("cpu")) > 2**20


def test_batches_must_allow_more_than_one_pass() -> None:
    with pytest.raises(TypeError, match="batches must allow more than one pass, got the iterator generator"):
        BatchedMetric(layer, (x for x in P.x.split(2)))


def test_batches_must_not_be_empty() -> None:
    with pytest.raises(ValueError, match="batches must not be empty, got no batch"):
        BatchedMetric(layer, [])


def test_batches_must_be_alike() -> None:
    with pytest.raises(ValueError, match="the metrics of all batches must be alike"):
        BatchedMetric(lambda size: layer(zeros(5, size), zeros(2, size), zeros(2)), [3, 4])


@pytest.mark.parametrize(
    ("jacobian", "kind", "message"),
    [
        (zeros(7, 8), ValueError, r"jacobian must have shape \[D, K\] = \[8, any\], got \[7, 8\]"),
        (zeros(8), ValueError, r"jacobian must have shape \[D, K\] = \[8, any\], got \[8\]"),
        (zeros(8, 2) + math.nan, ValueError, "jacobian must be finite"),
        (torch.zeros(8, 2), TypeError, "jacobian must have the metric's dtype"),
        (torch.zeros(8, 2, dtype=torch.int64), TypeError, "jacobian must have a floating-point dtype"),
    ],
)
def test_jacobians(jacobian: Tensor, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        TransformedMetric(layer(), jacobian)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((zeros(2, 3),), ValueError, r"matrix must have shape \[D, D\] = \[3, any\], got \[2, 3\]"),
        ((zeros(2),), ValueError, r"matrix must have shape \[D, D\]"),
        ((zeros(2, 2) + math.inf,), ValueError, "matrix must be finite"),
        ((zeros(4, 4), (3,)), ValueError, r"matrix must have shape \[D, D\] for parameters \(3,\), got \[4, 4\]"),
        ((torch.eye(2, dtype=torch.int64),), TypeError, "matrix must have a floating-point dtype"),
        ((torch.tensor([[1.0, 2.0], [0.0, 1.0]]),), ValueError, "matrix must be symmetric, .* differ by up to 2.0e.00"),
        ((torch.tensor([[1.0, 1e-9], [0.0, 1e-18]]),), ValueError, "matrix must be symmetric, .* by up to 1.0e.00"),
    ],
)
def test_matrices(arguments, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        DenseMetric(*arguments)


ASYMMETRIC = torch.tensor([[1.0, 0.5], [0.4, 1.0]])
BLOCKS = {
    "asymmetric blocks": (lambda: BlockMetric(ASYMMETRIC.unsqueeze(0), (2,)), "blocks must be symmetric"),
    "asymmetric factors": (lambda: KroneckerMetric(torch.eye(2), ASYMMETRIC), "inputs must be symmetric"),
    "NaN in a block": (lambda: BlockMetric(torch.full((1, 2, 2), math.nan), (2,)), "blocks must be finite"),
    "NaN in a factor": (lambda: KroneckerMetric(torch.eye(2) * math.nan, torch.eye(2)), "outputs must be finite"),
    "NaN in a diagonal": (lambda: DiagonalMetric(torch.full((2,), math.nan), (2,)), "diagonal must be finite"),
}


@pytest.mark.parametrize(("make", "message"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_must_be_finite_and_symmetric(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("response", [responses.LinearGaussian(), TANH, SIGMOID, responses.Categorical()], ids=repr)
@pytest.mark.parametrize("weight", [0.0, 1e200])
def test_metrics_that_overflow_are_refused_when_they_are_made(response, weight: float) -> None:
    x = torch.tensor([[1e200, 1e180]], dtype=torch.float64)
    weights = torch.tensor([[weight, -0.5 * weight], [0, 0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="must be finite"):
        layer_metric(x, weights, None, response)
    if weight:
        with pytest.raises(ValueError, match="pre-activation must be finite, got 1 NaN or infinite values of 2"):
            relative_fisher(lambda w: x @ w.T, weights, response)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_metrics_of_low_precision_are_refused(dtype: torch.dtype) -> None:
    x, weight = P.x.to(dtype), P.weight.to(dtype)
    for make in (
        lambda: layer_metric(x, weight, None, TANH), lambda: relative_fisher(lambda w: x @ w.T, weight, TANH),
        lambda: DenseMetric(torch.eye(2, dtype=dtype)),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"must be of torch.float32 or torch.float64, got {dtype}: convert with"):
            make()


RELATIVE = {
    "two expectations": ({"response": TANH, "outcomes": [0.0]}, ValueError, "give at most one of response, outcomes"),
    "no expectation": ({}, TypeError, r"must return a torch.distributions.Distribution, got Tensor: give response"),
    "one draw": ({"sampler": lambda theta: theta, "draws": 1}, ValueError, "draws must be a whole number >= 2, got 1"),
}


@pytest.mark.parametrize(("options", "kind", "message"), RELATIVE.values(), ids=RELATIVE)
def test_ways_to_take_the_expectation(options, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        relative_fisher(lambda theta: theta, torch.ones(2), **options)


PARAMETERS = {
    "integer": (torch.ones(2, dtype=torch.int64), TypeError, "parameters must have a floating-point dtype"),
    "NaN": (torch.tensor([math.nan]), ValueError, "parameters must be finite"),
    "empty": (torch.zeros(0), ValueError, "parameters must not be empty"),
    "none": ({}, ValueError, "parameters must not be empty, got no tensor"),
    "NaN by name": ({"a": torch.ones(2), "b": torch.tensor(math.inf)}, ValueError, r"parameters\['b'\] must be finite"),
    "integer by name": ({"a": torch.ones(2, dtype=torch.int32)}, TypeError, r"parameters\['a'\] must have a floating"),
}


@pytest.mark.parametrize(("parameters", "kind", "message"), PARAMETERS.values(), ids=PARAMETERS)
def test_parameters_must_be_finite_floating_tensors(parameters, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        relative_fisher(lambda theta: theta, parameters, TANH)
    with pytest.raises(kind, match=message):
        observed_fisher(lambda theta: theta, parameters, torch.ones(1), TANH)


def test_observations_must_be_finite() -> None:
    with pytest.raises(ValueError, match="y must be finite, got 1 NaN"):
        observed_fisher(lambda theta: theta, torch.ones(2), torch.tensor([math.nan, 0.0]), TANH)


@pytest.mark.parametrize("names", [["0.weight", "0.wieght"], []])
def test_names_of_parameters(names: list[str]) -> None:
    model = nn.Sequential(nn.Linear(2, 1))
    for call in (lambda: as_function(model, zeros(1, 2), names), lambda: fisher(model, zeros(1, 2), SIGMOID, names)):
        with pytest.raises(ValueError, match=r"names must be parameters of the model \(0.weight, 0.bias\), got \["):
            call()
