"""What is not finite, singular or out of reach is kept away from the weights, counted and said."""

import copy
import math
import warnings

import pytest
import torch
from builders import batch, classified, inputs, mlp, moved, normed_mlp, skipped, step, structures, train, weights
from torch import nn

from relfisher import RNGD, MetricOptions
from relfisher.optim import HealthWarning


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing(where):
    model = mlp(nn.ReLU)
    optimizer = RNGD(model, momentum=0.9)
    train(model, optimizer, 12)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    x, y = batch(99)
    if where == "input":
        x[3, 2] = math.nan
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    if where == "gradient":
        model[2].weight.grad[0, 0] = math.inf
    with pytest.warns(HealthWarning, match="step skipped: a gradient is not finite"):
        optimizer.step()
    assert optimizer.health.skipped_steps == 1
    after = optimizer.state_dict()
    rounding = {"rtol": 1e-15, "atol": 1e-16}  # of the way to the iterate and back
    torch.testing.assert_close((model.state_dict(), after["state"]), (before[0], before[1]["state"]), **rounding)
    assert after["param_groups"] == before[1]["param_groups"]
    assert all(map(math.isfinite, train(model, optimizer, 12)))


@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_gradient_that_is_not_finite_changes_nothing_between_statistics(place, momentum):
    model = mlp()
    optimizer = RNGD(model, momentum=momentum)
    for seed in range(3):
        step(model, optimizer, inputs(seed))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    optimizer.zero_grad()
    (model(inputs(3)) - 1).square().mean().backward()
    model[place].weight.grad[1, 2] = torch.nan
    with pytest.warns(HealthWarning, match="step skipped: a gradient"):
        assert skipped(optimizer) == 1
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    assert moved(model, optimizer, inputs()) == {name for name, _ in model.named_parameters()}


def test_gradients_that_are_not_finite_tell_nothing_yet():
    model = mlp()
    optimizer = RNGD(model)
    before = weights(model)
    with pytest.warns(HealthWarning, match="a gradient is not finite"):
        step(model, optimizer, batch(), lambda model, given: classified(model, given) * torch.inf)
    assert structures(optimizer) == {}
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    train(model, optimizer, 1)
    assert structures(optimizer)["4"] == "kronecker"


def test_large_finite_gradients_are_not_called_infinite():
    model = mlp(dtype=torch.float32)
    optimizer = RNGD(model)
    step(model, optimizer, inputs(dtype=torch.float32))
    optimizer.zero_grad()
    (1e20 * model(inputs(dtype=torch.float32))).sum().backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert not any("gradient is not finite" in str(warning.message) for warning in caught)


def test_what_goes_wrong_again_and_again_is_said_ever_more_rarely():
    model = mlp(nn.ReLU)
    optimizer = RNGD(model)

    def fail(times):
        for _ in range(times):
            optimizer.zero_grad()
            (model(batch(0)[0]) * math.nan).sum().backward()
            optimizer.step()

    with pytest.warns(HealthWarning) as caught:
        fail(120)
    assert optimizer.health.skipped_steps == 120
    said = [str(warning.message) for warning in caught if "step skipped" in str(warning.message)]
    assert len(said) == 3
    assert "100 times so far" in said[-1]


def test_a_batch_metric_that_is_not_finite_is_left_out():
    """An input so large that its square overflows, behind a gradient that is finite."""
    model = mlp(sizes=(2, 2), dtype=torch.float32)
    optimizer = RNGD(model)
    x = torch.tensor([[1e25, 1.0]])
    (model(x) * 1e-30).sum().backward()
    with pytest.warns(HealthWarning) as caught:
        optimizer.step()
    assert any("not finite and was left out" in str(warning.message) for warning in caught)
    assert optimizer.health.dropped_batches == 1
    assert torch.isfinite(model[0].weight).all()


def test_a_metric_that_cannot_be_factorised_leaves_the_last_good_inverse():
    model = mlp(nn.ReLU)
    optimizer = RNGD(model, fit="plain", metric=MetricOptions(refresh_interval=5, warmup_refreshes=()))
    train(model, optimizer, 5)
    good = {id(p): optimizer.state[p]["root"].clone() for p in model.parameters() if "root" in optimizer.state[p]}
    for parameter in model.parameters():
        if "metric" in optimizer.state[parameter]:
            optimizer.state[parameter]["metric"].neg_()
    with pytest.warns(HealthWarning, match="could not be factorised"):
        train(model, optimizer, 5, first=5)  # each layer's inverse is due once
    assert optimizer.health.failed_refreshes == 3
    for parameter in model.parameters():
        if "root" in optimizer.state[parameter]:
            assert torch.equal(optimizer.state[parameter]["root"], good[id(parameter)])
            assert torch.isfinite(parameter).all()


def test_a_dead_unit_is_damped_with_its_neighbours():
    model = mlp(nn.ReLU, (6, 2, 3))
    with torch.no_grad():
        model[0].bias[0] = -100.0
    optimizer = RNGD(model, metric=MetricOptions(structure="neuron"))
    train(model, optimizer, 1)
    inverse = optimizer.state[model[0].weight]["root"]
    assert float(inverse[0].abs().max()) < 1e4
    assert optimizer.health.failed_refreshes == 0


@pytest.mark.parametrize(
    ("structure", "damping", "x"),
    [
        ("neuron", 0.1, lambda: 1e4 * inputs()),
        ("auto", 0.0, lambda: inputs(n=2)),
        ("neuron", 0.0, lambda: 0 * inputs()),
    ],
)
def test_a_singular_metric_is_no_error(structure, damping, x):
    """Saturated units, more parameters than samples without damping, an input that is zero."""
    model = mlp(bias=False)
    metric = MetricOptions(structure=structure, stats_interval=1, refresh_interval=1)
    optimizer = RNGD(model, damping=damping, metric=metric)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HealthWarning)
        for _ in range(5):
            step(model, optimizer, x())
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_a_step_that_is_not_finite_lets_the_next_refresh_come():
    model = mlp()
    optimizer = RNGD(
        model, step_rule="trust-region", metric=MetricOptions(stats_interval=1, refresh_interval=4, warmup_refreshes=())
    )
    step(model, optimizer, inputs())
    for state in optimizer.state.values():
        state.get("inverse", torch.zeros(())).neg_()
    step(model, optimizer, inputs())
    with pytest.warns(HealthWarning, match="the step itself is not finite"):
        assert optimizer.health.skipped_steps == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HealthWarning)
        for seed in range(5):
            step(model, optimizer, inputs(seed))
    count = optimizer.health.skipped_steps
    step(model, optimizer, inputs())
    assert optimizer.health.skipped_steps == count


def test_layers_without_a_part_in_the_first_step_are_named_once():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.spare, self.frozen = (
                nn.Linear(6, 3),
                nn.Linear(6, 3),
                nn.Linear(6, 3).requires_grad_(False),
            )
            self.adam = nn.Linear(6, 3)

        def forward(self, x):
            return self.first(x)

    model = Spare().double()
    optimizer = RNGD(model, metric=MetricOptions(structure={"adam": "fallback"}))
    with pytest.warns(HealthWarning, match="no part in the first step had spare: ") as caught:
        train(model, optimizer, 3)
    assert len(caught) == 1


def test_a_layer_that_is_used_outside_the_model_alone_is_trained_all_the_same():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, h):
            return self.second(torch.tanh(h))

    def whole(x):
        return model(nn.functional.linear(x, model.first.weight, model.first.bias))

    model = Partly().double()
    before = model.first.weight.detach().clone()
    optimizer = RNGD(model)
    with pytest.warns(HealthWarning, match=r"first.*AdamW"):
        train(whole, optimizer, 1)
    assert not torch.equal(model.first.weight, before)
    assert math.isfinite(train(whole, optimizer, 5)[-1])


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_a_learning_rate_that_is_not_finite_skips_the_step(rate):
    model = normed_mlp()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer.param_groups[0]["lr"] = rate
    with pytest.warns(HealthWarning, match=f"step skipped: lr must lie in .*, got {rate}"):
        step(model, optimizer, inputs(1))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert optimizer.health.skipped_steps == 1


@pytest.mark.parametrize(
    ("option", "value"),
    [("weight_decay", math.nan), ("weight_decay", 1e39), ("lr", 1e38), ("momentum", math.nan), ("damping", math.nan)],
)
def test_an_option_that_leaves_its_range_later_skips_the_step(option, value):
    model = normed_mlp()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    before, kept = weights(model), optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    with pytest.warns(HealthWarning, match=f"step skipped: .*{option} must lie in"):
        step(model, optimizer, inputs(1))
    assert optimizer.health.skipped_steps == 1
    assert all(torch.equal(before[name], value) for name, value in weights(model).items())
    optimizer.param_groups[0][option] = kept
    step(model, optimizer, inputs(2))
    assert any(not torch.equal(before[name], value) for name, value in weights(model).items())


@pytest.mark.parametrize("options", [{"weight_decay": 1e39}, {"lr": 1e38}, {"lr": 20.0, "weight_decay": 0.1}])
def test_options_that_would_destroy_the_weights_are_refused(options):
    with pytest.raises(ValueError, match="must lie in"):
        RNGD(normed_mlp(), **options)


def test_a_gradient_with_an_infinite_square_does_not_stop_a_parameter_for_good():
    model = normed_mlp(dtype=torch.float32)
    optimizer = RNGD(model, averaging=0.0, metric=MetricOptions(structure={"LayerNorm": "fallback"}))
    step(model, optimizer, inputs(dtype=torch.float32))
    for parameter in model[2].parameters():
        parameter.grad.fill_(1e30)
    optimizer.step()
    assert all(torch.isfinite(value).all() for value in optimizer.state[model[2].weight].values())
