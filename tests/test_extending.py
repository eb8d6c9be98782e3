"""The four examples of the page on extending run, and the registries refuse what they cannot use."""

import inspect
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import relfisher
from relfisher import RNGD, Layer, MetricOptions, StepRule, Structure
from relfisher.layers import discover
from relfisher.observe import activations
from relfisher.optim import assignment
from relfisher.optim.rules import choice
from relfisher.responses import LinearGaussian, TanhBernoulli

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch):
    """Let each test register what it likes, for itself alone."""
    for owner, name in [(assignment, "_NAMED"), (choice, "_NAMED"), (activations, "_REGISTERED")]:
        monkeypatch.setattr(owner, name, dict(getattr(owner, name)))
    layers = sys.modules[discover.__module__]
    monkeypatch.setattr(layers, "_REGISTERED", list(layers._REGISTERED))


@pytest.mark.parametrize("snippet", SNIPPETS, ids=["activation", "structure", "rule", "layer"])
def test_examples_run(snippet):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(snippet, "extending.md", "exec"), {})


class Twice(nn.Module):
    """z = 2 W x, which no kind of the library knows."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 3))

    def forward(self, x):
        return 2 * x @ self.matrix.T


class TwiceLayer(Layer):
    kinds = (Twice,)

    @classmethod
    def found_in(cls, name, module):
        return [cls(name, module, (relfisher.layers.Part("matrix", relfisher.layers.whole),), (2, 3))]

    def rows(self, call, sampling):
        x, z = sampling.rows(2 * call.input(), self.pre_activation(call))
        return relfisher.layers.Rows(x, z)


def test_a_layer_kind_is_known_where_it_was_given_or_everywhere_once_registered():
    model = nn.Sequential(Twice())
    assert [layer.name for layer in discover(model).layers] == ["0.matrix"]
    assert [layer.name for layer in discover(model, [TwiceLayer]).layers] == ["0"]
    optimizer = RNGD(model, metric=MetricOptions(layers=[TwiceLayer]))
    assert [layer.name for layer in optimizer.layers] == ["0"]
    relfisher.register_layer(TwiceLayer)
    assert [layer.name for layer in discover(model).layers] == ["0"]


def test_a_response_for_one_optimizer_wins_over_a_registered_one():
    class Odd(nn.Module):
        def forward(self, z):
            return z**3

    relfisher.register_activation(Odd, TanhBernoulli())
    found = []
    for responses in (None, {Odd: LinearGaussian(2.0)}):
        model = nn.Sequential(nn.Linear(3, 2), Odd(), nn.Linear(2, 1))
        with RNGD(model, responses=responses) as optimizer:
            model(torch.ones(4, 3)).sum().backward()
            optimizer.step()
            found.append(optimizer.layers[0].role.response)
    assert found == [TanhBernoulli(), LinearGaussian(2.0)]


def test_a_response_may_be_made_of_the_module():
    class Scaled(nn.Module):
        def __init__(self, sigma):
            super().__init__()
            self.sigma = sigma

        def forward(self, z):
            return z / self.sigma

    model = nn.Sequential(nn.Linear(3, 2), Scaled(3.0), nn.Linear(2, 1))
    optimizer = RNGD(model, responses={Scaled: lambda module: LinearGaussian(module.sigma)})
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert optimizer.layers[0].role.response == LinearGaussian(3.0)


class Nameless(StepRule):
    def steps(self, moves):
        return []


class Taken(StepRule):
    name = "spectral"

    def steps(self, moves):
        return []


@pytest.mark.parametrize(
    ("register", "given", "kind", "message"),
    [
        (relfisher.register_layer, nn.Linear, TypeError, "a layer kind must be a subclass of Layer"),
        (relfisher.register_structure, nn.Linear, TypeError, "a structure must be a subclass of Structure"),
        (relfisher.register_structure, Structure, TypeError, "a structure must be a subclass of Structure with a name"),
        (relfisher.register_rule, Nameless, TypeError, "a step rule must be a subclass of StepRule with a name"),
        (relfisher.register_rule, Taken, ValueError, "the name of a step rule must be a new one, got 'spectral'"),
    ],
)
def test_what_cannot_be_registered_is_named(register, given, kind, message):
    with pytest.raises(kind, match=message):
        inspect.unwrap(register)(given)  # past the type checker of the tests


def test_a_registered_structure_is_chosen_by_its_name():
    class Doubled(relfisher.structures.Diagonal):
        name = "doubled"

    relfisher.register_structure(Doubled)
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = RNGD(model, metric=MetricOptions(structure={"0": "doubled"}))
    model(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    assert type(optimizer.layers[0].structure) is Doubled
