"""Every structure keeps the same contract: statistics, average, factors, application, against dense matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relfisher.layers import LinearLayer
from relfisher.responses import Categorical, LinearGaussian, TanhBernoulli
from relfisher.structures import Diagonal, Inversion, KroneckerFactors, NeuronBlocks, Samples, SharedBlock

NEXT = nn.Linear(4, 3).double()
STRUCTURES = {
    "neuron": (NeuronBlocks(), TanhBernoulli()),
    "shared": (SharedBlock(), LinearGaussian()),
    "diagonal": (Diagonal(), LinearGaussian()),
    "kronecker": (KroneckerFactors(), TanhBernoulli()),
    "softmax": (KroneckerFactors(Categorical()), LinearGaussian()),
    "two-layer": (KroneckerFactors(through=NEXT), TanhBernoulli()),
}
kinds = pytest.mark.parametrize("kind", STRUCTURES)
forms = pytest.mark.parametrize("form", ["inverse", "root"])
RELATIVE = st.sampled_from(["mean", "trace", "absolute"])
sizes = st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5))
groups = st.sampled_from([(), (1,), (3,)])


def shape_of(kind, out, d):
    """Return the shape of a layer that this kind is for: two layers with 4 inputs of the next, two classes or more."""
    return ({"two-layer": 4, "softmax": out + 1}.get(kind, out), d)


def samples(shape, n, seed=0):
    """Return inputs and pre-activations of n samples."""
    *groups, out, d = shape
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*groups, n, size, generator=generator, dtype=torch.float64) for size in (d, out)]


def state_of(structure, shape, form="inverse", identity=False):
    return structure.create(shape, torch.float64, torch.device("cpu"), identity=identity, root=form == "root")


def information(kind, z):
    """Return the matrices F_n that a kind stands for, written out."""
    if kind == "softmax":
        eta = torch.softmax(z, -1)
        return torch.diag_embed(eta) - eta.unsqueeze(-1) * eta.unsqueeze(-2)
    slope = 1 - torch.tanh(z) ** 2
    if kind == "two-layer":
        jacobian = NEXT.weight.detach() * slope.unsqueeze(-2)
        return jacobian.mT @ jacobian
    if kind in ("shared", "diagonal"):
        return torch.eye(z.shape[-1], dtype=z.dtype).expand(*z.shape, -1)
    return torch.diag_embed(slope)


def dense(kind, x, z):
    """Return the factors of the mean metric of one group: one matrix for exact kinds, (outputs, inputs) for two."""
    matrices = information(kind, z)
    if kind in ("shared", "neuron", "diagonal"):
        pairs = zip(matrices, x, strict=True)
        found = sum(torch.kron(each, torch.outer(row, row)) for each, row in pairs) / len(x)
        return (torch.diag(found.diagonal()) if kind == "diagonal" else found,)
    return matrices.mean(0), x.T @ x / len(x)


@kinds
@forms
@given(size=sizes, groups=groups, damping=st.floats(1e-2, 1.0), pooled=st.booleans(), unit=RELATIVE)
def test_precondition_is_the_damped_inverse_of_the_average(kind, form, size, groups, damping, pooled, unit):
    """Over three batches with decay 0.7, against dense matrices, a group at a time."""
    structure, response = STRUCTURES[kind]
    inversion = Inversion(damping, relative_to=unit, pooled=pooled)
    n, out, d = size
    shape = (*groups, *shape_of(kind, out, d))
    state = state_of(structure, shape, form=form)
    batches = [samples(shape, n, seed) for seed in range(3)]
    for x, z in batches:
        batch = structure.batch_statistics(Samples(x, z, response))
        assert batch.samples == n
        assert {name: tuple(total.shape) for name, total in batch.totals.items()} == structure.shapes(shape)
        assert structure.ema_update(state, batch, 0.7)
    assert structure.refresh(state, inversion)
    weights = torch.tensor([0.49, 0.7, 1.0], dtype=torch.float64)
    weights /= weights.sum()
    averages = []  # of each group
    for group in range(math.prod(groups)):
        parts = [
            dense(kind, *(each[group] if groups else each for each in batch)) for batch in batches
        ]  # fmt: skip
        averages.append([
            sum(w * part[factor] for w, part in zip(weights, parts, strict=True)) for factor in range(len(parts[0]))
        ])  # fmt: skip
    gradient = samples(shape, shape[-2], seed=9)[0]
    found = structure.precondition(state, gradient)
    expected = [
        solve(factors, averages, each, inversion)
        for factors, each in zip(averages, gradient if groups else [gradient], strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(expected) if groups else expected[0], rtol=1e-7, atol=1e-9)


def solve(factors, averages, gradient, damping):
    """Return the damped solve for one group; a trace is averaged over all blocks of all groups where it is pooled."""
    out, d = gradient.shape

    def added(matrix, every, size):
        def per_block(each):
            return each.diagonal().reshape(-1, size).sum(1)

        traces = per_block(matrix)
        if damping.relative_to == "absolute":
            traces = torch.ones_like(traces)
        elif damping.pooled:
            traces = torch.cat([per_block(each) for each in every]).mean().expand(traces.shape)
        value = damping.damping if len(factors) == 1 else math.sqrt(damping.damping)
        return torch.diag((traces * (value / size if damping.relative_to == "mean" else value)).repeat_interleave(size))

    if len(factors) == 1:
        damped = factors[0] + added(factors[0], [each[0] for each in averages], d)
        return torch.linalg.solve(damped, gradient.reshape(-1)).reshape(out, d)
    outputs, inputs = (
        factor + added(factor, [each[place] for each in averages], len(factor)) for place, factor in enumerate(factors)
    )
    return torch.linalg.solve(torch.kron(outputs, inputs), gradient.reshape(-1)).reshape(out, d)


@kinds
@given(size=sizes)
def test_whitening_twice_is_the_inverse(kind, size):
    """R'R = (G + damping)^-1, and its two halves are each other's transposes."""
    structure, response = STRUCTURES[kind]
    n, out, d = size
    shape = shape_of(kind, out, d)
    state, other = state_of(structure, shape, form="root"), state_of(structure, shape)
    for each in (state, other):
        structure.ema_update(each, structure.batch_statistics(Samples(*samples(shape, n), response)), 0.9)
        structure.refresh(each, Inversion(0.1))
    u, v = (samples(shape, shape[0], seed)[0] for seed in (1, 2))
    torch.testing.assert_close(structure.precondition(state, u), structure.precondition(other, u))
    left, right = torch.sum(structure.whiten(state, u) * v), torch.sum(u * structure.unwhiten(state, v))
    torch.testing.assert_close(left, right)


@kinds
@given(size=sizes, frozen=st.integers(0, 4))
def test_frozen_columns_are_no_part_of_the_metric(kind, size, frozen):
    """The others move as if the layer had been without them."""
    structure, response = STRUCTURES[kind]
    n, out, d = size
    shape = shape_of(kind, out, d)
    stays = torch.arange(d) == frozen
    x, z = samples(shape, n)
    state = state_of(structure, shape)
    structure.ema_update(state, structure.batch_statistics(Samples(x, z, response)), 0.9)
    assert structure.refresh(state, Inversion(0.1), stays if bool(stays.any()) else None)
    gradient = samples(shape, shape[0], seed=3)[0].masked_fill(stays, 0.0)
    found = structure.precondition(state, gradient)[:, ~stays]
    if bool((~stays).any()):
        small = state_of(structure, (shape[0], int((~stays).sum())))
        structure.ema_update(small, structure.batch_statistics(Samples(x[:, ~stays], z, response)), 0.9)
        structure.refresh(small, Inversion(0.1))
        torch.testing.assert_close(found, structure.precondition(small, gradient[:, ~stays]))


@kinds
@given(size=sizes, groups=groups)
def test_adding_samples_is_adding_their_statistics(kind, size, groups):
    structure, response = STRUCTURES[kind]
    n, out, d = size
    shape = (*groups, *shape_of(kind, out, d))
    state, other = state_of(structure, shape), state_of(structure, shape)
    for seed in range(2):
        x, z = samples(shape, n, seed)
        assert structure.ema_update(state, structure.batch_statistics(Samples(x, z, response)), 0.7)
        assert structure.ema_update_from(other, Samples(x, z, response), 0.7)
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(other[name], value)


@kinds
@pytest.mark.parametrize("ruined", [math.nan, math.inf, 1e200])
def test_samples_without_a_finite_sum_are_not_added(kind, ruined):
    structure, response = STRUCTURES[kind]
    shape = shape_of(kind, 2, 3)
    state = state_of(structure, shape)
    x, z = samples(shape, 5)
    assert structure.ema_update_from(state, Samples(x, z, response), 0.9)
    kept = {name: value.clone() for name, value in state.items()}
    x[0, 0] = ruined
    assert not structure.ema_update_from(state, Samples(x, z, response), 0.9)
    assert all(torch.equal(state[name], value) for name, value in kept.items())


@kinds
def test_an_average_from_the_identity_keeps_its_full_weight(kind):
    structure, response = STRUCTURES[kind]
    shape = shape_of(kind, 2, 3)
    state = state_of(structure, shape, identity=True)
    batch = structure.batch_statistics(Samples(*samples(shape, 5), response))
    start = {name: state[name].clone() for name in batch.totals}
    structure.ema_update(state, batch, 0.9)
    for name, total in batch.totals.items():
        torch.testing.assert_close(state[name], 0.9 * start[name] + 0.1 * total / 5)
    assert float(state["ema_weight"]) == pytest.approx(1.0)


@kinds
def test_what_is_not_finite_is_left_out_of_the_average(kind):
    structure, response = STRUCTURES[kind]
    shape = shape_of(kind, 2, 3)
    state = state_of(structure, shape)
    batch = structure.batch_statistics(Samples(*samples(shape, 5), response))
    assert structure.ema_update(state, batch, 0.9)
    kept = state["metric"].clone()
    batch.totals["metric"].view(-1)[0] = math.nan
    assert not structure.ema_update(state, batch, 0.9)
    assert torch.equal(state["metric"], kept)


@kinds
@forms
@pytest.mark.parametrize("ruin", [lambda metric: metric.neg_(), lambda metric: metric.fill_(math.nan)])
def test_a_failed_refresh_keeps_the_last_good_inverse(kind, form, ruin):
    structure, response = STRUCTURES[kind]
    shape = shape_of(kind, 2, 3)
    state = state_of(structure, shape, form=form)
    start = state[form].clone()
    assert structure.refresh(state, Inversion(0.1)), "nothing was gathered yet, and nothing is wrong"
    assert torch.equal(state[form], start)
    structure.ema_update(state, structure.batch_statistics(Samples(*samples(shape, 5), response)), 0.9)
    assert structure.refresh(state, Inversion(0.1))
    good = {name: value.clone() for name, value in state.items() if name.endswith(form)}
    ruin(state["metric"])
    assert not structure.refresh(state, Inversion(0.1))
    assert all(torch.equal(state[name], value) for name, value in good.items())


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_weights_keep_a_float32_state(kind, dtype):
    structure, _ = STRUCTURES[kind]
    layer = LinearLayer.found_in("", nn.Linear(2, 3, dtype=dtype))[0]
    state = structure.create((2, 3), layer.dtype, torch.device("cpu"), identity=False, root=False)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@kinds
def test_numbers_are_those_of_the_state(kind):
    structure, _ = STRUCTURES[kind]
    for shape in [(2, 3), (4, 2, 3)]:
        state = state_of(structure, shape)
        assert structure.numbers(shape) + 2 == sum(tensor.numel() for tensor in state.values())


def test_kronecker_factors_have_one_source_of_what_the_outputs_say():
    with pytest.raises(ValueError, match="response or through"):
        KroneckerFactors(Categorical(), nn.Linear(2, 2))
