"""Every structure keeps the same contract: gather, update, refresh, precondition, against dense matrices."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relfisher.responses import LinearGaussian, TanhBernoulli
from relfisher.structures import Damping, NeuronBlocks, SharedBlock, invert

STRUCTURES = {"neuron": (NeuronBlocks(), TanhBernoulli()), "shared": (SharedBlock(), LinearGaussian())}
kinds = pytest.mark.parametrize("kind", STRUCTURES)
sizes = st.tuples(st.integers(1, 12), st.integers(1, 4), st.integers(1, 5))


def samples(n, out, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, size, generator=generator, dtype=torch.float64) for size in (d, out)]


def state_of(structure, out, d, *, identity=False):
    return structure.create(torch.empty(out, d, dtype=torch.float64), out, d, identity=identity)


def dense(blocks, out):
    return torch.block_diag(*(blocks if blocks.ndim == 3 else [blocks] * out))


@kinds
@given(size=sizes)
def test_gather_is_the_summed_metric_of_the_batch(kind, size):
    structure, response = STRUCTURES[kind]
    n, out, d = size
    x, z = samples(n, out, d)
    expected = torch.zeros(out * d, out * d, dtype=torch.float64)
    for row, pre in zip(x, z, strict=True):
        nu = 1 - torch.tanh(pre) ** 2 if kind == "neuron" else torch.ones_like(pre)
        expected += torch.kron(torch.diag(nu), torch.outer(row, row))
    found = structure.gather(x, z, response)
    assert tuple(found.shape) == structure.shape(out, d)
    torch.testing.assert_close(dense(found, out), expected)


@kinds
@given(size=sizes, damping=st.floats(1e-3, 1.0), pooled=st.booleans(), per_parameter=st.booleans())
def test_precondition_is_the_damped_inverse_of_the_average(kind, size, damping, pooled, per_parameter):
    structure, response = STRUCTURES[kind]
    n, out, d = size
    state = state_of(structure, out, d)
    batches = [structure.gather(*samples(n, out, d, seed), response) for seed in range(3)]
    for batch in batches:
        assert structure.update(state, batch.clone(), n, 0.7)
    assert structure.refresh(state, Damping(damping, per_parameter, pooled))
    weights = torch.tensor([0.49, 0.7, 1.0], dtype=torch.float64)
    weights /= weights.sum()
    average = sum(weight * batch / n for weight, batch in zip(weights, batches, strict=True))
    blocks = average if average.ndim == 3 else average.expand(out, d, d)
    traces = torch.stack([torch.trace(block) for block in blocks])
    if pooled:
        traces = traces.mean().expand(out)
    added = damping * traces / (d if per_parameter else 1)
    gradient = samples(out, 1, d, seed=9)[0]
    eye = torch.eye(d, dtype=torch.float64)
    expected = [
        torch.linalg.solve(b + e * eye, g) for b, e, g in zip(blocks, added, gradient, strict=True)
    ]  # fmt: skip
    torch.testing.assert_close(structure.precondition(state, gradient), torch.stack(expected))


@kinds
def test_an_average_from_the_identity_keeps_its_full_weight(kind):
    structure, response = STRUCTURES[kind]
    state = state_of(structure, 2, 3, identity=True)
    batch = structure.gather(*samples(5, 2, 3), response)
    structure.update(state, batch.clone(), 5, 0.9)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(state["metric"], 0.9 * eye.expand_as(batch) + 0.1 * batch / 5)
    assert float(state["mass"]) == pytest.approx(1.0)


@kinds
def test_what_is_not_finite_is_left_out_of_the_average(kind):
    structure, response = STRUCTURES[kind]
    state = state_of(structure, 2, 3)
    batch = structure.gather(*samples(5, 2, 3), response)
    assert structure.update(state, batch.clone(), 5, 0.9)
    kept = state["metric"].clone()
    batch.view(-1)[0] = math.nan
    assert not structure.update(state, batch, 5, 0.9)
    assert torch.equal(state["metric"], kept)


@kinds
@pytest.mark.parametrize("ruin", [lambda metric: metric.neg_(), lambda metric: metric.fill_(math.nan)])
def test_a_failed_refresh_keeps_the_last_good_inverse(kind, ruin):
    structure, response = STRUCTURES[kind]
    state = state_of(structure, 2, 3)
    assert structure.refresh(state, Damping(0.1)), "nothing was gathered yet, and nothing is wrong"
    assert torch.equal(state["inverse"], torch.eye(3, dtype=torch.float64).expand_as(state["inverse"]))
    structure.update(state, structure.gather(*samples(5, 2, 3), response), 5, 0.9)
    assert structure.refresh(state, Damping(0.1))
    good = state["inverse"].clone()
    ruin(state["metric"])
    assert not structure.refresh(state, Damping(0.1))
    assert torch.equal(state["inverse"], good)


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_weights_keep_a_float32_state(kind, dtype):
    structure, _ = STRUCTURES[kind]
    state = structure.create(torch.empty(2, 3, dtype=dtype), 2, 3, identity=False)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_invert_reports_what_it_cannot_do():
    eye = torch.eye(3, dtype=torch.float64)
    inverse, good = invert(2 * eye, torch.tensor(2.0, dtype=torch.float64))
    assert good
    torch.testing.assert_close(inverse, eye / 4)
    assert not invert(-eye, torch.tensor(0.5, dtype=torch.float64))[1]
    assert not invert(torch.stack([eye, eye * math.nan]), torch.zeros(2, dtype=torch.float64))[1]
