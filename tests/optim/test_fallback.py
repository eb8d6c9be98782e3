"""Parameters without a metric: they move as by the AdamW of torch, once, whatever their gradients are kept as."""

import copy
import warnings

import pytest
import torch
from builders import assert_close_weights, assert_same_weights, batch, classified, mlp, normed_mlp, step
from torch import nn

from relfisher import RNGD, AdamWOptions, MetricOptions
from relfisher.optim import UncoveredWarning


@pytest.mark.parametrize(("decay", "betas"), [(0.0, (0.9, 0.999)), (0.1, (0.5, 0.9))], ids=["plain", "decayed"])
def test_parameters_without_a_metric_are_trained_by_adamw(decay, betas):
    model = normed_mlp()
    twin = copy.deepcopy(model)
    optimizer = RNGD(
        model,
        weight_decay=decay,
        metric=MetricOptions(structure={"LayerNorm": "fallback"}),
        fallback=AdamWOptions(lr=0.01, betas=betas),
    )
    adamw = torch.optim.AdamW(twin[2].parameters(), lr=0.01, betas=betas, weight_decay=decay)
    for seed in range(5):
        for mine, theirs in ((model, optimizer), (twin, adamw)):
            step(mine, theirs, batch(seed), classified)
        twin[0].load_state_dict(model[0].state_dict())
        twin[3].load_state_dict(model[3].state_dict())
        assert_close_weights(model[2], twin[2])


def test_a_model_that_is_left_to_the_fallback_is_trained_by_adamw_alone():
    model, twin = mlp(), mlp()
    optimizer = RNGD(
        model,
        averaging=0.0,
        weight_decay=0.0,
        metric=MetricOptions(structure="fallback"),
        fallback=AdamWOptions(lr=0.02),
    )
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.0)
    for seed in range(5):
        assert step(model, optimizer, batch(seed), classified) == pytest.approx(
            step(twin, adamw, batch(seed), classified)
        )
    assert_close_weights(model, twin)


def test_tied_weights_are_trained_by_the_fallback_and_not_twice():
    model = mlp(sizes=(6, 6, 6))
    model[2].weight = model[0].weight
    twin = copy.deepcopy(model)
    optimizer = RNGD(model, averaging=0.0, weight_decay=0.0, fallback=AdamWOptions(lr=0.01))
    params = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(params) == len(set(params)) == 3
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    for seed in range(3):
        step(model, optimizer, batch(seed), classified)
        step(twin, adamw, batch(seed), classified)
    assert_close_weights(model, twin)


@pytest.mark.parametrize("structure", ["auto", {"Embedding": "fallback"}])
def test_sparse_gradients_move_as_dense_ones_do(structure):
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 2)).double()
        optimizer = RNGD(model, metric=MetricOptions(structure=structure))
        for tokens in ([1, 2], [2, 2], [4, 1]):
            optimizer.zero_grad()
            (model(torch.tensor(tokens)) - 1).square().sum().backward()
            optimizer.step()
        ends.append(model[0].weight.detach())
    torch.testing.assert_close(*ends)


class Scale(nn.Module):
    """What a model library calls a norm: a parameter, and no metric."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6, dtype=torch.float64))

    def forward(self, x):
        return x * self.weight


class Own(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Mixture(nn.Module):
    """Tables with limits that have no metric, next to layers that have one."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(12, 6, max_norm=9.0, dtype=torch.float64) for _ in range(4))
        self.bags = nn.EmbeddingBag(24, 6, mode="max", dtype=torch.float64)
        self.own, self.head = Own(6, 6).double(), nn.Linear(6, 3).double()

    def forward(self, x):
        places = torch.arange(len(x)) % 12
        for table in self.tables:
            x = x + table(places)
        return self.head(self.own(x + self.bags(places[:, None])))


def uncovered(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UncoveredWarning)
        make()
    return [str(each.message) for each in caught if each.category is UncoveredWarning]


def test_what_adamw_trains_for_want_of_a_metric_is_said_once():
    model = Mixture()

    def run():
        optimizer = RNGD(model)
        for seed in range(3):
            step(model, optimizer, batch(seed), classified)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})

    first, second = uncovered(run)
    assert first.startswith("AdamW trains 5 of 9 parameters, 87.3 % of all numbers, for want of a metric. ")
    limited = (
        "4 of Embedding (tables.0.weight, tables.1.weight, tables.2.weight, ...) and 1 of EmbeddingBag (bags.weight)"
    )
    assert f"{limited}: its module has no metric of its own. " in first
    assert "register_layer" in first
    assert "1 of no module (of shape [3]): not a parameter of the model" in second


def test_a_small_share_is_not_said():
    model = nn.Sequential(Scale(), nn.Linear(6, 200), nn.Linear(200, 3)).double()
    assert not uncovered(lambda: RNGD(model))


def test_more_than_the_largest_share_is_an_error_before_anything_is_changed():
    model = Mixture()
    with pytest.raises(ValueError, match=r"max_share is 0.8, but AdamW would train 5 of 9 parameters, 87.3 %"):
        RNGD(model, fallback=AdamWOptions(max_share=0.8))
    RNGD(model, fallback=AdamWOptions(max_share=0.88))
    RNGD(mlp(), fallback=AdamWOptions(max_share=0.0), metric=MetricOptions(structure="fallback"))
    with pytest.raises(ValueError, match=r"fallback\.max_share must lie in .* got 2"):
        AdamWOptions(max_share=2)


def test_more_than_the_largest_share_at_the_first_step_is_an_error_before_anything_is_changed():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Parameter(torch.ones(5, 6)), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(torch.tanh(x + self.table.softmax(0)[0]))

    model = Elsewhere().double()
    optimizer = RNGD(model, fallback=AdamWOptions(max_share=0.5))
    before = copy.deepcopy(model)
    with pytest.warns(UncoveredWarning, match="no metric for some layers: table"):
        model(batch(0)[0]).sum().backward()
    with pytest.raises(
        ValueError, match=r"AdamW would train 1 of 3 parameters, 58.8 % .*Elsewhere \(table\): its module"
    ):
        optimizer.step()
    assert_same_weights(model, before)


def test_what_is_left_to_adamw_on_purpose_is_not_said():
    model = mlp()
    assert not uncovered(lambda: RNGD(model, metric=MetricOptions(structure="fallback")))
    frozen = Mixture()
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(name.startswith("head"))
    assert not uncovered(lambda: RNGD(frozen))
    model = Mixture()
    assert not uncovered(lambda: RNGD(model, params=model.head.parameters()))
