"""Inverses by leading eigenvectors against dense ones, in float64."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from relfisher.responses import LinearGaussian
from relfisher.structures import Inversion, KroneckerFactors, NeuronBlocks, Samples, SharedBlock

forms = pytest.mark.parametrize("form", ["inverse", "root"])


def decaying(generator, groups, d, rank, rest):
    """Return symmetric matrices whose eigenvalues are in [1, 10] for `rank` directions and `rest` for all others."""
    basis = torch.linalg.qr(torch.randn(*groups, d, d, generator=generator, dtype=torch.float64))[0]
    values = torch.full((*groups, d), rest, dtype=torch.float64)
    values[..., :rank] = 1 + 9 * torch.rand(*groups, rank, generator=generator, dtype=torch.float64)
    return basis @ (values.unsqueeze(-1) * basis.mT)


def state_of(structure, metric, out, form, **others):
    groups, d = metric.shape[:-2], metric.shape[-1]
    weight = torch.zeros(*groups, out, d, dtype=torch.float64)
    state = structure.create(
        tuple(weight.shape), weight.dtype, torch.device("cpu"), identity=False, root=form == "root"
    )
    state["metric"].copy_(metric)
    for name, value in others.items():
        state[name].copy_(value)
    state["ema_weight"].fill_(1.0)
    return state


@forms
@given(st.data())
def test_it_is_exact_where_the_other_eigenvalues_are_alike(form, data):
    rank = data.draw(st.integers(1, 4), "rank")
    d = data.draw(st.integers(8 * rank, 10 * rank + 4), "d")
    out = data.draw(st.integers(1, 5), "out")
    groups = data.draw(st.sampled_from([(), (2,)]), "groups")
    rest = data.draw(st.sampled_from([0.0, 1e-3, 0.1]), "rest")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), "seed"))
    metric = decaying(generator, groups, d, rank, rest)
    structure = SharedBlock(rank)
    state = state_of(structure, metric, out, form)
    damping = Inversion(0.1, pooled=False)
    for _ in range(10):  # from one refresh to the next the eigenvectors become exact
        assert structure.refresh(state, damping)
    gradient = torch.randn(*groups, out, d, generator=generator, dtype=torch.float64)
    epsilon = 0.1 * metric.diagonal(dim1=-2, dim2=-1).mean(-1)
    damped = metric + epsilon[..., None, None] * torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(
        structure.precondition(state, gradient), gradient @ torch.linalg.inv(damped), rtol=1e-8, atol=1e-8
    )


@forms
@given(st.integers(0, 2**31))
def test_elsewhere_it_is_off_by_no_more_than_the_other_eigenvalues_differ(form, seed):
    generator = torch.Generator().manual_seed(seed)
    d, rank, damping = 40, 5, 0.05
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    values = 0.7 ** torch.arange(d, dtype=torch.float64)
    metric = basis @ (values.unsqueeze(-1) * basis.mT)
    structure = SharedBlock(rank)
    state = state_of(structure, metric, d, form)
    for _ in range(10):
        assert structure.refresh(state, Inversion(damping))
    inverse = structure.precondition(state, torch.eye(d, dtype=torch.float64))
    epsilon = damping * values.mean()
    ratios = torch.linalg.eigvals(inverse @ (metric + epsilon * torch.eye(d, dtype=torch.float64))).real
    widest = (values[rank] + epsilon) / (values[-1] + epsilon)
    assert ratios.min() >= 1 / widest - 1e-6
    assert ratios.max() <= widest + 1e-6


def test_wide_outputs_of_kronecker_factors_take_it_too():
    generator = torch.Generator().manual_seed(0)
    inputs, outputs = (decaying(generator, (), d, 2, 0.1) for d in (5, 16))
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
    for _ in range(6):
        structure.refresh(state, Inversion(0.01))
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
