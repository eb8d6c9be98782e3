"""Each kind of information as an operator: products, diagonals and matrices agree, and are what they stand for."""

from dataclasses import replace

import pytest
import reference
import torch
from cases import BERNOULLI, GAUSSIAN, RESPONSES, Problem, assert_close, problem, problems
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from relfisher import information, responses
from relfisher.information import Information

KINDS = (
    "isotropic",
    "diagonal",
    "softmax",
    "pulled back",
    "pulled back softmax",
    "pulled back linear",
    "pulled back twice",
    "joined",
    "joined units",
)


def make(kind: str, given_problem: Problem) -> Information:
    """Return an information over the problem's [n, out] units."""
    z, weight = given_problem.z, given_problem.next_weight
    following = torch.tanh(z) @ weight.T + given_problem.next_bias
    slope = 1 - torch.tanh(z).square()
    through = information.Diagonal(torch.sigmoid(following))
    rest, sizes = replace(given_problem, x=given_problem.x[1:]), (1, len(z) - 1)
    match kind:
        case "isotropic":
            return information.Isotropic(2.5, z)
        case "diagonal":
            return information.Diagonal(z.square())
        case "softmax":
            return information.Softmax(torch.softmax(z, -1))
        case "pulled back":
            return information.PulledBack(through, weight, slope)
        case "pulled back softmax":
            return information.PulledBack(information.Softmax(torch.softmax(following, -1)), weight, slope)
        case "pulled back linear":
            return information.PulledBack(information.Isotropic(0.5, following), weight, slope)
        case "joined":
            return information.Joined((information.Softmax(torch.softmax(z[:1], -1)), make("diagonal", rest)), sizes)
        case "joined units":
            return information.Joined((information.Isotropic(2.5, z[:1]), make("diagonal", rest)), sizes)
    turn = weight.T @ weight + torch.eye(z.shape[1], dtype=z.dtype)
    return information.PulledBack(information.PulledBack(through, weight, slope), turn, slope)


@pytest.mark.parametrize("kind", KINDS)
@given(given_problem=problems())
def test_operations_agree_with_the_matrices(kind: str, given_problem: Problem) -> None:
    operator, z = make(kind, given_problem), given_problem.z
    dense = operator.dense()
    assert operator.out == z.shape[1]
    assert dense.shape == (*z.shape, z.shape[1])
    assert_close(operator.diagonal(), dense.diagonal(dim1=-2, dim2=-1))
    assert_close(operator.total(), dense.sum(0))
    for field in (z, torch.stack([z, z.cos(), 2 * z])):
        assert_close(operator.apply(field), torch.einsum("nij,...nj->...ni", dense, field))
    if operator.is_diagonal:
        assert torch.equal(dense, torch.diag_embed(dense.diagonal(dim1=-2, dim2=-1)))


@pytest.mark.parametrize("kind", KINDS)
@given(given_problem=problems())
def test_matrices_are_symmetric_and_positive_semi_definite(kind: str, given_problem: Problem) -> None:
    dense = make(kind, given_problem).dense()
    assert_close(dense, dense.mT)
    assert torch.linalg.eigvalsh(dense).min() >= -1e-12 * dense.abs().max()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@given(gap=st.floats(5, 36), seed=st.integers(0, 1000))
def test_a_softmax_that_is_all_but_certain_keeps_its_information(kind: torch.dtype, gap: float, seed: int) -> None:
    """Every entry against diag(A 1) - A of the off-diagonal products A, which have no difference close to 1."""
    z = torch.randn(20, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    z[torch.arange(20), torch.arange(20) % 6] += gap
    z = z.to(kind)
    powers = torch.exp(z.double() - z.double().amax(-1, keepdim=True))
    eta = powers / powers.sum(-1, keepdim=True)
    pairs = eta.unsqueeze(-1) * eta.unsqueeze(-2) * (1 - torch.eye(6, dtype=torch.float64))
    exact = torch.diag_embed(pairs.sum(-1)) - pairs
    operator = responses.Categorical().operator(z)
    columns = operator.apply(torch.eye(6, dtype=kind).unsqueeze(1).expand(6, 20, 6)).permute(1, 2, 0)
    shifted = operator.apply(torch.eye(6, dtype=kind).unsqueeze(1).expand(6, 20, 6) + 2).permute(1, 2, 0)
    diagonal = exact.diagonal(dim1=-2, dim2=-1)
    rtol = 1e3 * torch.finfo(kind).eps  # of which a hundred are due to exp
    for near, wanted in (
        (operator.dense(), exact), (operator.total(), exact.sum(0)), (operator.diagonal(), diagonal),
        (columns, exact), (shifted, exact), (responses.Categorical().information(z), exact),
    ):  # fmt: skip
        torch.testing.assert_close(near.double(), wanted, rtol=rtol, atol=0)
    assert (torch.linalg.eigvalsh(columns.double()).amin(-1) >= -rtol * diagonal.amax(-1)).all()


@pytest.mark.parametrize("name", ["tanh", "softmax", "linear"])
@given(given_problem=problems())
def test_pulled_back_is_the_information_about_the_hidden_pre_activation(name: str, given_problem: Problem) -> None:
    response, density = RESPONSES[name]
    weight, bias = given_problem.next_weight, given_problem.next_bias
    hidden = lambda z: weight @ torch.tanh(z) + bias  # noqa: E731
    z = given_problem.z
    following = response.operator(torch.stack([hidden(row) for row in z]))
    found = information.PulledBack(following, weight, 1 - torch.tanh(z).square()).dense()
    for matrix, row in zip(found, z, strict=True):
        outer, _ = reference.expectations(lambda point, _: hidden(point), density, row, row.new_zeros(1, 1))
        assert_close(matrix, outer)


def test_each_response_has_the_cheapest_kind_that_is_exact() -> None:
    z: Tensor = problem().z
    kinds = {name: type(response.operator(z)) for name, (response, _) in RESPONSES.items()}
    assert kinds.pop("linear") is information.Isotropic
    assert kinds.pop("softmax") is information.Softmax
    assert set(kinds) == set(BERNOULLI | GAUSSIAN) - {"linear"}
    assert set(kinds.values()) == {information.Diagonal}


@pytest.mark.parametrize("gap", [3.0, 12.0, 40.0])
def test_overlaps_of_softmax_units_that_are_all_but_certain(gap: float) -> None:
    z = torch.tensor([[gap, 0, -1], [0, gap, 0.5], [gap + 1, 1, 0]], dtype=torch.float64)
    difference = torch.tensor([[1.0, -1, 0], [1, 0, -1], [0, 1, -1]], dtype=torch.float64)
    eta = torch.softmax(z, -1)
    pairs = torch.stack([eta[:, 0] * eta[:, 1], eta[:, 0] * eta[:, 2], eta[:, 1] * eta[:, 2]], -1)
    matrices = torch.einsum("np,pi,pj->nij", pairs, difference, difference)
    softmax = responses.Categorical().operator(z)
    expected = torch.einsum("nij,mij->nm", matrices, matrices)
    torch.testing.assert_close(softmax.overlaps(softmax), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("outlier", [0.0, 3000.0])
@pytest.mark.parametrize("bias", [0.0, 12.0])
def test_a_shift_of_all_classes_does_not_change_what_is_pulled_back(outlier: float, bias: float) -> None:
    """The weights are multiples of 1/16, so that the shift is exact in float32."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-16, 17, (4, 3), generator=generator).double() / 16
    weight[3] += outlier
    slope = torch.rand(6, 3, generator=generator)
    eta = torch.softmax(torch.tensor([bias, 0, 0, -20]), -1).expand(6, 4)
    pairs = torch.outer(eta[0].double(), eta[0].double()).fill_diagonal_(0)
    matrix = torch.diag(pairs.sum(0)) - pairs
    columns = slope.double().unsqueeze(1) * weight
    expected = columns.mT @ matrix @ columns
    shifted = information.PulledBack(information.Softmax(eta), (weight + 4096).float(), slope)
    torch.testing.assert_close(shifted.dense().double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    diagonal = expected.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(shifted.diagonal().double(), diagonal, rtol=1e-4, atol=0)
    applied = shifted.apply(torch.eye(3).unsqueeze(1).expand(3, 6, 3)).permute(1, 2, 0).double()
    torch.testing.assert_close(applied, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
