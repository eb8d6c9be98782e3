"""What is kept of each layer from step to step: the running average of its batch metrics and its inverse."""

import pytest
import torch
from builders import (
    average,
    batch,
    classified,
    expected_blocks,
    inputs,
    mlp,
    step,
    structures,
    train,
)
from hypothesis import given
from hypothesis import strategies as st
from reference import augment
from torch import nn

from relfisher import RNGD, MetricOptions
from relfisher.responses import LinearGaussian, TanhBernoulli


def test_the_average_is_unbiased_from_the_first_batch_on():
    """A constant batch has its own metric as the average, however few batches were seen."""
    model = mlp(sizes=(6, 3))
    optimizer = RNGD(
        model,
        lr=1e-6,
        step_rule="trust-region",
        metric=MetricOptions(stats_interval=1, refresh_interval=1, structure="shared"),
    )
    x, y = batch()
    augmented = augment(x)
    metric = augmented.T @ augmented / len(x)
    damped = metric + 0.1 * torch.trace(metric) / 7 * torch.eye(7, dtype=x.dtype)
    for _ in range(3):
        step(model, optimizer, (x, y), classified)
        torch.testing.assert_close(optimizer.state[model[0].weight]["inverse"], torch.linalg.inv(damped))


@pytest.mark.parametrize("interval", [1, 3])
@given(decay=st.floats(0, 0.99), steps=st.integers(1, 7))
def test_each_update_weighs_less_by_the_decay_of_the_iterations_since(interval, decay, steps):
    """With the metric that the weights had at each update; the mass is the sum of the weights of all batches."""
    model = mlp()
    optimizer = RNGD(
        model,
        damping=1.0,
        metric=MetricOptions(
            structure="neuron", decay=decay, stats_interval=interval, warmup_refreshes=(), stats_samples=None
        ),
    )
    total, mass = 0.0, 0.0
    for seed in range(steps):
        x, y = batch(seed)
        if seed % interval == 0:  # the first layer comes first in an interval
            share = decay**interval
            total = share * total + (1 - share) * expected_blocks(model[0], x, TanhBernoulli())
            mass = share * mass + 1 - share
        step(model, optimizer, (x, y), classified)
        state = optimizer.state[model[0].weight]
        torch.testing.assert_close(state["metric"], total)
        assert float(state["ema_weight"]) == pytest.approx(mass, rel=1e-6)


def test_an_average_that_starts_at_the_identity_has_its_full_mass():
    model = mlp()
    optimizer = RNGD(
        model,
        metric=MetricOptions(structure="shared", decay=0.9, stats_interval=1, bias_correction=False, stagger=False),
    )
    x = inputs()
    eye = torch.eye(7, dtype=torch.float64)
    assert torch.equal(optimizer.state[model[0].weight]["metric"], eye)
    step(model, optimizer, x)
    augmented = augment(x)
    torch.testing.assert_close(
        optimizer.state[model[0].weight]["metric"], 0.9 * eye + 0.1 * augmented.T @ augmented / len(x)
    )
    assert float(optimizer.state[model[0].weight]["ema_weight"]) == pytest.approx(1)


def test_the_inverse_is_that_of_the_last_refresh():
    """Refreshed in the first iteration of five, while the metric goes on."""
    model = mlp()
    optimizer = RNGD(
        model,
        step_rule="trust-region",
        metric=MetricOptions(structure="shared", stats_interval=1, refresh_interval=5, warmup_refreshes=()),
    )
    inverses, expected = [], []
    for seed in range(12):
        train(model, optimizer, 1, first=seed)
        metric = average(optimizer, model[0])
        damping = 0.1 * metric.diagonal().mean() * torch.eye(7, dtype=torch.float64)
        inverses.append(optimizer.state[model[0].weight]["inverse"].clone())
        expected.append(torch.linalg.inv(metric + damping))
    for place, inverse in enumerate(inverses):
        torch.testing.assert_close(inverse, expected[place // 5 * 5])


def test_a_step_takes_the_inverse_that_was_refreshed_in_it():
    """Two optimizers whose inverses are refreshed in each step and in every second one go apart in the second."""
    models = [mlp(), mlp()]
    options = {"structure": "shared", "stats_interval": 1, "warmup_refreshes": ()}
    often, rarely = (
        RNGD(model, step_rule="trust-region", metric=MetricOptions(**options, refresh_interval=each))
        for model, each in zip(models, (1, 2), strict=True)
    )
    for seed in range(2):
        before = [model[0].weight.detach().clone() for model in models]
        for model, optimizer in zip(models, (often, rarely), strict=True):
            train(model, optimizer, 1, first=seed)
        one, two = (model[0].weight.detach() - start for model, start in zip(models, before, strict=True))
        assert torch.allclose(one, two) == (seed == 0)


def test_structures_are_told_by_what_is_kept():
    """What the tests of other rooms take for granted."""
    kinds = "neuron", "shared", "diagonal", "kronecker"
    for kind in kinds:
        model = mlp()
        optimizer = RNGD(model, metric=MetricOptions(structure=kind))
        assert structures(optimizer) == {}
        train(model, optimizer, 1)
        assert structures(optimizer) == {"0": kind, "2": kind, "4": kind}


def test_a_linear_layer_has_the_same_block_for_each_of_its_units():
    model = mlp(sizes=(6, 3))
    optimizer = RNGD(model, metric=MetricOptions(structure="neuron", decay=0.0))
    x = inputs()
    expected = expected_blocks(model[0], x, LinearGaussian())
    step(model, optimizer, x)
    torch.testing.assert_close(average(optimizer, model[0]), expected)
    torch.testing.assert_close(expected[0], augment(x).T @ augment(x) / len(x))


def test_the_metric_is_updated_before_each_early_refresh():
    model = mlp(nn.ReLU)
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=10, warmup_refreshes=(0, 3)))
    masses = []
    for seed in range(12):
        train(model, optimizer, 1, first=seed)
        masses.append(float(optimizer.state[model[0].weight]["ema_weight"]))
    assert [k for k in range(12) if k == 0 or masses[k] != masses[k - 1]] == [0, 3, 10]
