"""Which passes count: pieces of a batch are the batch, and what never flows back is no sample."""

import warnings

import pytest
import torch
from builders import (
    KINDS,
    assert_close_weights,
    assert_same_weights,
    batch,
    classified,
    every_kind,
    inputs,
    mlp,
    predicted,
    sentences,
    squares,
    step,
    train,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from relfisher import RNGD, MetricOptions, TrustRegion
from relfisher.observe import ResponseWarning


@pytest.mark.supports("accumulated gradients equal the large batch", *KINDS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_accumulated_gradients_equal_the_large_batch(reduction):
    """Four passes of 3 samples are one of 12; batch norm in evaluation mode, since its batches differ."""
    whole, pieces = every_kind(), every_kind()
    options = {"step_rule": TrustRegion(1e-3)}
    one, two = RNGD(whole, **options), RNGD(pieces, **options)
    for model in (whole, pieces):
        model.eval()
    for seed in range(8):
        tokens = sentences(seed, 12)
        for model, optimizer, batches in ((whole, one, [tokens]), (pieces, two, tokens.split(3))):
            optimizer.zero_grad()
            for x in batches:
                loss = predicted(model, x, reduction)
                (loss / len(batches) if reduction == "mean" else loss).backward()
            optimizer.step()
        assert_close_weights(whole, pieces, rtol=1e-8, atol=1e-10)


def test_gradient_accumulation_equals_the_large_batch():
    one, two = mlp(), mlp()
    large, small = RNGD(one), RNGD(two)
    x, y = batch(n=12)
    for _ in range(3):
        step(one, large, (x, y), classified)
        small.zero_grad()
        for rows in (slice(0, 8), slice(8, 12)):
            (nn.functional.cross_entropy(two(x[rows]), y[rows], reduction="sum") / 12).backward()
        small.step()
    assert_close_weights(one, two, rtol=1e-10, atol=1e-12)


def test_two_forward_passes_before_the_gradients_flow():
    model, twin = mlp(), mlp()
    optimizer, other = RNGD(model), RNGD(twin)
    x, y = batch()
    halves = [classified(model, each) for each in ((x[:8], y[:8]), (x[8:], y[8:]))]
    (sum(halves) / 2).backward()
    optimizer.step()
    step(twin, other, (x, y), classified)
    assert_close_weights(model, twin)


def test_forwards_without_training_do_not_count():
    model, twin = mlp(nn.ReLU), mlp(nn.ReLU)
    optimizer, other = (
        RNGD(model, metric=MetricOptions(stats_interval=1)),
        RNGD(twin, metric=MetricOptions(stats_interval=1)),
    )
    train(model, optimizer, 2)
    for seed in range(2):
        other.zero_grad()
        with torch.no_grad():
            twin(100 * inputs())
        twin.eval()
        twin(100 * inputs())
        twin.train()
        classified(twin, batch(seed)).backward()
        other.step()
    assert_same_weights(model, twin)


def test_a_pass_without_a_backward_pass_does_not_count():
    model, twin = mlp(), mlp()
    optimizer, other = (
        RNGD(model, metric=MetricOptions(stats_interval=1)),
        RNGD(twin, metric=MetricOptions(stats_interval=1)),
    )
    for seed in range(3):
        optimizer.zero_grad()
        model(inputs() * float("nan"))  # the user saw the NaN and left the batch out
        squares(model, inputs(seed)).backward()
        model(100 * inputs())
        optimizer.step()
        step(twin, other, inputs(seed))
        assert torch.equal(optimizer.state[model[0].weight]["metric"], other.state[twin[0].weight]["metric"])
    assert_same_weights(model, twin)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_passes_count_once(reentrant):
    plain, saving = mlp(), mlp()
    one = RNGD(plain, metric=MetricOptions(stats_interval=1))
    two = RNGD(saving, metric=MetricOptions(stats_interval=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResponseWarning)  # reentrant: the layers run outside the forward pass
        for seed in range(3):
            x = inputs(seed).requires_grad_()
            for model, optimizer in ((plain, one), (saving, two)):
                optimizer.zero_grad()
                h = model[:4](x) if model is plain else checkpoint(model[:4], x, use_reentrant=reentrant)
                (model[4](h) - 1).square().mean().backward()
                optimizer.step()
    torch.testing.assert_close(two.state[saving[4].weight]["metric"], one.state[plain[4].weight]["metric"])
    assert float(two.state[saving[0].weight]["ema_weight"]) == float(one.state[plain[0].weight]["ema_weight"])


def test_an_expert_without_samples_is_no_error():
    """Nor does a pass without samples change what the others tell, and one that is all there is moves nothing."""
    model, twin = mlp(), mlp()
    optimizer, other = RNGD(model), RNGD(twin)
    out = model(inputs(n=0))
    (out.sum() + (model(inputs()) - 1).square().mean()).backward()
    optimizer.step()
    step(twin, other, inputs())
    assert_close_weights(model, twin)
    metric = optimizer.state[model[0].weight]["metric"].clone()
    optimizer.zero_grad()
    model(inputs(n=0)).sum().backward()
    optimizer.step()
    assert optimizer.health.failed_refreshes == 0
    assert torch.equal(optimizer.state[model[0].weight]["metric"], metric)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
