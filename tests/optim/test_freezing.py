"""Frozen parameters, and what is not given: they stay, and are no part of the metric of the others."""

import torch
from builders import inputs, mlp, moved, moves, normed_mlp, step, structures, train
from torch import nn

from relfisher import RNGD, TrustRegion


def test_what_is_frozen_later_stays_and_what_is_unfrozen_later_moves():
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = RNGD(model)
    assert moved(model, optimizer, inputs()) == {"2.weight", "2.bias", "4.weight", "4.bias"}
    model[0].requires_grad_(True)
    model[2].bias.requires_grad_(False)
    model[4].weight.requires_grad_(False)
    assert moved(model, optimizer, inputs()) == {"0.weight", "0.bias", "2.weight", "4.bias"}
    assert structures(optimizer).keys() == {"0", "2", "4"}


def test_frozen_bias_and_missing_gradients_stay_put():
    model = mlp(nn.ReLU)
    model[0].bias.requires_grad_(False)
    bias, optimizer = model[0].bias.clone(), RNGD(model)
    train(model, optimizer, 3)
    assert torch.equal(model[0].bias, bias)
    before = model[4].weight.detach().clone()
    optimizer.zero_grad()
    model[:4](inputs()).sum().backward()
    optimizer.step()
    assert torch.equal(model[4].weight, before)


def test_what_is_not_given_stays_and_is_no_part_of_the_metric():
    """Weights alone move as if the biases were frozen."""
    model, frozen = normed_mlp(), normed_mlp()
    optimizer = RNGD(model, params=[parameter for parameter in model.parameters() if parameter.ndim > 1])
    for parameter in frozen.parameters():
        parameter.requires_grad_(parameter.ndim > 1)
    twin = RNGD(frozen)
    for seed in range(8):
        mine, theirs = moves(model, optimizer, inputs(seed)), moves(frozen, twin, inputs(seed))
        for name in mine:
            torch.testing.assert_close(mine[name], theirs[name])
            assert bool(mine[name].any()) == (mine[name].ndim > 1)


def test_a_frozen_part_is_left_out_at_once_when_it_is_frozen_later():
    model = normed_mlp()
    optimizer = RNGD(model, step_rule=TrustRegion(None))
    for seed in range(7):
        step(model, optimizer, inputs(seed))
    model[0].bias.requires_grad_(False)
    step(model, optimizer, inputs(8))
    inverse = optimizer.state[model[0].weight]["inverse"]
    assert not inverse[..., :-1, -1].any()
    model[0].bias.requires_grad_(True)
    step(model, optimizer, inputs(9))
    assert optimizer.state[model[0].weight]["inverse"][..., :-1, -1].all()


def test_bias_alone_moves_in_its_own_metric():
    """With the weight frozen a linear unit's metric about its bias is 1, whatever the inputs."""
    model = mlp(sizes=(6, 3))
    model[0].weight.requires_grad_(False)
    optimizer = RNGD(model, lr=0.5, damping=0.0, step_rule=TrustRegion(None))
    before = model[0].bias.detach().clone()
    step(model, optimizer, inputs())
    torch.testing.assert_close(model[0].bias.detach(), before - 0.5 * model[0].bias.grad)


def test_biases_that_alone_are_given_move_as_those_of_frozen_weights_do():
    """In their own metric, which is there before the first step, whether the weights are frozen or just not given."""
    whole, filtered, unfrozen = normed_mlp(), normed_mlp(), normed_mlp()
    for model in (whole, filtered):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))
    one = RNGD(whole, momentum=0.5)
    biases = [[p for name, p in model.named_parameters() if name.endswith("bias")] for model in (filtered, unfrozen)]
    others = [RNGD(model, params=p, momentum=0.5) for model, p in zip((filtered, unfrozen), biases, strict=True)]
    for other in others:
        assert [group["kind"] for group in other.param_groups] == ["metric"]
        assert all("metric" in other.state[parameter] for parameter in other.param_groups[0]["params"])
    for seed in range(8):
        expected = moves(whole, one, inputs(seed))
        assert expected["0.bias"].any()
        assert not expected["0.weight"].any()
        for model, other in zip((filtered, unfrozen), others, strict=True):
            for name, move in moves(model, other, inputs(seed)).items():
                torch.testing.assert_close(move, expected[name])
    twin = normed_mlp()
    last = RNGD(twin, params=[p for name, p in twin.named_parameters() if name.endswith("bias")], momentum=0.5)
    twin.load_state_dict(filtered.state_dict())
    last.load_state_dict(others[0].state_dict())
    assert step(twin, last, inputs(8)) == step(filtered, others[0], inputs(8))
    assert step(twin, last, inputs(9)) == step(filtered, others[0], inputs(9))


def test_frozen_layers_take_no_state():
    model = normed_mlp()
    model[0].requires_grad_(False)
    optimizer = RNGD(model)
    assert model[0].weight not in optimizer.state
    step(model, optimizer, inputs())
    assert model[0].weight not in optimizer.state or not optimizer.state[model[0].weight]
