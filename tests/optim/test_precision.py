"""Low precision: metrics stay in float32, whatever the model and autocast are in."""

import warnings

import pytest
import torch
from builders import (
    KINDS,
    every_kind,
    inputs,
    mlp,
    normed_mlp,
    predicted,
    resumed,
    sentences,
    squares,
    step,
    weights,
)
from torch import nn

from relfisher import RNGD, AdamWOptions, MetricOptions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_train_and_resume_bitwise(dtype):
    options = {"metric": MetricOptions(stats_interval=1, refresh_interval=4), "momentum": 0.5}
    model = mlp(dtype=dtype)
    optimizer = RNGD(model, **options)
    for seed in range(5):
        step(model, optimizer, inputs(seed, dtype=dtype))
    assert optimizer.state[model[0].weight]["metric"].dtype == torch.float32
    twin, other = resumed(model, optimizer, **options)
    for seed in range(5, 10):
        assert step(model, optimizer, inputs(seed, dtype=dtype)) == step(twin, other, inputs(seed, dtype=dtype))


def test_a_model_that_changes_its_dtype_later_is_refused_and_keeps_its_weights():
    model = mlp(dtype=torch.float32)
    optimizer = RNGD(model)
    for seed in range(3):
        step(model, optimizer, inputs(seed, dtype=torch.float32))
    model.double()
    kept = weights(model)
    squares(model, inputs()).backward()
    with pytest.raises(ValueError, match=r"the metric of '0' is torch.float32, but its weights need torch.float64"):
        optimizer.step()
    optimizer.close()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), kept[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_model_may_change_its_dtype_before_the_first_step(dtype):
    model = normed_mlp()
    optimizer = RNGD(model)
    model.to(dtype)
    for seed in range(6):
        step(model, optimizer, inputs(seed).to(dtype))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.state[model[0].weight]["metric"].dtype == wanted
    assert optimizer.health.failed_refreshes == 0


def test_autocast_leaves_the_metric_in_float32():
    """Inputs of rank 3 and little damping: in bfloat16 the products would not be positive semi-definite."""
    model = mlp(dtype=torch.float32)
    optimizer = RNGD(model, damping=1e-4, metric=MetricOptions(stats_interval=1, refresh_interval=1))
    x = inputs(dtype=torch.float32)[:, :3] @ torch.randn(3, 6)
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
    assert optimizer.health.failed_refreshes == 0
    metric = optimizer.state[model[2].weight]["metric"]
    torch.testing.assert_close(metric, metric.mT, rtol=1e-6, atol=1e-7)


def autocast(dtype, *without):
    what = f"autocast in {str(dtype).removeprefix('torch.')}"
    supported = pytest.mark.supports(what, *(kind for kind in KINDS if kind not in without))
    return pytest.param(dtype, without, marks=supported)


@pytest.mark.parametrize(
    ("dtype", "without"), [autocast(torch.float16, "Bilinear", "LSTM"), autocast(torch.bfloat16, "Bilinear")]
)
def test_autocast_keeps_a_float32_state_for_every_layer(dtype, without):
    """But for those that torch's autocast cannot run, or runs on some processors only."""
    model = every_kind(torch.float32, without=without)
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=1, refresh_interval=1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for seed in range(4):
            torch.manual_seed(seed)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = predicted(model, sentences(seed))
            loss.backward()
            optimizer.step()
    assert {value.dtype for state in optimizer.state.values() for value in state.values()} == {torch.float32}
    assert optimizer.health.failed_refreshes == optimizer.health.dropped_batches == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_low_precision_parameters_are_kept_in_float32(dtype):
    """Gradients of 1e-3 squared, and the eps of AdamW, vanish in float16: its step is that of float32, rounded."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.layer(x) * self.scale

    torch.manual_seed(0)
    model = Scaled().to(dtype)
    metric = MetricOptions(structure={"scale": "fallback"})
    optimizer = RNGD(model, weight_decay=0.0, fallback=AdamWOptions(lr=0.1), metric=metric)
    expected = model.scale.detach().float().requires_grad_()
    adamw = torch.optim.AdamW([expected], lr=0.1, weight_decay=0.0)
    (model(torch.randn(5, 4, dtype=dtype)).sum() * 1e-3).backward()
    expected.grad = model.scale.grad.float()
    optimizer.step()
    adamw.step()
    assert torch.equal(model.scale.detach(), expected.detach().to(dtype))
    assert optimizer.state[model.scale]["exp_avg_sq"].dtype == torch.float32
    assert optimizer.health.skipped_steps == 0
