"""Options by layer: names before roles, roles before patterns, patterns before classes; damping and power by layer."""

import pytest
import torch
from builders import inputs, mlp, step, train
from torch import nn

from relfisher import RNGD, Inversion, MetricOptions, TrustRegion
from relfisher.layers import discover
from relfisher.observe import Role
from relfisher.optim.matching import entry
from relfisher.optim.options import Inversions
from relfisher.responses import LinearGaussian

LAYERS = {layer.name: layer for layer in discover(nn.ModuleDict({"body": mlp(), "first": nn.Linear(2, 2)})).layers}
INPUT = Role(LinearGaussian(), reads_input=True)
HEAD = Role(LinearGaussian(), is_head=True)
HIDDEN = Role(LinearGaussian())


@pytest.mark.parametrize(
    ("options", "name", "role", "expected"),
    [
        ({"Linear": 1, "body.*": 2, "first": 3, "body.0": 4}, "body.0", INPUT, 4),
        ({"Linear": 1, "body.*": 2, "first": 3}, "body.0", INPUT, 3),
        ({"Linear": 1, "body.*": 2, "first": 3}, "body.2", HIDDEN, 2),
        ({"Linear": 1, "head": 3}, "body.4", HEAD, 3),
        ({"Linear": 1, "head": 3}, "body.4", HIDDEN, 1),
        ({"first": 3}, "body.0", None, None),
        ({"first": 3}, "first", HIDDEN, 3),
        ({"body.2": 1}, "body.0", HIDDEN, None),
    ],
)
def test_the_closest_key_counts(options, name, role, expected):
    assert entry(options, LAYERS[name], role) == expected


def test_damping_and_power_of_each_layer():
    inversions = Inversions({"first": 10.0, "body.2": Inversion(0.5, relative_to="absolute")}, {"head": 0.5})
    assert inversions.of(LAYERS["body.0"], INPUT, 0.1) == Inversion(10.0)
    assert inversions.of(LAYERS["body.2"], HIDDEN, 0.1) == Inversion(0.5, relative_to="absolute")
    assert inversions.of(LAYERS["body.4"], HEAD, 0.3) == Inversion(0.3, power=0.5)
    assert inversions.default == 0.1
    assert Inversions(Inversion(0.7), 1.0).of(LAYERS["body.0"], None, 0.2) == Inversion(0.2)


def expected_step(model, x, damping, power):
    """Return the natural gradient step of a single linear layer, by dense algebra."""
    augmented = torch.cat([x, x.new_ones(len(x), 1)], 1)
    moments = augmented.T @ augmented / len(x)
    values, vectors = torch.linalg.eigh(moments + damping * moments.trace() / len(moments) * torch.eye(7))
    gradient = torch.cat([model[0].weight.grad, model[0].bias.grad.unsqueeze(1)], 1)
    return gradient @ (vectors * values.pow(-power)) @ vectors.T


@pytest.mark.parametrize(
    ("damping", "power"),
    [(0.3, 1.0), ({"first": 0.3}, 1.0), (0.3, {"Linear": 0.25}), (Inversion(0.3, power=0.5), None), (0.3, 0.0)],
)
def test_a_step_takes_them(damping, power):
    torch.set_default_dtype(torch.float64)
    try:
        model, x = mlp(sizes=(6, 3)), inputs()
        options = MetricOptions(structure="shared", power=power)
        optimizer = RNGD(model, lr=1.0, damping=damping, step_rule=TrustRegion(None), metric=options)
        before = torch.cat([model[0].weight, model[0].bias.unsqueeze(1)], 1).detach().clone()
        step(model, optimizer, x)
        moved = before - torch.cat([model[0].weight, model[0].bias.unsqueeze(1)], 1).detach()
        wanted = power["Linear"] if isinstance(power, dict) else damping.power if power is None else power
        torch.testing.assert_close(moved, expected_step(model, x, 0.3, wanted))
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("power", [0.0, 0.5])
@pytest.mark.parametrize("rule", ["normalized", "spectral"])
def test_other_powers_learn(rule, power):
    model = mlp(nn.ReLU)
    losses = train(model, RNGD(model, lr=3e-2, step_rule=rule, metric=MetricOptions(power=power)), 60)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
