"""The shipped checks pass what is right and fail, with the reason, what is wrong."""

import copy
from dataclasses import dataclass

import pytest
import torch
from cases import RESPONSES, problem
from torch import Tensor

from relfisher import layer_metric, relative_fisher, responses
from relfisher.information import Diagonal, Information
from relfisher.metric import DenseMetric, LayerMetric
from relfisher.testing import check_metric, check_response


def off_by_a_hundredth(response: responses.Response) -> responses.Response:
    """Return the same response with other information, its operator included."""
    kind = type(response)
    wrong = copy.copy(response)
    methods = {"information": lambda self, z: kind.information(self, z) * 1.01}
    object.__setattr__(wrong, "__class__", type(f"Wrong{kind.__name__}", (kind,), methods))
    return wrong


@pytest.mark.parametrize("response", [response for response, _ in RESPONSES.values()], ids=RESPONSES)
def test_responses_of_the_library_pass(response) -> None:
    """And would not, were their information off by a hundredth."""
    check_response(response)
    with pytest.raises(AssertionError, match=r"outer product of scores at z = .* is off by 1\.00e-02"):
        check_response(off_by_a_hundredth(response))


@dataclass(frozen=True)
class Logistic(responses.UnitResponse):
    """y is logistic around z, so that nu = 1 / 3; `sigma` tells how far to integrate."""

    sigma: float = 3.0

    def activation(self, z: Tensor) -> Tensor:
        return z * 1

    def slope(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def information(self, z: Tensor) -> Tensor:
        return torch.full_like(z, 1 / 3)

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(y - z) + torch.nn.functional.logsigmoid(z - y)

    def sample(self, z: Tensor, generator: torch.Generator | None = None) -> Tensor:
        uniform = torch.rand(z.shape, dtype=z.dtype, generator=generator)
        return z + torch.logit(uniform)

    def outcomes(self, out: int) -> None:
        return None


class WrongInformation(responses.TanhBernoulli):
    def information(self, z: Tensor) -> Tensor:
        return 1.01 * super().information(z)

    def slope(self, z: Tensor) -> Tensor:
        return super().information(z)


class WrongSlope(responses.ELUGaussian):
    def slope(self, z: Tensor) -> Tensor:
        return super().slope(z) + 0.1 * (z > 2)

    def information(self, z: Tensor) -> Tensor:
        return super().slope(z).square()


class Unnormalised(responses.LinearGaussian):
    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        return super().log_prob(z, y) + 0.01


class Biased(responses.SigmoidBernoulli):
    """Normalised at each z by a shift of the outcomes, so that only the information is off."""

    def log_prob(self, z: Tensor, y: Tensor) -> Tensor:
        return super().log_prob(1.1 * z, y)


class WrongOperator(responses.SigmoidBernoulli):
    def operator(self, z: Tensor) -> Information:
        return Diagonal(self.information(z) * 2)


class WrongProduct(Diagonal):
    def apply(self, field: Tensor) -> Tensor:
        return field * self.nu.square()


class WrongApply(responses.SigmoidBernoulli):
    def operator(self, z: Tensor) -> Information:
        return WrongProduct(self.information(z))


class WrongDivergence(responses.ReLUGaussian):
    def divergence(self, z: Tensor, other: Tensor) -> Tensor:
        return 1.01 * super().divergence(z, other)


class WrongCategorical(responses.Categorical):
    def information(self, z: Tensor) -> Tensor:
        return torch.diag_embed(torch.softmax(z, -1))


WRONG = {
    "information": (WrongInformation(), "outer product of scores at z"),
    "slope": (WrongSlope(), r"slope\(z\) is off"),
    "normalisation": (Unnormalised(), "the total probability at z"),
    "density of another parameter": (Biased(), "outer product of scores at z"),
    "operator": (WrongOperator(), r"operator\(z\).dense\(\) is off"),
    "product": (WrongApply(), r"operator\(z\).apply\(r\) is off"),
    "divergence": (WrongDivergence(), r"divergence\(z, z'\) at z = .* is off by 1\.00e-02"),
    "joint": (WrongCategorical(), "outer product of scores at z"),
}


def test_a_right_response_of_ones_own_passes() -> None:
    check_response(Logistic())
    with pytest.raises(AssertionError, match=r"outer product of scores at z = .* is off by 1\.00e-02"):
        check_response(off_by_a_hundredth(Logistic()))


@pytest.mark.parametrize(("response", "reason"), WRONG.values(), ids=WRONG)
def test_wrong_responses_fail(response, reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        check_response(response)


def test_the_points_are_the_callers() -> None:
    below = torch.tensor([[-1.0, -0.5], [0.5, 1.9]], dtype=torch.float64)
    check_response(WrongSlope(), below)
    with pytest.raises(AssertionError):
        check_response(WrongSlope(), below + 1)


def test_nan_fails() -> None:
    class Undefined(responses.TanhBernoulli):
        def information(self, z: Tensor) -> Tensor:
            return super().information(z) * torch.nan

    with pytest.raises(AssertionError):
        check_response(Undefined())


def tanh_layer() -> LayerMetric:
    p = problem(n=6, out=3)
    return layer_metric(p.x, p.weight, p.bias, responses.TanhBernoulli())


@pytest.mark.parametrize("name", ["linear", "tanh", "softmax"])
def test_metrics_of_the_library_pass(name: str) -> None:
    p, response = problem(n=6, out=3), RESPONSES[name][0]
    expected = relative_fisher(
        lambda theta: p.x @ theta[:, :-1].T + theta[:, -1], p.theta.reshape(3, -1), response
    ).to_dense()
    metric = layer_metric(p.x, p.weight, p.bias, response)
    check_metric(metric, expected)
    with pytest.raises(AssertionError, match=r"the matrix is off by 9\.90e-03"):
        check_metric(metric, 1.01 * expected)


def test_a_metric_that_is_not_the_expected_one_fails() -> None:
    metric = tanh_layer()
    expected = metric.to_dense()
    expected[0, 0] *= 1 + 1e-5
    with pytest.raises(AssertionError, match="the matrix is off"):
        check_metric(metric, expected)


def test_an_asymmetric_matrix_fails() -> None:
    metric = DenseMetric(torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    metric.matrix[0, 1] = 1
    with pytest.raises(AssertionError, match="symmetry"):
        check_metric(metric)


def test_an_indefinite_matrix_fails() -> None:
    with pytest.raises(AssertionError, match="not positive semi-definite: its least eigenvalue is -1"):
        check_metric(DenseMetric(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)))


OPERATIONS = {
    "diagonal": lambda self: LayerMetric.diagonal(self) * 1.01,
    "trace": lambda self: LayerMetric.trace(self) * 1.01,
    "to_dense": lambda self: LayerMetric.to_dense(self) * 1.01,
    "matmat": lambda self, v: LayerMetric.matmat(self, v) * 1.01,
    "solve": lambda self, v, damping=0.0: LayerMetric.solve(self, v, damping) * 1.01,
    "eigvalsh": lambda self, k=None: LayerMetric.eigvalsh(self, k) * 1.01,
    "inner": lambda self, u, v: LayerMetric.inner(self, u, v) * 1.01,
    "logdet": lambda self, damping=0.0: LayerMetric.logdet(self, damping) * 1.01,
}


class WrongBlocks(DenseMetric):
    def blocks(self) -> Tensor:
        return super().blocks() * 1.01

    def to_dense(self) -> Tensor:
        return self.matrix


def test_wrong_blocks_fail() -> None:
    with pytest.raises(AssertionError, match="blocks is off"):
        check_metric(WrongBlocks(tanh_layer().to_dense()))


@pytest.mark.parametrize(("name", "wrong"), OPERATIONS.items(), ids=OPERATIONS)
def test_a_wrong_operation_fails(name: str, wrong) -> None:
    metric = tanh_layer()
    metric.__class__ = type("Wrong", (LayerMetric,), {name: wrong})
    with pytest.raises(AssertionError, match=f"{name} is off"):
        check_metric(metric)
