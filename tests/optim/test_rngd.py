"""RNGD as an optimizer: what it moves, what it bounds, and which arguments it takes."""

import math

import pytest
import torch
from builders import affine, assert_same_weights, batch, mlp, squared_length, train, weights
from hypothesis import given
from hypothesis import strategies as st
from reference import augment
from torch import nn

from relfisher import RNGD, AdamWOptions, Inversion, MetricOptions, TrustRegion
from relfisher.responses import LinearGaussian, SmoothReLUGaussian
from relfisher.structures import NeuronBlocks, SharedBlock


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.GELU])
@pytest.mark.parametrize("structure", ["auto", "neuron", "shared", "published"])
def test_learns(activation, structure):
    model = mlp(activation)
    losses = train(model, RNGD(model, lr=0.03, metric=MetricOptions(structure=structure)), 150)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


@pytest.mark.parametrize(("structure", "kind"), [("neuron", NeuronBlocks), ("shared", SharedBlock)])
def test_first_step_is_the_damped_inverse_times_the_gradient(structure, kind):
    """One step by hand: metric of the one batch, mean-trace damping, no bound."""
    model = mlp(nn.Tanh)
    before, (x, y) = list(weights(model).values()), batch()
    optimizer = RNGD(
        model, lr=0.1, damping=0.05, step_rule=TrustRegion(None), metric=MetricOptions(structure=structure)
    )
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    optimizer.step()
    h = x
    for place in range(3):
        weight, bias = before[2 * place], before[2 * place + 1]
        augmented = augment(h)
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
    model = mlp()
    optimizer = RNGD(
        model,
        lr,
        momentum=momentum,
        step_rule=TrustRegion(bound),
        metric=MetricOptions(structure=structure, stats_interval=1, refresh_interval=1),
    )
    for seed in range(4):
        before = weights(model)
        train(model, optimizer, 1, first=seed)
        after = weights(model)
        for place in (0, 2, 4):
            move = affine(after, place) - affine(before, place)
            assert squared_length(optimizer.state[model[place].weight], move) <= bound * (1 + 1e-6)


def test_momentum_does_not_share_memory_with_the_gradient():
    """A layer without a bias hands out its gradient as it is; clearing it in place must not clear the momentum."""
    model = mlp(sizes=(6, 3), bias=False)
    optimizer = RNGD(model, momentum=0.9)
    train(model, optimizer, 1)
    optimizer.zero_grad(set_to_none=False)
    assert float(optimizer.state[model[0].weight]["momentum"].norm()) > 0


def test_a_short_step_is_not_scaled():
    model, free = mlp(nn.ReLU), mlp(nn.ReLU)
    train(model, RNGD(model, lr=1e-3, step_rule=TrustRegion(1e6)), 3)
    train(free, RNGD(free, lr=1e-3, step_rule=TrustRegion(None)), 3)
    assert_same_weights(model, free)


def gated(z):
    return z * torch.sigmoid(z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, r"lr must lie in \(0, 1e\+06\], got 0.0"),
        ({"lr": math.nan}, r"lr must lie in \(0, 1e\+06\], got nan"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"averaging": -0.1}, r"averaging must lie in \[0, 1\], got -0.1"),
        ({"total_steps": 0}, "total_steps must be a whole number >= 1, got 0"),
        ({"damping": -1.0}, r"damping must lie in \[0, inf\), got -1.0"),
        ({"damping": {"nothing": 1.0}}, "damping names 'nothing', .* layer, pattern or class, nor one of first, head"),
        ({"damping": Inversion(rank=3)}, r"the rank belongs to the structure, as in SharedBlock\(3\)"),
        ({"weight_decay": -1.0}, r"weight_decay must lie in \[0, inf\), got -1.0"),
        ({"responses": {gated: LinearGaussian()}}, "a class of modules or a function of torch, got <function gated"),
        ({"responses": {nn.ReLU: SmoothReLUGaussian}}, "must be a UnitResponse, or make one of it"),
        ({"relu_omega": 1.0}, r"write responses=\{nn.ReLU: SmoothReLUGaussian\(omega\)\}"),
        ({"trust_region": 1.0}, r"write step_rule=TrustRegion\(bound\)"),
        ({"unbiased": True}, r"write metric=MetricOptions\(bias_correction=..., stagger=...\)"),
        ({"early_refreshes": ()}, r"write metric=MetricOptions\(warmup_refreshes=...\)"),
        ({"structure": "shared"}, r"write metric=MetricOptions\(structure=...\)"),
        ({"fallback_lr": 1.0}, r"write fallback=AdamWOptions\(lr=...\)"),
        ({"betas": (0.9, 0.9)}, r"write fallback=AdamWOptions\(betas=...\)"),
    ],
)
def test_arguments_outside_what_is_allowed_are_named(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        RNGD(mlp(nn.ReLU), **options)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (MetricOptions, {"decay": -0.1}, r"decay must lie in \[0, 1\), got -0.1"),
        (MetricOptions, {"stats_interval": 0}, "stats_interval must be a whole number >= 1, got 0"),
        (MetricOptions, {"refresh_interval": 0}, "refresh_interval must be a whole number >= 1, got 0"),
        (MetricOptions, {"warmup_refreshes": (-1,)}, "warmup_refreshes must be a whole number >= 0, got -1"),
        (MetricOptions, {"stats_samples": 0}, "stats_samples must be a whole number >= 1, got 0"),
        (MetricOptions, {"structure": "kron"}, "structure must be one of auto, neuron, .*, got 'kron'"),
        (MetricOptions, {"structure_bytes": 0}, "structure_bytes must be a finite number > 0, got 0"),
        (MetricOptions, {"power": 1.5}, r"power must lie in \[0, 1\], got 1.5"),
        (MetricOptions, {"power": {"first": -1.0}}, r"power must lie in \[0, 1\], got -1.0"),
        (AdamWOptions, {"lr": -1.0}, r"fallback.lr must lie in \(0, 1e\+06\], got -1.0"),
        (AdamWOptions, {"betas": (0.9, 1.0)}, r"fallback.betas must lie in \[0, 1\), got 1.0"),
        (AdamWOptions, {"eps": 0.0}, r"fallback.eps must lie in \[1.2e-38, inf\), got 0.0"),
        (TrustRegion, {"bound": 0.0}, "bound must be a finite number > 0, got 0.0"),
        (Inversion, {"damping": -1.0}, r"damping must lie in \[0, inf\), got -1.0"),
        (Inversion, {"power": 2.0}, r"power must lie in \[0, 1\], got 2.0"),
        (Inversion, {"rank": 0}, "rank must be a whole number >= 1, got 0"),
    ],
)
def test_groups_of_options_check_their_ranges(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
