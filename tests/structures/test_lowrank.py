"""Sketches of blocks, and inverses by their leading eigenvectors, against dense ones in float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from relfisher.responses import LinearGaussian
from relfisher.structures import Inversion, KroneckerFactors, NeuronBlocks, Samples, SharedBlock
from relfisher.structures.sketch import add_sketch, leading, reconstructed, sketch, sketched

FIRST_SIGNS = [-1, -1, -1, -1, 1, -1, 1, 1, -1, -1, -1, -1, 1, -1, 1, -1]
forms = pytest.mark.parametrize("form", ["inverse", "root"])


def decaying(generator, groups, d, rank, rest):
    """Return symmetric matrices whose eigenvalues are in [1, 10] for `rank` directions and `rest` for all others."""
    basis = torch.linalg.qr(torch.randn(*groups, d, d, generator=generator, dtype=torch.float64))[0]
    values = torch.full((*groups, d), rest, dtype=torch.float64)
    values[..., :rank] = 1 + 9 * torch.rand(*groups, rank, generator=generator, dtype=torch.float64)
    return basis @ (values.unsqueeze(-1) * basis.mT)


def state_of(structure, metric, out, form, **others):
    groups, d = metric.shape[:-2], metric.shape[-2]
    weight = torch.zeros(*groups, out, d, dtype=torch.float64)
    state = structure.create(
        tuple(weight.shape), weight.dtype, torch.device("cpu"), identity=False, root=form == "root"
    )
    for name, value in {"metric": metric, **others}.items():
        kept = state[name]
        kept.copy_(value if kept.shape == value.shape else sketch(value, structure.rank))
    state["ema_weight"].fill_(1.0)
    return state


@given(st.data())
def test_the_sketch_of_a_sum_is_that_of_the_matrix(data):
    rank = data.draw(st.integers(1, 4), "rank")
    d, n = data.draw(st.integers(8 * rank, 10 * rank + 4), "d"), data.draw(st.integers(1, 9), "n")
    groups = data.draw(st.sampled_from([(), (2,)]), "groups")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    first, second = (torch.randn(*groups, n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    kept = torch.full((*groups, d, 2 * rank + 1), torch.nan, dtype=torch.float64)
    assert add_sketch(kept, first, keep=0.0, share=0.5)
    assert add_sketch(kept, second, keep=0.9, share=0.1)
    torch.testing.assert_close(kept, sketch(0.45 * first.mT @ first + 0.1 * second.mT @ second, rank))
    before = kept.clone()
    assert not add_sketch(kept, second * 1e200, keep=0.9, share=0.1)
    assert torch.equal(kept, before)


@given(st.data())
def test_a_sketch_holds_all_of_a_matrix_of_low_rank(data):
    rank = data.draw(st.integers(1, 4), "rank")
    d, n = data.draw(st.integers(8 * rank, 10 * rank + 4), "d"), data.draw(st.integers(1, 2 * rank), "n")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    metric = rows.mT @ rows
    torch.testing.assert_close(reconstructed(sketch(metric, rank)), metric, rtol=1e-6, atol=1e-6)
    values, vectors = leading(sketch(metric, rank), rank)
    expected = torch.linalg.eigvalsh(metric)[-rank:]
    torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(metric @ vectors, vectors * values, rtol=1e-4, atol=1e-4)


def test_signs_are_those_of_all_versions_and_balanced():
    signs = sketched(512, 64, torch.empty(0))[:, :-1]
    assert signs.shape == (512, 128)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 0.02
    gram = signs.mT @ signs / 512
    assert float((gram - torch.eye(128)).abs().max()) < 0.25
    assert signs[0, :16].tolist() == FIRST_SIGNS


def test_frozen_columns_do_not_count():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4, 40, generator=generator, dtype=torch.float64)
    frozen = torch.arange(40) % 3 == 0
    structure = SharedBlock(4)
    state = state_of(structure, rows.mT @ rows, 3, "inverse")
    assert structure.refresh(state, Inversion(0.1), frozen)
    gradient = torch.randn(3, 40, generator=generator, dtype=torch.float64).masked_fill(frozen, 0.0)
    kept = rows[:, ~frozen].mT @ rows[:, ~frozen]
    damped = kept + 0.1 * kept.diagonal().mean() * torch.eye(len(kept), dtype=torch.float64)
    found = structure.precondition(state, gradient)[:, ~frozen]
    torch.testing.assert_close(found, gradient[:, ~frozen] @ torch.linalg.inv(damped), rtol=1e-6, atol=1e-8)


@forms
@given(st.data())
def test_it_is_exact_for_a_metric_of_low_rank(form, data):
    rank = data.draw(st.integers(1, 4), "rank")
    d = data.draw(st.integers(8 * rank, 10 * rank + 4), "d")
    out = data.draw(st.integers(1, 5), "out")
    groups = data.draw(st.sampled_from([(), (2,)]), "groups")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    metric = decaying(generator, groups, d, rank, 0.0)
    structure = SharedBlock(rank)
    state = state_of(structure, metric, out, form)
    damping = Inversion(0.1, pooled=False)
    assert structure.refresh(state, damping)
    gradient = torch.randn(*groups, out, d, generator=generator, dtype=torch.float64)
    epsilon = 0.1 * metric.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = metric + epsilon[..., None, None] * torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(
        structure.precondition(state, gradient), gradient @ torch.linalg.inv(damped), rtol=1e-8, atol=1e-8
    )


@forms
@given(st.integers(0, 2**31))
def test_elsewhere_it_is_off_by_little_more_than_the_other_eigenvalues_differ(form, seed):
    generator = torch.Generator().manual_seed(seed)
    d, rank, damping = 40, 5, 0.05
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    values = 0.7 ** torch.arange(d, dtype=torch.float64)
    metric = basis @ (values.unsqueeze(-1) * basis.mT)
    structure = SharedBlock(rank)
    state = state_of(structure, metric, d, form)
    assert structure.refresh(state, Inversion(damping))
    inverse = structure.precondition(state, torch.eye(d, dtype=torch.float64))
    epsilon = damping * values.mean()
    ratios = torch.linalg.eigvals(inverse @ (metric + epsilon * torch.eye(d, dtype=torch.float64))).real
    widest = (values[rank] + epsilon) / (values[-1] + epsilon)
    assert ratios.min() >= 0.5 / widest
    assert ratios.max() <= 2 * widest


def test_wide_outputs_of_kronecker_factors_take_it_too():
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = decaying(generator, (), 5, 2, 0.1), decaying(generator, (), 16, 2, 0.0)
    structure = KroneckerFactors(rank=2)
    state = state_of(structure, inputs, 16, "inverse", output=outputs)
    assert set(state) == {
        "metric",
        "inverse",
        "output",
        "output_inverse",
        "output_inverse_scale",
        "ema_weight",
        "updates",
    }
    assert structure.refresh(state, Inversion(0.01))
    gradient = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    left, right = (
        torch.linalg.inv(each + 0.1 * each.diagonal().mean() * torch.eye(len(each), dtype=torch.float64))
        for each in (outputs, inputs)
    )
    torch.testing.assert_close(structure.precondition(state, gradient), left @ gradient @ right, rtol=1e-7, atol=1e-7)


@forms
def test_an_untouched_state_and_an_empty_metric_are_the_identity(form):
    structure = SharedBlock(2)
    state = state_of(structure, torch.zeros(16, 16, dtype=torch.float64), 3, form)
    gradient = torch.randn(3, 16, dtype=torch.float64)
    assert torch.equal(structure.precondition(state, gradient), gradient)
    assert structure.refresh(state, Inversion(0.1))
    assert torch.equal(structure.precondition(state, gradient), gradient)


def test_fewer_samples_than_the_rank_are_enough():
    structure = SharedBlock(3)
    x = torch.ones(1, 24, dtype=torch.float64)
    batch = structure.batch_statistics(Samples(x, torch.zeros(1, 2, dtype=torch.float64), LinearGaussian()))
    state = state_of(structure, batch.totals["metric"], 2, "inverse")
    assert batch.totals["metric"].shape == (24, 7)
    assert structure.refresh(state, Inversion(0.1))
    expected = torch.linalg.inv(x.mT @ x + 0.1 * torch.eye(24, dtype=torch.float64))
    torch.testing.assert_close(structure.precondition(state, torch.eye(24, dtype=torch.float64)), expected)


@pytest.mark.parametrize(("value", "damping"), [(float("nan"), 0.1), (float("inf"), 0.1), (1.0, 0.0)])
def test_a_metric_without_an_inverse_leaves_the_last_one(value, damping):
    structure = SharedBlock(2)
    metric = torch.zeros(16, 16, dtype=torch.float64)
    metric[0, 0] = value
    state = state_of(structure, metric, 3, "inverse")
    before = {key: each.clone() for key, each in state.items() if "inverse" in key}
    assert not structure.refresh(state, Inversion(damping))
    assert all(torch.equal(state[key], each) for key, each in before.items())


def test_narrow_blocks_are_inverted_in_full():
    structure = SharedBlock(4)
    assert structure.declares((3, 31), root=False)["inverse"].shape == (31, 31)
    assert structure.label((3, 31)) == "shared"
    assert structure.label((3, 32)) == "shared, rank 4"
    assert NeuronBlocks().label((3, 32)) == "neuron"


@pytest.mark.parametrize("make", [SharedBlock, lambda rank: KroneckerFactors(rank=rank)])
def test_a_rank_is_positive(make):
    with pytest.raises(ValueError, match="rank must be"):
        make(0)
