"""RNGD as an optimizer: what it moves, what it bounds, what it keeps away from the weights."""

import copy
import gc
import math
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relfisher import RNGD
from relfisher.optim import HealthWarning
from relfisher.structures import NeuronBlocks, SharedBlock
from relfisher.subsystems import ResponseWarning, TiedWarning


def classifier(activation=nn.ReLU, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3)
    ).to(dtype)  # fmt: skip


def batch(seed=0, n=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=dtype)
    return x, x[:, :3].argmax(1)


def train(model, optimizer, steps, first=0):
    losses = []
    for step in range(first, first + steps):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU])
@pytest.mark.parametrize("structure", ["auto", "neuron", "shared", "published"])
def test_learns(activation, structure):
    model = classifier(activation)
    losses = train(model, RNGD(model, lr=0.1, structure=structure), 150)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize(("structure", "kind"), [("neuron", NeuronBlocks), ("shared", SharedBlock)])
def test_first_step_is_the_damped_inverse_times_the_gradient(structure, kind):
    """One step by hand: metric of the one batch, mean-trace damping, no bound."""
    model = classifier(nn.Tanh)
    before, (x, y) = weights(model), batch()
    optimizer = RNGD(model, lr=0.1, structure=structure, damping=0.05, step_rule="trust-region", trust_region=None)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    h = x
    for place in range(3):
        weight, bias = before[2 * place], before[2 * place + 1]
        augmented = torch.cat([h, torch.ones(len(h), 1, dtype=h.dtype)], 1)
        z = h @ weight.T + bias
        nu = 1 - torch.tanh(z) ** 2 if kind is NeuronBlocks and place < 2 else torch.ones_like(z)
        blocks = [(augmented * nu[:, [unit]]).T @ augmented / len(x) for unit in range(len(weight))]
        damping = 0.05 * sum(torch.trace(block) for block in blocks) / len(blocks) / augmented.shape[1]
        for unit, block in enumerate(blocks):
            gradient = torch.cat([gradients[2 * place][unit], gradients[2 * place + 1][unit, None]])
            step = torch.linalg.solve(block + damping * torch.eye(len(block), dtype=block.dtype), gradient)
            moved = torch.cat([model[2 * place].weight[unit], model[2 * place].bias[unit, None]])
            torch.testing.assert_close(moved, torch.cat([weight[unit], bias[unit, None]]) - 0.1 * step)
        h = torch.tanh(z)


@given(
    lr=st.floats(1e-3, 10),
    bound=st.floats(1e-5, 1),
    momentum=st.sampled_from([0.0, 0.5, 0.9]),
    structure=st.sampled_from(["neuron", "shared"]),
)
def test_no_layers_step_is_longer_than_the_trust_region(lr, bound, momentum, structure):
    """The squared length in the damped metric of what was moved, momentum included, is lr^2 <D, M> or the bound."""
    model = classifier(nn.Tanh)
    optimizer = RNGD(
        model,
        lr,
        momentum=momentum,
        structure=structure,
        step_rule="trust-region",
        trust_region=bound,
        stats_interval=1,
        refresh_interval=1,
    )
    for step in range(4):
        before = weights(model)
        train(model, optimizer, 1, first=step)
        for place, layer in enumerate(module for module in model if isinstance(module, nn.Linear)):
            moved = torch.cat(
                [layer.weight - before[2 * place], (layer.bias - before[2 * place + 1])[:, None]], 1
            ).detach()  # fmt: skip
            inverse = optimizer.state[layer.weight]["inverse"]
            damped = torch.linalg.inv(inverse)
            image = torch.einsum("oij,oj->oi", damped, moved) if inverse.ndim == 3 else moved @ damped
            assert float((moved * image).sum()) <= bound * (1 + 1e-6)


def test_momentum_does_not_share_memory_with_the_gradient():
    """A layer without a bias hands out its gradient as it is; clearing it in place must not clear the momentum."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False)).double()
    optimizer = RNGD(model, momentum=0.9)
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert float(optimizer.state[model[0].weight]["momentum"].norm()) > 0


def test_a_short_step_is_not_scaled():
    model, free = classifier(), classifier()
    train(model, RNGD(model, lr=1e-3, step_rule="trust-region", trust_region=1e6), 3)
    train(free, RNGD(free, lr=1e-3, step_rule="trust-region", trust_region=None), 3)
    for one, other in zip(weights(model), weights(free), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_the_average_is_unbiased_from_the_first_batch_on():
    """A constant batch has its own metric as the average, however few batches were seen."""
    model = nn.Sequential(nn.Linear(6, 3)).double()
    optimizer = RNGD(model, lr=1e-6, stats_interval=1, refresh_interval=1, damping=0.1, structure="shared")
    x, y = batch()
    augmented = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    metric = augmented.T @ augmented / len(x)
    damped = metric + 0.1 * torch.trace(metric) / 7 * torch.eye(7, dtype=x.dtype)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        torch.testing.assert_close(optimizer.state[model[0].weight]["inverse"], torch.linalg.inv(damped))


def test_a_dead_unit_is_damped_with_its_neighbours():
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 3)).double()
    with torch.no_grad():
        model[0].bias[0] = -100.0
    optimizer = RNGD(model, structure="neuron")
    train(model, optimizer, 1)
    inverse = optimizer.state[model[0].weight]["inverse"]
    assert float(inverse[0].abs().max()) < 1e4
    assert optimizer.health.failed_refreshes == 0


@pytest.mark.parametrize("where", ["input", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing(where):
    model = classifier()
    optimizer = RNGD(model, momentum=0.9)
    train(model, optimizer, 12)
    before, state = weights(model), copy.deepcopy(optimizer.state_dict())
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
    for one, other in zip(weights(model), before, strict=True):
        assert torch.equal(one, other)
    same(optimizer.state_dict(), state)
    assert all(map(math.isfinite, train(model, optimizer, 12)))


def test_what_goes_wrong_again_and_again_is_said_ever_more_rarely():
    model = classifier()
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


def same(one, other):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list):
        for a, b in zip(one, other, strict=True):
            same(a, b)
    else:
        assert one == other


def test_a_batch_metric_that_is_not_finite_is_left_out():
    """An input so large that its square overflows, behind a gradient that is finite."""
    model = nn.Sequential(nn.Linear(2, 2)).float()
    optimizer = RNGD(model)
    x = torch.tensor([[1e25, 1.0]])
    (model(x) * 1e-30).sum().backward()
    with pytest.warns(HealthWarning) as caught:
        optimizer.step()
    assert any("not finite and was left out" in str(warning.message) for warning in caught)
    assert optimizer.health.dropped_batches == 1
    assert torch.isfinite(model[0].weight).all()


def test_a_metric_that_cannot_be_factorised_leaves_the_last_good_inverse():
    model = classifier()
    optimizer = RNGD(model, refresh_interval=5, early_refreshes=())
    train(model, optimizer, 5)
    good = {id(p): optimizer.state[p]["inverse"].clone() for p in model.parameters() if p in optimizer.state}
    for parameter in model.parameters():
        if parameter in optimizer.state:
            optimizer.state[parameter]["metric"].neg_()
    with pytest.warns(HealthWarning, match="could not be factorised"):
        train(model, optimizer, 5, first=5)  # each layer's inverse is due once
    assert optimizer.health.failed_refreshes == 3
    for parameter in model.parameters():
        if parameter in optimizer.state:
            assert torch.equal(optimizer.state[parameter]["inverse"], good[id(parameter)])
            assert torch.isfinite(parameter).all()


def test_state_dict_resumes_bitwise_in_the_middle_of_a_refresh_interval():
    options = {"momentum": 0.5, "refresh_interval": 20}
    model = classifier(nn.Tanh)
    optimizer = RNGD(model, **options)
    train(model, optimizer, 33)
    resumed = classifier(nn.Tanh, seed=5)
    resumed.load_state_dict(model.state_dict())
    other = RNGD(resumed, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 30, first=33) == train(resumed, other, 30, first=33)
    for one, two in zip(weights(model), weights(resumed), strict=True):
        assert torch.equal(one, two)


def test_a_state_of_another_structure_is_refused():
    model = classifier(nn.Tanh)
    optimizer = RNGD(model, structure="neuron")
    train(model, optimizer, 2)
    fresh = classifier(nn.Tanh)
    other = RNGD(fresh, structure="shared")
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"metric of '0' has.*\(5, 7, 7\).*'shared' needs.*\(7, 7\)"):
        train(fresh, other, 1)


def test_parameters_without_a_metric_are_trained_by_adamw():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).double()
    twin = copy.deepcopy(model)
    optimizer = RNGD(model, fallback_lr=0.01, structure={"LayerNorm": "fallback"})
    adamw = torch.optim.AdamW(twin[1].parameters(), lr=0.01, weight_decay=0.0)
    for step in range(5):
        for mine, theirs in ((model, optimizer), (twin, adamw)):
            theirs.zero_grad()
            x, y = batch(step)
            nn.functional.cross_entropy(mine(x), y).backward()
            theirs.step()
        twin[0].load_state_dict(model[0].state_dict())
        twin[3].load_state_dict(model[3].state_dict())
        torch.testing.assert_close(model[1].weight, twin[1].weight)
        torch.testing.assert_close(model[1].bias, twin[1].bias)


def test_a_layer_whose_module_is_never_called_is_trained_all_the_same():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.second(torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias)))

    model = Functional().double()
    before = model.first.weight.detach().clone()
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning, match="first, tied: linear uses its parameters outside its own calls"):
        train(model, optimizer, 1)
    assert not torch.equal(model.first.weight, before)
    assert math.isfinite(train(model, optimizer, 5)[-1])


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
    optimizer = RNGD(model, structure={"adam": "fallback"})
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


def test_tied_weights_are_trained_by_the_fallback_and_not_twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    optimizer = RNGD(model)
    params = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(params) == len(set(params)) == 3


def test_gradient_accumulation_equals_the_large_batch():
    one, two = classifier(nn.Tanh), classifier(nn.Tanh)
    large, small = RNGD(one), RNGD(two)
    x, y = batch(n=12)
    for _ in range(3):
        large.zero_grad()
        nn.functional.cross_entropy(one(x), y).backward()
        large.step()
        small.zero_grad()
        for rows in (slice(0, 8), slice(8, 12)):
            (nn.functional.cross_entropy(two(x[rows]), y[rows], reduction="sum") / 12).backward()
        small.step()
    for a, b in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_frozen_bias_and_missing_gradients_stay_put():
    model = classifier()
    model[0].bias.requires_grad_(False)
    bias, optimizer = model[0].bias.clone(), RNGD(model)
    train(model, optimizer, 3)
    assert torch.equal(model[0].bias, bias)
    before = model[4].weight.detach().clone()
    optimizer.zero_grad()
    x, _ = batch()
    model[:4](x).sum().backward()
    optimizer.step()
    assert torch.equal(model[4].weight, before)


def test_forwards_without_training_do_not_count():
    model = classifier()
    optimizer = RNGD(model, stats_interval=1)
    train(model, optimizer, 2)
    twin = classifier()
    other = RNGD(twin, stats_interval=1)
    for step in range(2):
        with torch.no_grad():
            twin(100 * batch()[0])
        twin.eval()
        twin(100 * batch()[0])
        twin.train()
        train(twin, other, 1, first=step)
    for a, b in zip(weights(model), weights(twin), strict=True):
        assert torch.equal(a, b)


def test_schedulers_closures_and_weight_decay():
    model = classifier()
    optimizer = RNGD(model, lr=0.1, weight_decay=0.5, step_rule="trust-region", trust_region=None)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
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
    before = [p.detach().clone() for p in model.parameters()]
    for parameter in model.parameters():
        parameter.grad.zero_()
    optimizer.step()
    for a, b in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(a, b * (1 - 0.05 * 0.5))


def test_a_schedule_shortens_the_steps_that_the_bound_shortens():
    """The bound holds for the highest learning rate so far, which a saved state knows."""
    bound, lengths = 1e-4, []
    model = classifier()
    optimizer = RNGD(model, lr=10.0, step_rule="trust-region", trust_region=bound)
    train(model, optimizer, 1)
    for lr in (10.0, 5.0, 20.0, 5.0):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.load_state_dict(optimizer.state_dict())
        move = optimizer._moves()[0]
        (step,) = optimizer._rule.steps([move])
        lengths.append(step.scale**2 * float((step.direction * move.gradient).sum()))
    assert lengths == pytest.approx([bound, bound / 4, bound, bound / 16], rel=1e-4)


def test_the_metric_is_updated_before_each_early_refresh():
    model = classifier()
    optimizer = RNGD(model, stats_interval=10, early_refreshes=(0, 3))
    masses = []
    for step in range(12):
        train(model, optimizer, 1, first=step)
        masses.append(float(optimizer.state[model[0].weight]["mass"]))
    assert [k for k in range(12) if k == 0 or masses[k] != masses[k - 1]] == [0, 3, 10]


def test_the_optimizer_lets_the_model_go_and_the_model_the_optimizer():
    model = classifier()
    optimizer = RNGD(model)
    train(model, optimizer, 2)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    other = RNGD(model)
    other.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_forward_pass_that_raises_leaves_no_watch_behind():
    model = classifier()
    optimizer = RNGD(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5, dtype=torch.float64))
    assert all(map(math.isfinite, train(model, optimizer, 3)))
    assert len(torch.overrides._get_current_function_mode_stack()) == 0


def test_says_once_which_activation_is_not_known():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.second(torch.atan(self.first(x)))

    model = Odd().double()
    optimizer = RNGD(model)
    with pytest.warns(ResponseWarning, match="first feeds atan") as caught:
        train(model, optimizer, 3)
    assert len([warning for warning in caught if warning.category is ResponseWarning]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr must be a finite number > 0, got 0.0"),
        ({"lr": math.nan}, "lr must be a finite number > 0"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"decay must lie in \[0, 1\)"),
        ({"damping": -1.0}, "damping"),
        ({"step_rule": "trust-region", "trust_region": 0.0}, "trust_region must be a finite number > 0"),
        ({"stats_interval": 0}, "stats_interval"),
        ({"refresh_interval": 0}, "refresh_interval"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"structure": "kron"}, "structure must be one of auto, neuron, .*, got 'kron'"),
        ({"relu_omega": 0.0}, "relu_omega"),
        ({"fallback_lr": -1.0}, "fallback_lr"),
        ({"fallback_betas": (0.9, 1.0)}, "fallback_betas"),
    ],
)
def test_arguments_outside_what_is_allowed_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RNGD(classifier(), **options)


def test_parameters_instead_of_a_model_are_explained():
    """In a process of its own, where no type checker of the tests speaks first."""
    code = "import torch, relfisher; relfisher.RNGD(torch.nn.Linear(2, 2).parameters())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TypeError: model must be a torch.nn.Module, got generator" in run.stderr
    assert "write RNGD(model), not RNGD(model.parameters())" in run.stderr
