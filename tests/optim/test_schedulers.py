"""Schedules of learning rates: all of torch reach both halves of a group, and the bounds follow."""

import pytest
import torch
from builders import (
    affine,
    batch,
    every_kind,
    inputs,
    mlp,
    moved,
    normed_mlp,
    predict,
    squared_length,
    step,
    train,
    weights,
)
from torch import nn
from torch.optim import lr_scheduler, swa_utils
from torch.optim.swa_utils import SWALR

from relfisher import RNGD, MetricOptions, TrustRegion
from relfisher.optim import HealthWarning

SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda epoch: 0.9**epoch},
    "MultiplicativeLR": {"lr_lambda": lambda _: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [1, 3]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": True},
    "OneCycleLR": {"max_lr": [0.1, 0.01], "total_steps": 8, "cycle_momentum": False},
    "ReduceLROnPlateau": {"patience": 0},
    "SWALR": {"swa_lr": [0.05, 0.01], "anneal_epochs": 3},
}


def scheduler_of(name, optimizer):
    """Return a scheduler of torch; the two that are made of others from two that are tried by themselves."""
    parts = "LinearLR", "ExponentialLR"
    match name:
        case "SequentialLR":
            return lr_scheduler.SequentialLR(optimizer, [scheduler_of(part, optimizer) for part in parts], [2])
        case "ChainedScheduler":
            return lr_scheduler.ChainedScheduler([scheduler_of(part, optimizer) for part in parts])
        case "SWALR":
            return SWALR(optimizer, **SCHEDULERS[name])
    return getattr(lr_scheduler, name)(optimizer, **SCHEDULERS[name])


@pytest.mark.parametrize("name", [*SCHEDULERS, "SequentialLR", "ChainedScheduler"])
def test_every_scheduler_moves_the_learning_rates(name):
    model = every_kind()
    optimizer = RNGD(model, momentum=0.5, metric=MetricOptions(structure={"scale": "fallback"}))
    scheduler = scheduler_of(name, optimizer)
    seen = set()
    for seed in range(6):
        seen.add(tuple(float(group["lr"]) for group in optimizer.param_groups))
        predict(model, optimizer, seed)
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
    assert len(seen) > 1
    assert len({rates[1] for rates in seen}) > 1, "AdamW's learning rate follows, too"


def test_each_scheduler_of_torch_is_tried():
    known = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, lr_scheduler.LRScheduler) and name[0] != "_"
    }
    assert known - {"LRScheduler"} == {*SCHEDULERS, "SequentialLR", "ChainedScheduler"}


def test_schedulers_reach_the_fallback_too():
    for rate in (0.0, 1.0):
        model = normed_mlp()
        optimizer = RNGD(model, metric=MetricOptions(structure={"LayerNorm": "fallback"}))
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda _, rate=rate: rate)
        found = moved(model, optimizer, inputs())
        assert found == ({name for name, _ in model.named_parameters()} if rate else set())
        scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == [0.01 * rate, 1e-3 * rate]


def test_schedulers_closures_and_weight_decay():
    model = mlp(nn.ReLU)
    optimizer = RNGD(model, lr=0.1, weight_decay=0.5, step_rule=TrustRegion(None))
    scheduler = lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert optimizer.step(closure).item() != first.item()
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad.zero_()
    optimizer.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - 0.05 * 0.5))


@pytest.mark.parametrize("structure", ["auto", "neuron", "shared"])
def test_a_schedule_shortens_the_steps_that_the_bound_shortens(structure):
    """The bound holds for the highest learning rate so far, which a saved state knows."""
    bound, lengths = 1e-4, []
    model = mlp(nn.ReLU)
    optimizer = RNGD(model, lr=10.0, step_rule=TrustRegion(bound), metric=MetricOptions(structure=structure))
    train(model, optimizer, 1)
    for lr in (10.0, 5.0, 20.0, 5.0):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.load_state_dict(optimizer.state_dict())
        before = weights(model)
        train(model, optimizer, 1)
        move = affine(weights(model), 0) - affine(before, 0)
        lengths.append(squared_length(optimizer.state[model[0].weight], move))
    assert lengths == pytest.approx([bound, bound / 4, bound, bound / 16], rel=1e-4)


def test_a_learning_rate_of_zero_before_the_first_step_moves_nothing():
    """As in a warm-up that begins at 0; later steps are those of a run that begins there."""
    model, twin = normed_mlp(), normed_mlp()
    optimizer, other = RNGD(model), RNGD(twin)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step(model, optimizer, inputs())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for group in optimizer.param_groups:
        group["lr"] = 0.03
    step(model, optimizer, inputs(1))
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    step(twin, other, inputs(1))
    assert other.health == optimizer.health


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_learning_rate_may_be_a_tensor_which_changes_in_place(scheduled):
    plain, model = mlp(), mlp()
    lr = torch.tensor(0.03, dtype=torch.float64)
    one, two = RNGD(plain, 0.03), RNGD(model, lr)
    schedulers = [lr_scheduler.LinearLR(each, 0.1, 1.0, 4) for each in (one, two)] if scheduled else []
    for seed in range(6):
        assert step(plain, one, inputs(seed)) == step(model, two, inputs(seed))
        for scheduler in schedulers:
            scheduler.step()
        if not scheduled and seed == 3:
            one.param_groups[0]["lr"] = 0.001
            lr.fill_(0.001)
    assert two.param_groups[0]["lr"] is lr or scheduled
    again = RNGD(mlp(), 0.1)
    again.load_state_dict(two.state_dict())
    assert float(again.param_groups[0]["lr"]) == float(one.param_groups[0]["lr"])


@pytest.mark.parametrize("lr", [torch.tensor([0.1, 0.2]), torch.tensor(0.1, device="meta"), torch.tensor(0.1j)])
def test_a_learning_rate_that_a_step_would_wait_for_is_refused(lr):
    with pytest.raises(TypeError, match="lr must be a number, or a tensor of one real number on the CPU"):
        RNGD(mlp(), lr)


def test_a_learning_rate_that_is_set_out_of_range_is_found_in_the_next_step():
    model = mlp()
    optimizer = RNGD(model, torch.tensor(0.1))
    step(model, optimizer, inputs())
    optimizer.param_groups[0]["lr"].fill_(-1.0)
    with pytest.warns(HealthWarning, match="lr must lie"):
        step(model, optimizer, inputs())
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.param_groups[0]["damping"] = -1.0
    with pytest.warns(HealthWarning, match="damping must lie"):
        step(model, optimizer, inputs())
    assert optimizer.health.skipped_steps == 2
