"""All operations of all kinds of metrics agree, for metrics that are regular, singular, badly scaled and indefinite."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import relfisher
from relfisher import metric as metrics
from relfisher import responses
from relfisher.metric import Metric, SingularMetricError, layer_metric, two_layer_metric
from relfisher.pullback import PullbackMetric
from relfisher.structures.operator import AppliedMetric


@dataclass(frozen=True)
class Draw:
    """Random tensors of one dtype, and logits of a given saturation."""

    seed: int
    saturation: float
    dtype: torch.dtype

    def normal(self, *shape: int, key: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 10 + key)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(self.dtype)

    def layer(self, response: responses.Response, n: int = 12, key: int = 0) -> Metric:
        """A layer of three units or classes: one saturated, one not, one in between."""
        bias = torch.tensor([1.0, 0.0, 0.4], dtype=self.dtype) * self.saturation
        return layer_metric(self.normal(n, 3, key=key), self.normal(3, 3, key=key + 1) / 3, bias, response)

    def matrix(self, size: int, rank: int, signs: float) -> Tensor:
        """A matrix of a given rank, in units of very different size; it is indefinite if signs is -1."""
        root = torch.linalg.qr(self.normal(size, size).double())[0][:, :rank]
        kinds = torch.linspace(1, 2, rank, dtype=torch.float64)
        kinds[::2] *= signs
        units = torch.logspace(0, -self.saturation / 6, size, dtype=torch.float64)
        matrix = (root * kinds) @ root.T * units * units.unsqueeze(1)
        return ((matrix + matrix.T) / 2).to(self.dtype)


def joint(draw: Draw, signs: float = 1.0) -> metrics.JointMetric:
    return metrics.JointMetric(
        metrics.DenseMetric(draw.matrix(7, 7, signs)), {"a": torch.arange(4), "b": torch.tensor([6, 4])}
    )


def two_layers(draw: Draw) -> Metric:
    return two_layer_metric(
        draw.normal(15, 2), draw.normal(3, 2, key=1), None, responses.TanhBernoulli(), draw.normal(4, 3, key=2),
        torch.tensor([draw.saturation, 0, 1, 2], dtype=draw.dtype), responses.Categorical(),
    )  # fmt: skip


def pullback(draw: Draw) -> Metric:
    x, bias = draw.normal(15, 3), torch.tensor([1.0, 0.2], dtype=draw.dtype) * draw.saturation
    return relfisher.relative_fisher(
        lambda w: x @ w.T + bias, draw.normal(2, 3, key=1) / 3, responses.SigmoidBernoulli()
    )


def observed(draw: Draw) -> Metric:
    x, y = draw.normal(9, 2), 3 * draw.normal(9, 1, key=1)
    return relfisher.observed_fisher(
        lambda p: (x @ p[:2]).unsqueeze(1) * p[2], draw.normal(3, key=2), y, responses.LinearGaussian()
    )


def applied(draw: Draw) -> Metric:
    tensors = {"metric": draw.matrix(4, 4, 1)}
    return AppliedMetric(lambda field, held: field @ held["metric"], tensors, (2, 4))


# The metric, and its rank. With three samples or classes, the units or their differences span less than the parameters.
KINDS = {
    "linear": lambda draw: (draw.layer(responses.LinearGaussian(0.1)), 12),
    "sigmoid": lambda draw: (draw.layer(responses.SigmoidBernoulli()), 12),
    "tanh, few samples": lambda draw: (draw.layer(responses.TanhBernoulli(), n=3), 9),
    "softmax": lambda draw: (draw.layer(responses.Categorical()), 8),
    "softmax, few samples": lambda draw: (draw.layer(responses.Categorical(), n=2), 4),
    "two layers": lambda draw: (two_layers(draw), None),
    "batched": lambda draw: (
        metrics.BatchedMetric(lambda key: draw.layer(responses.SigmoidBernoulli(), key=key), [0, 4]), 12,
    ),
    "grouped": lambda draw: (
        metrics.GroupedMetric([draw.layer(responses.Categorical(), key=key) for key in (0, 4)]), 16,
    ),
    "transformed": lambda draw: (
        metrics.TransformedMetric(metrics.DenseMetric(draw.matrix(3, 3, -1)), draw.normal(3, 5, key=5)), None,
    ),
    "joint": lambda draw: (joint(draw).block("b"), 2),
    "adjusted": lambda draw: (joint(draw).adjusted_for("b"), 4),
    "indefinite block": lambda draw: (joint(draw, -1).block("a"), 4),
    "blocks": lambda draw: (
        metrics.BlockMetric(torch.stack([draw.matrix(3, 2, 1), draw.matrix(3, 3, -1)]), (2, 3)), 5,
    ),
    "diagonal": lambda draw: (
        metrics.DiagonalMetric(torch.tensor([1, 0, -math.exp(-draw.saturation)], dtype=draw.dtype), (3,)), 2,
    ),
    "kronecker": lambda draw: (metrics.KroneckerMetric(draw.matrix(2, 2, -1), draw.matrix(3, 2, 1)), 4),
    "dense": lambda draw: (metrics.DenseMetric(draw.matrix(5, 5, 1)), 5),
    "dense, singular": lambda draw: (metrics.DenseMetric(draw.matrix(5, 3, 1)), 3),
    "dense, indefinite": lambda draw: (metrics.DenseMetric(draw.matrix(5, 5, -1)), 5),
    "dense, both": lambda draw: (metrics.DenseMetric(draw.matrix(5, 3, -1)), 3),
    "observed": lambda draw: (observed(draw), 3),
    "pullback": lambda draw: (pullback(draw), 6),
    "applied": lambda draw: (applied(draw), 8),
}  # fmt: skip


def kinds_of(base: type) -> set[type]:
    return {base}.union(*(kinds_of(kind) for kind in base.__subclasses__()))


def test_every_class_of_metrics_is_here() -> None:
    draw = Draw(0, 1.0, torch.float64)
    mine = {kind for kind in kinds_of(Metric) if kind.__module__.startswith("relfisher.")}
    assert {type(make(draw)[0]) for make in KINDS.values()} == mine - {Metric}
    assert PullbackMetric in mine


def units_of(matrix: Tensor) -> Tensor:
    """Return the units in which entries are compared: roots of the diagonal, or more if that is small by chance."""
    return matrix.diagonal().abs().maximum(matrix.abs().amax(1).square() / matrix.abs().amax()).sqrt()


@pytest.mark.parametrize("kind", KINDS)
@given(dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 1000), saturation=st.floats(0, 18))
def test_all_operations_agree(kind: str, dtype: torch.dtype, seed: int, saturation: float) -> None:
    metric, rank = KINDS[kind](Draw(seed, saturation, dtype))
    size, rtol = metric.shape[0], 1e4 * torch.finfo(dtype).eps
    eye = torch.eye(size, dtype=dtype)
    matrix = torch.stack([metric.matvec(unit) for unit in eye], dim=1).double()
    units = units_of(matrix)

    def same(found: Tensor, wanted: Tensor, size: Tensor | float) -> None:
        assert ((found.double() - wanted).abs() <= rtol * size).all(), (found, wanted)

    pairs = torch.outer(units, units)
    same(matrix.T, matrix, pairs)
    same(metric.to_dense(), matrix, pairs)
    same(torch.block_diag(*metric.blocks()), matrix, pairs)
    same(metric.matmat(eye), matrix, pairs)
    same(metric.diagonal(), matrix.diagonal(), units.square())
    same(metric.trace(), matrix.trace(), units.square().sum())
    probe = torch.linspace(-1, 2, size, dtype=dtype)
    same(metric.inner(probe, eye[0]), probe.double() @ matrix[:, 0], (probe.abs() @ pairs.to(dtype))[0])
    values = torch.linalg.eigvalsh(matrix)
    largest = float(values.abs().max())
    same(metric.eigvalsh(), values, largest)
    damping = 0.3 * largest
    damped = matrix + damping * torch.eye(size, dtype=torch.float64)
    away = float((values + damping).abs().min()) / largest  # from a damped metric that is singular
    if away > 1e-2:
        same(metric.solve(probe, damping) * damping, torch.linalg.solve(damped, probe.double()) * damping, 1 / away**2)
        same(metric.logdet(damping), torch.linalg.slogdet(damped)[1], size / away)
        ratio = (values + damping).abs()
        assert metric.condition_number(damping) == pytest.approx(float(ratio.max() / ratio.min()), rel=rtol / away)

    found = metric.rank()
    assert rank is None or found == rank
    inverse = metric.pinv_solve(eye).double()
    there, back, sizes = matrix @ inverse, inverse @ matrix, matrix.abs() @ inverse.abs()
    # The four conditions of Penrose, up to the rounding errors of the products.
    same(there @ matrix, matrix, sizes @ matrix.abs() + pairs)
    same(inverse @ there, inverse, inverse.abs() @ sizes + torch.outer(units_of(inverse), units_of(inverse)))
    same(there.T, there, 1 + sizes + sizes.T)
    same(back.T, back, 1 + sizes + sizes.T)
    assert torch.equal(metric.natural_gradient(probe), metric.pinv_solve(probe))
    if found < size:
        assert metric.condition_number() == math.inf
        assert metric.logdet() == -math.inf
        with pytest.raises(SingularMetricError, match="singular with damping 0"):
            metric.solve(probe)
    else:
        assert metric.condition_number() < math.inf
        least = float(torch.linalg.eigvalsh(matrix / pairs).abs().min())
        same(metric.logdet(), torch.linalg.slogdet(matrix / pairs)[1] + 2 * units.log().sum(), size / least)
        same(metric.solve(eye).double() * pairs, inverse * pairs, 1 / least**2)
