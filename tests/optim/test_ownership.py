"""Every tensor in a state has one owner, and a state is checked against the owners before anything is loaded."""

import copy
import warnings

import pytest
import torch
from builders import inputs, mlp, step, train
from torch import nn

from relfisher import RNGD, Layer, MetricOptions, StepRule
from relfisher.layers import Part, Rows
from relfisher.optim.rules import Step
from relfisher.responses import ActivationGaussian, TanhBernoulli
from relfisher.structures import Kept


class Greedy(StepRule):
    name = "greedy"
    default_lr = 0.1

    def declares(self, shape):
        return {"metric": Kept(shape)}

    def steps(self, moves):
        return [Step(move.gradient, move.lr) for move in moves]


def test_a_rule_with_a_key_of_others_is_refused():
    with pytest.raises(ValueError, match="Greedy declares 'metric', which others keep under that name"):
        RNGD(mlp(), step_rule=Greedy())


class Halves(Layer):
    """Two layers in the rows of one weight, which would be one state."""

    kinds = (nn.Linear,)

    @classmethod
    def found_in(cls, name, module):
        pairs = [("low", lambda t: t[:2]), ("high", lambda t: t[2:])]
        return [cls(name, module, (Part("weight", view),), (2, 3), f".{side}") for side, view in pairs]

    def rows(self, call, sampling):
        return Rows(call.input(), self.pre_activation(call)[..., :2])


def test_layers_with_one_parameter_for_both_states_are_refused():
    with pytest.raises(ValueError, match="would keep their metrics with one parameter"):
        RNGD(nn.Linear(3, 4, bias=False), metric=MetricOptions(layers=[Halves]))


def test_a_state_from_before_the_first_step_resets_a_run():
    model = mlp()
    optimizer = RNGD(model)
    weights, start = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    first = train(model, optimizer, 4)
    model.load_state_dict(weights)
    optimizer.load_state_dict(start)
    assert train(model, optimizer, 4) == first


@pytest.mark.parametrize("key", ["metric", "root", "ema_weight", "is_head", "log_norm_stats"])
def test_a_state_that_lacks_something_changes_nothing(key):
    model = mlp()
    optimizer = RNGD(model)
    train(model, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0][key]
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"'0'"):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()["state"]
    for place, kept in before["state"].items():
        assert all(torch.equal(after[place][name], value) for name, value in kept.items())
    step(model, optimizer, inputs(7))


def test_a_layer_that_is_refused_after_it_ran_alone_is_left_to_adamw():
    class Reused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.b(self.a(x)) @ self.b.weight

    model, x = Reused(), torch.randn(5, 3)
    optimizer = RNGD(model)
    before = model.b.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.b(x).sum().backward()
        model(x).sum().backward()
        optimizer.step()
    assert optimizer.layers[1].role.refused is not None
    assert "exp_avg" in optimizer.state[model.b.weight]
    assert not torch.equal(before, model.b.weight)


class InPlace(nn.Module):
    def forward(self, z):
        return z.tanh_()


class Unhashable(ActivationGaussian):
    __hash__ = None


@pytest.mark.parametrize("response", [TanhBernoulli(), Unhashable(torch.tanh)], ids=["plain", "unhashable"])
def test_an_activation_of_ones_own_may_work_in_place(response):
    model = nn.Sequential(nn.Linear(3, 2), InPlace(), nn.Linear(2, 1))
    optimizer = RNGD(model, responses={InPlace: response})
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert optimizer.layers[0].role.response == response
