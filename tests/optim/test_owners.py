"""An optimizer that is given parameters finds the model that owns them, and takes the steps of one for that model."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch
from builders import assert_same_weights, inputs, mlp, normed_mlp
from torch import nn

from relfisher import RNGD
from relfisher.optim.owners import OwnerWarning

found = pytest.mark.filterwarnings("ignore:RNGD observes:UserWarning")


def trained(model, optimizer, call=None, steps=12):
    for seed in range(steps):
        x = inputs(seed=seed)
        optimizer.zero_grad()
        (call or model)(x).square().sum().backward()
        optimizer.step()
    return optimizer


@found
@pytest.mark.parametrize(
    "given",
    [
        nn.Module.parameters,
        nn.Module.named_parameters,
        lambda model: [{"params": list(model.parameters())}],
        lambda model: [{"params": list(model.named_parameters()), "weight_decay": 0.1}],
        lambda model: ({"params": model.parameters()} for _ in range(1)),
        lambda model: [{"params": parameter} for parameter in model.parameters()],
    ],
)
def test_parameters_take_the_steps_of_their_model(given):
    model = normed_mlp()
    twin = copy.deepcopy(model)
    trained(model, RNGD(model, lr=0.02))
    optimizer = trained(twin, RNGD(given(twin), lr=0.02))
    assert_same_weights(model, twin)
    assert [layer.name for layer in optimizer.layers] == ["0", "2", "3"]


def test_it_is_said_which_model_was_found():
    model = mlp()
    with pytest.warns(OwnerWarning, match="RNGD observes Sequential"):
        RNGD(model.parameters())


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


@found
def test_of_what_wraps_a_model_the_outermost_counts():
    wrapper = Wrapper(mlp())
    names = [layer.name for layer in RNGD(wrapper.model.parameters()).layers]
    assert names == ["model.0", "model.2", "model.4"]


@found
def test_a_part_of_a_model_is_found():
    model = nn.Sequential(mlp(), mlp(sizes=(3, 2)))
    assert [layer.name for layer in RNGD(model[1].parameters()).layers] == ["0"]


@found
def test_of_two_wrappers_neither_counts():
    model = mlp()
    wrappers = [Wrapper(model), Wrapper(model)]
    assert [layer.name for layer in RNGD(model.parameters()).layers] == ["0", "2", "4"]
    assert len(wrappers) == 2


@found
def test_several_models_are_observed_together():
    first, second = mlp(sizes=(6, 5)), mlp(sizes=(5, 4, 3), seed=1)
    copies = copy.deepcopy([first, second])
    optimizer = RNGD(itertools.chain(first.parameters(), second.parameters()), lr=0.02)
    trained(None, optimizer, lambda x: second(torch.tanh(first(x))))
    assert all(layer.role is not None for layer in optimizer.layers)
    assert not any(torch.equal(a, b) for a, b in zip(second.parameters(), copies[1].parameters(), strict=True))
    twin = copy.deepcopy(optimizer)
    assert [layer.name for layer in twin.layers] == [layer.name for layer in optimizer.layers]


@found
def test_a_state_of_the_model_can_be_loaded_before_the_first_step():
    model = mlp()
    optimizer = trained(model, RNGD(model))
    twin = copy.deepcopy(model)
    other = RNGD(twin.parameters())
    other.load_state_dict(optimizer.state_dict())
    trained(model, optimizer, steps=5)
    trained(twin, other, steps=5)
    assert_same_weights(model, twin)


def test_what_is_in_no_module_is_refused():
    with pytest.raises(ValueError, match="1 of the 1 are in no module"):
        RNGD([nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match="at least one parameter, got none"):
        RNGD([])


def test_two_ways_of_giving_parameters_are_refused():
    model = mlp()
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module if params"):
        RNGD(model.parameters(), params=model.parameters())


def test_modules_that_share_all_parameters_cannot_be_told_apart():
    model = mlp()
    twin = copy.copy(model)
    with pytest.raises(ValueError, match="in several modules alike, Sequential and Sequential"):
        RNGD(model.parameters())
    assert twin[0] is model[0]


def test_what_is_no_model_is_explained():
    """In a process of its own, where no type checker of the tests speaks first."""
    code = "import relfisher; relfisher.RNGD(3)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "TypeError: model must be a torch.nn.Module, or its parameters, got 3" in run.stderr


def test_models_of_deepspeed_are_refused_by_name():
    marked = mlp()
    marked[0].weight.ds_id = 0
    engine = nn.Sequential(mlp())
    engine.__class__ = type("Engine", (nn.Sequential,), {"__module__": "deepspeed.runtime.engine"})
    for model in (marked, engine):
        with pytest.raises(ValueError, match=r"DeepSpeed keeps them: use fully_shard"):
            RNGD(model)
