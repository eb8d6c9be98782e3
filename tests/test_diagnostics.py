"""Section 4 as library calls: comparison of the relative with the global metric, and balance."""

import math

import pytest
import torch
from builders import inputs, mlp
from cases import assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize

from relfisher import (
    balance,
    compare,
    fisher,
    layer_metric,
    module_metric,
    relative_fisher,
    responses,
    unbalance,
)

BERNOULLI = responses.SigmoidBernoulli()


@given(n=st.integers(1, 12), seed=st.integers(0, 1000))
def test_ranks_keep_their_bounds_and_the_last_layers_agree(n: int, seed: int) -> None:
    model = mlp(sizes=(3, 4, 3, 1), seed=seed)
    rows = list(compare(model, inputs(n=n, width=3), BERNOULLI))
    assert [row.name for row in rows] == ["0", "2", "4"]
    assert [row.parameters for row in rows] == [16, 15, 4]
    for row, units in zip(rows, (4, 3, 1), strict=True):
        assert row.global_block.rank <= n
        assert row.relative.rank <= n * units
        assert row.relative.rank >= row.global_block.rank
    last = rows[-1]
    assert last.response == BERNOULLI
    assert last.relative.rank == last.global_block.rank
    assert last.relative.trace == pytest.approx(last.global_block.trace)
    assert last.relative.top == pytest.approx(last.global_block.top)


def test_numbers_are_those_of_the_metrics() -> None:
    model, x = mlp(sizes=(3, 4, 2)), inputs(n=9, width=3)
    row, _ = compare(model, x, responses.Categorical(), top=3)
    for spectrum, metric in (
        (row.relative, module_metric(model, "0", x)),
        (row.global_block, fisher(model, x, responses.Categorical(), ["0.weight", "0.bias"])),
    ):
        values = torch.linalg.eigvalsh(metric.to_dense()).flip(0)
        assert spectrum.rank == torch.linalg.matrix_rank(metric.to_dense(), hermitian=True)
        assert spectrum.trace == pytest.approx(float(metric.trace()))
        assert spectrum.top == pytest.approx(values[:3].tolist())
        assert spectrum.condition_number == pytest.approx(float(values[0] / values[spectrum.rank - 1]), rel=1e-4)


def test_a_dead_layer_has_rank_zero_and_no_condition() -> None:
    model = mlp(nn.ReLU, (3, 2, 1))
    nn.init.constant_(model[0].bias, -1e3)
    row, _ = compare(model, inputs(n=5, width=3), BERNOULLI)
    assert row.relative.rank == 0
    assert math.isnan(row.relative.condition_number)
    assert row.relative.top[0] == 0


def test_comparison_prints_as_a_table() -> None:
    lines = str(compare(mlp(sizes=(3, 4, 1)), inputs(n=5, width=3), BERNOULLI)).splitlines()
    assert lines[0].split() == ["layer", "D", "metric", "rank", "trace", "largest", "condition"]
    assert [line.split()[2] for line in lines[1:]] == ["RFIM", "FIM"] * 2
    assert {len(line) for line in lines} == {len(lines[0])}


def test_comparison_leaves_a_model_in_training_alone_and_knows_no_dropout() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double().train()
    x = inputs(n=6, width=3)
    first, second = (str(compare(model, x, BERNOULLI)) for _ in range(2))
    assert first == second
    assert model.training
    assert model[1].training


def in_phi(model: nn.Module, name: str, x: Tensor, response: responses.Response) -> Tensor:
    """Return the metric of a layer's phi by autodiff, through the parametrization: the layer alone is the subsystem."""
    layer = model.get_submodule(name)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    own = {key: value.detach() for key, value in layer.named_parameters()}
    z = lambda parameters: torch.func.functional_call(layer, parameters, (seen[0],))  # noqa: E731
    return relative_fisher(z, own, response).to_dense()


LAYERS = {"0": responses.TanhBernoulli(), "2": responses.TanhBernoulli(), "4": responses.Categorical()}


@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10))
def test_balance_makes_each_largest_eigenvalue_one(seed: int, scale: float) -> None:
    model, x = mlp(sizes=(3, 4, 3, 2), seed=seed), scale * inputs(n=7, width=3)
    before = model(x).detach()
    scales = balance(model, x, responses.Categorical())
    assert scales.keys() == LAYERS.keys()
    assert_close(model(x).detach(), before)
    for name, response in LAYERS.items():
        largest = torch.linalg.eigvalsh(in_phi(model, name, x, response))[-1]
        assert float(largest) == pytest.approx(1, rel=1e-9)


def test_unbalance_restores_the_parameters() -> None:
    model, x = mlp(sizes=(3, 4, 2)), inputs(n=7, width=3)
    names = [name for name, _ in model.named_parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    balance(model, x, responses.Categorical())
    assert [name for name, _ in model.named_parameters()] != names
    unbalance(model)
    assert [name for name, _ in model.named_parameters()] == names
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    for name, value in model.state_dict().items():
        assert_close(value, before[name])


def test_unbalance_keeps_what_training_has_reached() -> None:
    model, x = mlp(sizes=(3, 4, 2)), inputs(n=7, width=3)
    scales = balance(model, x, responses.Categorical())
    weight = model[0].weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = model(x).square().mean()
    slope = torch.autograd.grad(loss, model[0].parametrizations.weight.original, retain_graph=True)[0]
    loss.backward()
    optimizer.step()
    output = model(x).detach()
    unbalance(model)
    assert_close(model(x).detach(), output)
    assert_close(model[0].weight.detach(), weight - 0.5 * scales["0"] * slope)
    assert all(isinstance(parameter, nn.Parameter) for parameter in model.parameters())


def test_unbalance_leaves_other_parametrizations_alone() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    unbalance(model)
    assert parametrize.is_parametrized(model[1])


def test_what_is_balanced_cannot_be_balanced_or_compared() -> None:
    model, x = mlp(sizes=(3, 4, 2)), inputs(n=7, width=3)
    balance(model, x, responses.Categorical())
    for call in (balance, compare):
        with pytest.raises(ValueError, match="must not be parametrized, but 0, 2 is: call unbalance first"):
            call(model, x, responses.Categorical())


def test_a_zero_metric_cannot_be_balanced_and_leaves_the_model_alone() -> None:
    model = mlp(nn.ReLU, (3, 2, 1))
    nn.init.constant_(model[0].bias, -1e3)
    with pytest.raises(ValueError, match="the metric of '0' is zero on these inputs"):
        balance(model, inputs(n=5, width=3), BERNOULLI)
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


class Heads(nn.Module):
    """Two layers that could be the output, of which `join` makes it."""

    def __init__(self, join) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.main, self.other = (nn.Linear(3, 2, dtype=torch.float64) for _ in range(2))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.main(x), self.other(x))


OUTPUTS = {
    "the first": lambda main, _: main,
    "in another tensor": lambda main, _: main.clone(),
    "flattened": lambda main, _: main.reshape(2, 3, 2),
}


@pytest.mark.parametrize("join", OUTPUTS.values(), ids=OUTPUTS)
def test_the_response_is_that_of_the_layer_that_makes_the_output(join) -> None:
    model, x = Heads(join), inputs(n=6, width=3)
    main, other = compare(model, x, responses.Categorical())
    assert (main.response, other.response) == (responses.Categorical(), responses.LinearGaussian())
    assert main.relative.top == pytest.approx(main.global_block.top)
    assert other.global_block.trace == 0
    seen = torch.cat([x, torch.ones(6, 1).double()], dim=1)
    scales = balance(model, x, responses.Categorical())
    largest = torch.linalg.eigvalsh(module_metric(Heads(join), "main", x, responses.Categorical()).to_dense())[-1]
    assert scales["main"] == pytest.approx(float(largest) ** -0.5)
    assert scales["other"] == pytest.approx(float(torch.linalg.eigvalsh(seen.T @ seen / 6)[-1]) ** -0.5)


def test_of_equal_outputs_the_one_in_memory_counts() -> None:
    model = Heads(lambda main, _: main)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    main, other = compare(model, inputs(n=6, width=3), responses.Categorical())
    assert (main.response, other.response) == (responses.Categorical(), responses.LinearGaussian())


@pytest.mark.parametrize(
    "join",
    [
        lambda main, _: 10 * main,
        lambda main, other: main + other,
        lambda main, _: main.mul_(10),
        lambda main, _: main.T,
        lambda main, other: (main, other),
    ],
    ids=["scaled", "sum", "in place", "transposed", "both"],
)
@pytest.mark.parametrize("call", [balance, compare])
def test_an_output_that_no_layer_makes_is_refused(call, join) -> None:
    model = Heads(join)
    with pytest.raises(ValueError, match=r"model must return the output of a linear layer.*\('main', 'other'\)"):
        call(model, inputs(n=6, width=3), responses.Categorical())
    assert not any(parametrize.is_parametrized(module) for module in model.modules())


def test_the_last_call_of_a_layer_may_be_the_output() -> None:
    """The tanh of the first call, and the softmax of the second."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(torch.tanh(self.cell(x)))

    model, x = Twice(), inputs(n=6, width=3)
    second = torch.tanh(model.cell(x)).detach()
    weight, bias = model.cell.weight.detach(), model.cell.bias.detach()
    calls = ((x, responses.TanhBernoulli()), (second, responses.Categorical()))
    expected = sum(layer_metric(seen, weight, bias, response).to_dense() for seen, response in calls) / 2
    (row,) = compare(model, x, responses.Categorical())
    assert row.response == responses.Categorical()
    assert row.relative.trace == pytest.approx(float(expected.trace()))
    before = model(x).detach()
    balance(model, x, responses.Categorical())
    assert_close(model(x).detach(), before)


def tied(kind: str) -> nn.Module:
    model = mlp(sizes=(3, 3, 3))
    if kind == "weights":
        model[2].weight = model[0].weight
    elif kind == "biases":
        model[2].bias = model[0].bias
    else:
        model = nn.Sequential(nn.Embedding(3, 3), nn.Linear(3, 3)).double()
        model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("kind", "names"),
    [("weights", "0.weight and 2.weight"), ("biases", "0.bias and 2.bias"), ("embedding", "0.weight and 1.weight")],
)
@pytest.mark.parametrize("call", [balance, compare])
def test_tied_parameters_are_refused(call, kind: str, names: str) -> None:
    model = tied(kind)
    x = torch.tensor([0, 2]) if kind == "embedding" else inputs(n=6, width=3)
    before = model(x).detach()
    with pytest.raises(ValueError, match=f"model must not tie parameters, but these are one: {names}"):
        call(model, x, responses.Categorical())
    assert torch.equal(model(x), before)
