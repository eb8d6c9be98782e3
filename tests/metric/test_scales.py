"""Operations of metrics in extreme units, against values that do not pass through the library."""

import math

import pytest
import torch
from cases import assert_close
from torch import Tensor, nn

from relfisher import compare, fisher, layer_metric, relative_fisher
from relfisher.metric import (
    BlockMetric,
    ConvergenceWarning,
    DenseMetric,
    DiagonalMetric,
    KroneckerMetric,
    Metric,
    TransformedMetric,
)
from relfisher.responses import LinearGaussian, SigmoidBernoulli

CORRELATIONS = torch.tensor([[4.0, 1, 1], [1, 4, 2], [1, 2, 4]], dtype=torch.float64)


def graded(scale: float, sign: float = 1.0) -> Tensor:
    """Return S C S with S = diag(1, 1 / scale, scale), which is exact for powers of two."""
    units = torch.tensor([1, 1 / scale, scale], dtype=torch.float64)
    correlations = CORRELATIONS.clone()
    correlations[1, 1] *= sign
    return correlations * torch.outer(units, units)


@pytest.mark.parametrize(("sign", "least"), [(1, 44 / 15), (-1, 76 / 15)])
def test_the_condition_number_of_a_metric_in_extreme_units(sign: float, least: float) -> None:
    """The eigenvalues tend to 4 scale^2 and least / scale^2, the ratio of the determinants of C and of two rows."""
    scale = 2.0**28
    wanted = 4 * scale**2 / (least / scale**2)
    metric = DenseMetric(graded(scale, sign))
    assert metric.condition_number() == pytest.approx(wanted, rel=1e-9)
    assert BlockMetric(graded(scale, sign).unsqueeze(0), (2, 3)).condition_number() == pytest.approx(wanted, rel=1e-9)
    assert KroneckerMetric(torch.eye(2, dtype=torch.float64), metric.matrix).condition_number() == pytest.approx(
        wanted, rel=1e-9
    )
    assert metric.condition_number(1e300) == pytest.approx(1)


def test_the_condition_number_with_damping_between_two_units() -> None:
    """With damping well between the scales, the least eigenvalue is the damping."""
    assert DenseMetric(graded(2.0**20)).condition_number(1e-6) == pytest.approx(4 * 2.0**40 / 1e-6, rel=1e-5)


def test_compare_says_the_condition_of_units_of_different_scales() -> None:
    """The inputs are (1, e) and (1, 0) with e = 2^-30: the block is a multiple of [[2, e], [e, e^2]]."""
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.tensor([[1.0, 2.0**-30], [1.0, 0.0]], dtype=torch.float64)
    for row in compare(nn.Sequential(model), x, SigmoidBernoulli()):
        assert row.relative.condition_number == pytest.approx(2.0**62)
        assert row.global_block.condition_number == pytest.approx(2.0**62)


@pytest.mark.parametrize("size", [1e-30, 1e-25, 1e25, 1e30])
def test_a_length_is_right_where_its_square_is_not_in_the_dtype(size: float) -> None:
    metric = DenseMetric(torch.eye(2))
    assert float(metric.norm(torch.full((2,), size))) == pytest.approx(size * math.sqrt(2), rel=1e-6, abs=0)
    assert metric.norm(torch.zeros(2)) == 0


class Large(Metric):
    """level U U' with U [D, 3], which is never formed."""

    def __init__(self, factor: Tensor, level: float) -> None:
        super().__init__((len(factor),), 1, factor.dtype, factor.device)
        self.factor, self.level = factor, level

    def _product(self, vectors: Tensor) -> Tensor:
        return self.level * (self.factor @ (self.factor.T @ vectors))

    def _direct_sum_shape(self) -> tuple[int, int]:
        return 1, self.shape[0]

    def _direct_sum(self) -> Tensor:
        raise AssertionError

    def diagonal(self) -> Tensor:
        return self.level * self.factor.square().sum(1)


@pytest.mark.filterwarnings("error", category=ConvergenceWarning)
@pytest.mark.parametrize(("level", "size"), [(1, 1e-25), (1, 1e25), (1e-25, 1), (1e25, 1), (1e25, 1e25)])
def test_large_metrics_are_solved_in_all_units(level: float, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relfisher.metric.base._DENSE_BLOCK", 2)
    factor = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64))[0].float()
    metric, right, wide = Large(factor, level), torch.randn(9), factor.double()
    projected = wide @ (wide.T @ right.double())
    found = metric.natural_gradient(right * size).double() * (level / size)
    assert_close(found, projected, 1e-4)
    damped = metric.solve(right * size, level).double() * (level / size)
    assert_close(damped, right.double() - projected / 2, 1e-4)


def test_the_largest_eigenvalue_of_a_large_metric_that_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("relfisher.metric.base._DENSE_BLOCK", 2)
    assert Large(torch.zeros(9, 3), 1.0).eigvalsh(2).tolist() == [0, 0]


HUGE = 1e200 * torch.eye(2, dtype=torch.float64)


def through(scale: float) -> Metric:
    theta = torch.full((2,), 1 / scale, dtype=torch.float64)
    return relative_fisher(lambda p: (scale * p).unsqueeze(0), theta, LinearGaussian())


def of_a_root() -> Metric:
    theta = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return relative_fisher(lambda p: p.sqrt().unsqueeze(0), theta, LinearGaussian())


def of_large_weights() -> Metric:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).double()
    nn.init.zeros_(model[0].weight)
    nn.init.constant_(model[1].weight, 1e200)
    return fisher(model, torch.ones(3, 1, dtype=torch.float64), LinearGaussian())


@pytest.mark.parametrize(
    "make",
    [
        lambda: KroneckerMetric(HUGE, HUGE),
        lambda: TransformedMetric(DenseMetric(HUGE / 1e200), HUGE),
        lambda: through(1e200),
        lambda: layer_metric(HUGE / 1e200, HUGE / 1e200, None, LinearGaussian(1e-160)),
        of_a_root,
        of_large_weights,
    ],
    ids=["Kronecker", "transformed", "pullback", "noise", "no derivative", "model"],
)
def test_metrics_that_are_not_finite_are_refused_when_they_are_made(make) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        make()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BlockMetric(torch.ones(2, 2, 3), (2, 3)), ValueError, "blocks must be square"),
        (lambda: KroneckerMetric(torch.ones(2, 3), torch.eye(2)), ValueError, "outputs must be square"),
        (lambda: KroneckerMetric(torch.eye(2), torch.eye(2).double()), TypeError, "must have one dtype"),
        (lambda: BlockMetric(torch.eye(3).expand(1, 3, 3), (2, 4)), ValueError, "q b = 8 parameters, or one that is"),
        (lambda: BlockMetric(torch.eye(3).expand(2, 3, 3), (3, 3)), ValueError, "q b = 9 parameters, or one that is"),
        (lambda: BlockMetric(torch.eye(3), (3,)), ValueError, "q b = 3 parameters, or one that is"),
        (lambda: DiagonalMetric(torch.ones(3), (4,)), ValueError, r"diagonal must have shape \[4\]"),
    ],
)
def test_parts_that_do_not_make_up_a_metric_are_refused(make, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_one_block_may_stand_for_all() -> None:
    block = torch.tensor([[2.0, 1], [1, 2]])
    assert_close(BlockMetric(block.unsqueeze(0), (3, 2)).to_dense(), torch.block_diag(block, block, block))
