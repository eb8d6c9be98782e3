"""Blocks of a joint metric and Schur complements against dense linear algebra, and what statistics says of them."""

import math

import pytest
import torch
from cases import Problem, assert_close, problem, problems
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from relfisher import JointMetric, layer_metric, relative_fisher, responses, two_layer_metric
from relfisher.metric import DenseMetric, SingularMetricError, TransformedMetric, joint
from relfisher.testing import check_metric

SIGMOID = responses.SigmoidBernoulli()
sizes = st.lists(st.integers(1, 4), min_size=2, max_size=4)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def regular(size: int, seed: int) -> Tensor:
    root = torch.randn(size, 2 * size, dtype=torch.float64, generator=generator(seed))
    return root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def named(sizes: list[int]) -> dict[str, Tensor]:
    return {chr(ord("a") + place): torch.zeros(size, dtype=torch.float64) for place, size in enumerate(sizes)}


def schur(matrix: Tensor, kept: list[int], nuisance: list[int], damping: float = 0.0) -> Tensor:
    """Return G_11 - G_12 (G_22 + damping)^+ G_21."""
    inner = matrix[nuisance][:, nuisance] + damping * torch.eye(len(nuisance), dtype=matrix.dtype)
    cross = matrix[kept][:, nuisance]
    return matrix[kept][:, kept] - cross @ torch.linalg.pinv(inner, hermitian=True) @ cross.T


@given(sizes=sizes, seed=st.integers(0, 1000), damping=st.sampled_from([0.0, 0.01, 3.0]))
def test_blocks_and_adjusted_metrics_are_those_of_the_matrix(sizes: list[int], seed: int, damping: float) -> None:
    matrix = regular(sum(sizes), seed)
    metric = JointMetric(DenseMetric(matrix), named(sizes))
    places = dict(zip(metric.parts, torch.arange(sum(sizes)).split(sizes), strict=True))
    order = torch.randperm(len(sizes), generator=generator(seed)).tolist()
    names = [list(places)[place] for place in order]
    chosen = torch.cat([places[name] for name in names])
    check_metric(metric.block(*names), matrix[chosen][:, chosen])
    nuisance = sorted(names[: max(1, len(names) // 2)])
    others = [name for name in places if name not in nuisance]
    kept, rest = (torch.cat([places[name] for name in some]).tolist() for some in (others, nuisance))
    adjusted = metric.adjusted_for(*nuisance, damping=damping)
    assert list(adjusted.parts) == others
    expected = schur(matrix, kept, rest, damping)
    check_metric(adjusted, expected)
    first = sizes[list(places).index(others[0])]
    check_metric(adjusted.block(others[0]), expected[:first, :first])


@given(sizes=sizes, seed=st.integers(0, 1000))
def test_the_inverse_of_the_adjusted_metric_is_the_block_of_the_inverse(sizes: list[int], seed: int) -> None:
    matrix = regular(sum(sizes), seed)
    metric = JointMetric(DenseMetric(matrix), named(sizes))
    adjusted = metric.adjusted_for(*list(metric.parts)[1:])
    probe = torch.eye(sizes[0], dtype=torch.float64)
    assert_close(adjusted.solve(probe), torch.linalg.inv(matrix)[: sizes[0], : sizes[0]])


@given(sizes=st.lists(st.integers(1, 3), min_size=3, max_size=4), seed=st.integers(0, 1000))
def test_adjusting_for_one_part_after_another_is_adjusting_for_both(sizes: list[int], seed: int) -> None:
    metric = JointMetric(DenseMetric(regular(sum(sizes), seed)), named(sizes))
    assert_close(metric.adjusted_for("b").adjusted_for("c").to_dense(), metric.adjusted_for("b", "c").to_dense())


@given(sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 1000))
def test_coordinates_of_the_nuisance_do_not_matter(sizes: tuple[int, int], seed: int) -> None:
    """theta_2 = B theta_1 + C phi changes G_11, G_12 and G_22, but not what is known of theta_1 without theta_2."""
    one, two = sizes
    metric = DenseMetric(regular(one + two, seed))
    change = torch.eye(one + two, dtype=torch.float64)
    change[one:] = torch.randn(two, one + two, dtype=torch.float64, generator=generator(seed + 1))
    change[one:, one:] += 3 * torch.eye(two, dtype=torch.float64)
    there = JointMetric(TransformedMetric(metric, change), named([one, two]))
    assert_close(
        there.adjusted_for("b").to_dense(), JointMetric(metric, named([one, two])).adjusted_for("b").to_dense(), 1e-7
    )


@given(rank=st.integers(1, 5), seed=st.integers(0, 1000))
def test_a_singular_nuisance_takes_away_what_any_generalized_inverse_does(rank: int, seed: int) -> None:
    """The least value of (v, u)' G (v, u) over u is v' S v, whatever the u that attains it."""
    root = torch.randn(7, rank, dtype=torch.float64, generator=generator(seed))
    matrix = root @ root.T
    metric = JointMetric(DenseMetric(matrix), named([3, 4])).adjusted_for("b")
    v = torch.randn(3, dtype=torch.float64, generator=generator(seed + 1))
    least = torch.linalg.lstsq(root[3:].T, -root[:3].T @ v, driver="gelsd")
    gap = (root[:3].T @ v + root[3:].T @ least.solution).square().sum()
    scale = float((v @ root[:3]).square().sum())
    assert float(metric.inner(v, v)) == pytest.approx(float(gap), rel=1e-7, abs=1e-9 * scale)


def test_a_nearly_singular_nuisance_counts() -> None:
    """With the Jacobian J = (J_1, J_2), it is the square of the part of J_1 outside the range of J_2."""
    orthogonal = torch.linalg.qr(torch.randn(40, 20, dtype=torch.float64, generator=generator(0)))[0]
    inner = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64, generator=generator(1)))[0]
    nuisance = (orthogonal * torch.logspace(0, -5, 20, dtype=torch.float64)) @ inner
    first = torch.randn(40, 3, dtype=torch.float64, generator=generator(2))
    jacobian = torch.cat([first, nuisance], dim=1)
    residual = first - orthogonal @ (orthogonal.T @ first)
    adjusted = JointMetric(DenseMetric(jacobian.T @ jacobian), named([3, 20])).adjusted_for("b")
    assert_close(adjusted.to_dense(), residual.T @ residual, 1e-6)


def test_parts_that_only_act_together_carry_no_information_alone() -> None:
    x = torch.randn(50, 1, dtype=torch.float64, generator=generator(0))
    parameters = {"a": torch.ones(1, dtype=torch.float64), "b": torch.ones(1, dtype=torch.float64)}
    metric = relative_fisher(lambda p: x * (p["a"] + p["b"]), parameters, SIGMOID)
    alone = JointMetric(metric, parameters).adjusted_for("b")
    assert JointMetric(metric, parameters).block("a").rank() == 1
    assert alone.rank() == 0
    assert alone.logdet() == -math.inf
    with pytest.raises(SingularMetricError):
        alone.solve(torch.ones(1, dtype=torch.float64))


@given(p=problems())
def test_the_first_of_two_layers_by_autodiff(p: Problem) -> None:
    """Its block is the metric of equation (26). Adjusted for the second layer, it is the Schur complement."""
    parameters = {"first": torch.cat([p.weight, p.bias.unsqueeze(1)], 1), "second": p.next_weight, "bias": p.next_bias}

    def pre_activation(at: dict[str, Tensor]) -> Tensor:
        hidden = torch.tanh(p.x @ at["first"][:, :-1].T + at["first"][:, -1])
        return hidden @ at["second"].T + at["bias"]

    whole = relative_fisher(pre_activation, parameters, SIGMOID)
    metric = JointMetric(whole, parameters)
    known = two_layer_metric(
        p.x, p.weight, p.bias, responses.TanhBernoulli(), p.next_weight, p.next_bias, SIGMOID
    ).to_dense()
    assert_close(metric.block("first").to_dense(), known)
    assert metric.block("first").parameter_shape == parameters["first"].shape
    adjusted = metric.adjusted_for("second", "bias", damping=1e-3)
    size = parameters["first"].numel()
    expected = schur(whole.to_dense(), list(range(size)), list(range(size, whole.shape[0])), 1e-3)
    assert_close(adjusted.to_dense(), expected, 1e-8)
    assert torch.linalg.eigvalsh(known - adjusted.to_dense())[0] > -1e-10


def test_places_name_any_parts_of_a_layer() -> None:
    p = problem(n=30)
    metric = layer_metric(p.x, p.weight, p.bias, SIGMOID)
    places = torch.arange(metric.shape[0]).reshape(metric.parameter_shape)
    joint_metric = JointMetric(metric, {"bias": places[:, -1], "weight": places[:, :-1]})
    matrix, bias, weight = metric.to_dense(), places[:, -1], places[:, :-1].reshape(-1)
    check_metric(joint_metric.block("weight"), matrix[weight][:, weight])
    expected = schur(matrix, weight.tolist(), bias.tolist())
    check_metric(joint_metric.adjusted_for("bias"), expected)
    assert joint_metric.adjusted_for("bias").parameter_shape == p.weight.shape
    only = JointMetric(metric, {"weight": places[:, :-1]})
    assert only.shape == (p.weight.numel(), p.weight.numel())


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_a_large_nuisance_is_solved_without_its_matrix(monkeypatch: pytest.MonkeyPatch, damping: float) -> None:
    matrix = regular(9, 0)
    expected = schur(matrix, [0, 1, 2], list(range(3, 9)), damping)
    monkeypatch.setattr(joint, "_DENSE_BLOCK", 5)
    monkeypatch.setattr("relfisher.metric.base._DENSE_BLOCK", 5)
    adjusted = JointMetric(DenseMetric(matrix), named([3, 6])).adjusted_for("b", damping=damping)
    monkeypatch.setattr(adjusted.nuisance, "_direct_sum", None)
    check_metric(adjusted, expected)


def test_damping_is_the_precision_of_a_prior_on_the_nuisance() -> None:
    metric = JointMetric(DenseMetric(regular(5, 0)), named([2, 3]))
    known, unknown = metric.block("a").to_dense(), metric.adjusted_for("b").to_dense()
    last = unknown
    for damping in (1e-2, 1.0, 1e2, 1e12):
        now = metric.adjusted_for("b", damping=damping).to_dense()
        assert torch.linalg.eigvalsh(now - last)[0] > -1e-12
        last = now
    assert_close(last, known)


def test_parts_may_be_single_numbers() -> None:
    matrix = regular(2, 0)
    parts = {"loc": torch.tensor(0.0), "log_scale": torch.tensor(0.0)}
    metric = JointMetric(DenseMetric(matrix), parts)
    assert metric.block("loc").shape == (1, 1)
    assert_close(metric.adjusted_for("log_scale").to_dense(), schur(matrix, [0], [1]))


WRONG_PARTS = {
    "too few": ({"a": torch.zeros(3)}, ValueError, "parts must have the 5 parameters of the metric, got 3"),
    "none": ({}, TypeError, "got no part"),
    "empty": ({"a": torch.zeros(5), "b": torch.zeros(0)}, ValueError, r"parts\['b'\] must not be empty"),
    "both": ({"a": torch.zeros(3), "b": torch.tensor([3, 4])}, TypeError, "a: torch.float32, b: torch.int64"),
    "overlap": ({"a": torch.tensor([0, 1]), "b": torch.tensor([1])}, ValueError, "must be different places"),
    "outside": ({"a": torch.tensor([0, 5])}, ValueError, "0 to 4"),
    "mask": ({"a": torch.ones(5, dtype=torch.bool)}, TypeError, "a: torch.bool"),
}


@pytest.mark.parametrize(("parts", "error", "message"), WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_wrong_parts_are_named(parts, error, message) -> None:
    with pytest.raises(error, match=message):
        JointMetric(DenseMetric(regular(5, 0)), parts)


@pytest.mark.parametrize(("parts", "said"), [({"a": 5}, r"parts\['a'\].*Tensor, got 5"), ([5], "parts.*Mapping, got")])
def test_parts_of_a_wrong_type_are_named(parts, said) -> None:
    with pytest.raises(TypeError, match=said):
        joint._places(DenseMetric(regular(5, 0)), parts)  # shapes are not checked before it


@pytest.mark.parametrize("names", [(), ("c",), ("a", "a")], ids=str)
def test_wrong_names_are_named(names: tuple[str, ...]) -> None:
    metric = JointMetric(DenseMetric(regular(3, 0)), named([1, 2]))
    for call in (metric.block, metric.adjusted_for, metric.adjusted_for("b").block):
        with pytest.raises(ValueError, match=f"names must be different parts of a.*got {', '.join(names) or 'none'}"):
            call(*names)


def test_something_must_be_left_and_damping_is_not_negative() -> None:
    metric = JointMetric(DenseMetric(regular(3, 0)), named([1, 2]))
    with pytest.raises(ValueError, match="names must leave a part that is not a nuisance, got all of b, a"):
        metric.adjusted_for("b", "a")
    with pytest.raises(ValueError, match=r"damping must lie in \[0, inf\), got -1"):
        metric.adjusted_for("b", damping=-1.0)
