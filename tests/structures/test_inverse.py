"""Inversion against dense matrices in float64: damping, power, rank, and which blocks are good."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from relfisher.responses import Categorical, LinearGaussian, TanhBernoulli
from relfisher.structures import Diagonal, Inversion, KroneckerFactors, NeuronBlocks, Samples, SharedBlock
from relfisher.structures.sketch import sketch
from relfisher.testing import check_structure

powers = st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0])
roots = pytest.mark.parametrize("root", [False, True])


def spd(seed, *shape):
    """Return random symmetric positive definite matrices."""
    x = torch.randn(*shape[:-1], shape[-1] + 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x @ x.mT


def powered(matrix, power):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.pow(power).unsqueeze(-2)) @ vectors.mT


@roots
@given(seed=st.integers(0, 1000), d=st.integers(1, 6), power=powers, damping=st.floats(1e-3, 2.0))
def test_full_factors_are_powers_of_the_damped_blocks(root, seed, d, power, damping):
    blocks = spd(seed, 2, d, d)
    inversion = Inversion(damping, power=power, relative_to="absolute")
    factor, good = inversion.full(blocks, inversion.amounts(blocks.diagonal(dim1=-2, dim2=-1)), root=root)
    assert bool(good.all())
    found = factor.mT @ factor if root else factor
    expected = powered(blocks + damping * torch.eye(d, dtype=torch.float64), -power)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@roots
@given(seed=st.integers(0, 1000), power=powers)
def test_diagonal_factors_are_powers_of_the_damped_entries(root, seed, power):
    blocks = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inversion = Inversion(0.1, power=power, pooled=False)
    amounts = inversion.amounts(blocks)
    factor, good = inversion.diagonal(blocks, amounts, root=root)
    assert bool(good.all())
    torch.testing.assert_close(factor.square() if root else factor, (blocks + amounts.unsqueeze(1)).pow(-power))


@roots
@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
def test_low_rank_factors_are_powers_for_a_metric_of_low_rank(root, power):
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64))[0]
    values = torch.tensor([9.0, 4.0, 2.0] + [0.0] * 21, dtype=torch.float64)
    blocks = basis @ (values.unsqueeze(1) * basis.T)
    inversion = Inversion(0.2, power=power, relative_to="absolute", rank=3)
    low, good = inversion.leading(sketch(blocks, 3), inversion.amounts(blocks.diagonal()), root=root)
    assert bool(good)
    dense = low.scale * (torch.eye(24, dtype=torch.float64) - low.basis @ low.basis.T)
    expected = basis @ ((values + 0.2).pow(-power).unsqueeze(1) * basis.T)
    torch.testing.assert_close(dense @ dense if root else dense, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("relative_to", "pooled", "expected"),
    [
        ("mean", True, [0.25, 0.25]),
        ("mean", False, [0.1, 0.4]),
        ("trace", True, [0.5, 0.5]),
        ("trace", False, [0.2, 0.8]),
        ("absolute", True, [0.1, 0.1]),
    ],
)
def test_units_of_the_damping(relative_to, pooled, expected):
    diagonals = torch.tensor([[1.0, 1.0], [3.0, 5.0]], dtype=torch.float64)
    amounts = Inversion(0.1, relative_to=relative_to, pooled=pooled).amounts(diagonals)
    torch.testing.assert_close(amounts, torch.tensor(expected, dtype=torch.float64))


def test_a_block_that_fails_keeps_its_factor_and_no_other():
    structure, z = NeuronBlocks(), torch.zeros(8, 3, dtype=torch.float64)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    state = structure.create((3, 2), torch.float64, torch.device("cpu"), identity=False, root=False)
    structure.ema_update_from(state, Samples(x, z, TanhBernoulli()), 0.9)
    assert structure.refresh(state, Inversion(0.1))
    before = state["inverse"].clone()
    state["metric"].mul_(4.0)
    state["metric"][1] = -torch.eye(2, dtype=torch.float64)
    assert not structure.refresh(state, Inversion(0.1, relative_to="absolute"))
    assert torch.equal(state["inverse"][1], before[1])
    weight, eye = float(state["ema_weight"]), torch.eye(2, dtype=torch.float64)
    for place in (0, 2):
        expected = torch.linalg.inv(state["metric"][place] / weight + 0.1 * eye)
        torch.testing.assert_close(state["inverse"][place], expected)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_block_that_is_not_finite_is_not_good(power):
    blocks = torch.eye(2, dtype=torch.float64).repeat(2, 1, 1)
    blocks[1, 0, 0] = math.nan
    _, good = Inversion(0.1, power=power).full(blocks, torch.full((2,), 0.1, dtype=torch.float64), root=False)
    assert good.tolist() == [True, False]


STRUCTURES = [SharedBlock(), NeuronBlocks(), Diagonal(), KroneckerFactors(), SharedBlock(2)]


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda each: each.label((3, 16)))
@pytest.mark.parametrize("response", [TanhBernoulli(), LinearGaussian(2.0)], ids=["tanh", "linear"])
def test_structures_of_the_library_pass_their_check(structure, response):
    check_structure(structure, response, d=16 if structure.rank else 5)


def test_a_softmax_head_passes_its_check():
    check_structure(KroneckerFactors(Categorical()))
