"""Layers never change, and find their parameters by name."""

import copy
from dataclasses import FrozenInstanceError

import pytest
import torch
from builders import every_kind
from torch import nn

from relfisher.layers import Layer, LinearLayer, Part, Rows, discover
from relfisher.testing import check_layer


def test_a_layer_does_not_change():
    (layer,) = LinearLayer.found_in("a", nn.Linear(2, 3))
    for name in ("shape", "module", "parts", "suffix"):
        with pytest.raises(FrozenInstanceError):
            setattr(layer, name, None)


def test_parameters_are_those_that_stand_under_their_names():
    module = nn.Linear(2, 3)
    (layer,) = LinearLayer.found_in("a.b", module)
    assert layer.parameter_names == ["a.b.weight", "a.b.bias"]
    module.weight = nn.Parameter(torch.ones(3, 2))
    assert layer.weight is module.weight
    assert layer.parameters == [module.weight, module.bias]
    twin, copied = copy.deepcopy((module, layer))
    assert copied.weight is twin.weight
    assert copied.weight is not module.weight


def test_names_lead_to_the_parameters_in_the_model():
    model = every_kind()
    named = dict(model.named_parameters())
    for layer in discover(model).layers:
        for name, parameter in zip(layer.parameter_names, layer.parameters, strict=True):
            assert named[name] is parameter


def test_joining_is_the_inverse_of_splitting():
    for layer in discover(every_kind()).layers:
        matrix = torch.arange(float(torch.tensor(layer.shape).prod())).reshape(layer.shape)
        columns = [each.flatten(len(layer.shape) - 1) for each in layer.split(matrix)]
        assert torch.equal(torch.cat(columns, -1), matrix)
        assert layer.join(layer.parameters).shape == layer.shape


class Wrong(LinearLayer):
    def rows(self, call, sampling):
        rows = super().rows(call, sampling)
        return Rows(1.01 * rows.x, rows.z)


class Transposed(LinearLayer):
    @classmethod
    def found_in(cls, name, module):
        return [cls(name, module, (Part("weight", torch.t),), tuple(module.weight.shape))]


@pytest.mark.parametrize(
    ("kind", "message"), [(Wrong, r"z against W x~ is off by"), (Transposed, r"must have the shape \(3, 2\)")]
)
def test_the_check_sees_what_is_wrong(kind, message):
    with pytest.raises(AssertionError, match=message):
        check_layer(kind, nn.Linear(2, 3), torch.randn(5, 2))


@pytest.mark.parametrize(
    ("module", "x"),
    [
        (nn.Linear(2, 3), torch.randn(5, 2)),
        (nn.Conv2d(2, 4, 3, groups=2), torch.randn(2, 2, 5, 5)),
        (nn.LayerNorm(4), torch.randn(5, 4)),
        (nn.Bilinear(2, 3, 2), (torch.randn(4, 2), torch.randn(4, 3))),
    ],
    ids=["linear", "conv", "norm", "bilinear"],
)
def test_layers_of_the_library_pass(module, x):
    (found,) = discover(nn.Sequential(module)).layers
    kind: type[Layer] = type(found)
    check_layer(kind, module, x)
