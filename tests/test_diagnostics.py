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

from relfisher import balance, compare, fisher, module_metric, relative_fisher, responses, unbalance

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
