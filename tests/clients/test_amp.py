"""Autocast and the gradient scaler, in a plain loop: the scale of the loss never enters the metric."""

import pytest
import torch
from amp import network, train
from builders import assert_same_weights
from synthetic import gratings
from torch.nn.functional import cross_entropy

from relfisher import RNGD, MetricOptions


def scaled_steps(dtype, steps, **options):
    """Return the model, the optimizer and the scaler after steps with this scaler."""
    model = network()
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=1))
    scaler = torch.amp.GradScaler("cpu", **options)
    images, labels = gratings(64, size=8)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer, scaler


def metrics(optimizer):
    return [state["metric"] for state in optimizer.state_dict()["state"].values() if "metric" in state]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_learns(dtype):
    losses = train(dtype, epochs=12, samples=256, batch=32)
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(("dtype", "steps"), [(torch.bfloat16, 5), (torch.float16, 1)])
def test_the_scale_of_the_loss_does_not_enter_the_metric(dtype, steps):
    """In bfloat16 a power of two changes no digit of a gradient; in float16 the first metric is of the same weights."""
    _, one, _ = scaled_steps(dtype, steps, init_scale=1.0)
    _, other, _ = scaled_steps(dtype, steps, init_scale=2.0**10)
    assert metrics(one)
    for expected, metric in zip(metrics(one), metrics(other), strict=True):
        assert torch.equal(metric, expected)
        assert metric.dtype == torch.float32


def test_a_step_that_the_scaler_skips_moves_nothing_and_the_next_one_does():
    start = network()
    model, _, scaler = scaled_steps(torch.float16, 1, init_scale=2.0**30, backoff_factor=2.0**-22)
    assert scaler.get_scale() == 2.0**8
    assert_same_weights(start, model)
    model, optimizer, scaler = scaled_steps(torch.float16, 2, init_scale=2.0**30, backoff_factor=2.0**-22)
    assert scaler.get_scale() == 2.0**8
    assert not torch.equal(model[1].weight, start[1].weight)
    assert optimizer.health.skipped_steps == 0
