"""Parameters without a metric: they move as by the AdamW of torch, once, whatever their gradients are kept as."""

import copy

import pytest
import torch
from builders import assert_close_weights, batch, classified, mlp, normed_mlp, step
from torch import nn

from relfisher import RNGD, AdamWOptions, MetricOptions


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
