"""Which layers have a metric of their own, and what is seen of the functions that take their outputs."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from relfisher.responses import ActivationGaussian, LinearGaussian, ReLUGaussian, TanhBernoulli
from relfisher.subsystems import ActivationWatch, discover


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in discover(model).subsystems]


def test_all_layers_in_the_order_of_registration() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model = nn.ModuleDict({"b": nn.Linear(2, 2), "a": inner, "c": nn.Conv1d(2, 2, 1)})
    assert names(model) == ["b", "a.0", "a.1", "c"]


def test_a_frozen_layer_is_listed_since_it_may_be_unfrozen_later() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    assert names(model) == ["0", "1"]


def test_a_tied_weight_has_no_layer_of_its_own() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5), "other": nn.Linear(3, 3)})
    model["head"].weight = model["embedding"].weight
    assert names(model) == ["other"]


def test_one_module_under_two_names_is_one_layer() -> None:
    layer = nn.Linear(2, 2)
    assert names(nn.ModuleDict({"first": layer, "again": layer})) == ["first"]


def test_a_parametrized_weight_has_no_layer_of_its_own() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert names(model) == ["1"]


def watched(*functions) -> ActivationWatch:
    """Return a watch that saw the functions take one pre-activation, one after another."""
    watch = ActivationWatch()
    z = torch.linspace(-1, 1, 6).reshape(2, 3)
    with watch:
        watch.show("layer", z)
        for function in functions:
            function(z)
    return watch


def test_the_one_activation_that_takes_the_pre_activation() -> None:
    assert watched(torch.tanh).response("layer") == TanhBernoulli()
    assert watched(torch.tanh, torch.tanh).response("layer") == TanhBernoulli()


def test_two_takers_make_a_linear_response() -> None:
    assert watched(torch.tanh, torch.relu).response("layer") == LinearGaussian()
    assert watched(torch.tanh, lambda z: z + 1).response("layer") == LinearGaussian()


def test_no_taker_makes_a_linear_response() -> None:
    assert watched().response("layer") == LinearGaussian()
    assert watched().response("never shown") == LinearGaussian()


def test_looking_at_a_tensor_takes_it_nowhere() -> None:
    watch = watched(lambda z: z.shape, lambda z: z.requires_grad, lambda z: z.detach(), lambda z: z.size(0), torch.relu)
    assert watch.response("layer") == ReLUGaussian()


def test_what_follows_an_in_place_activation_is_not_a_taker() -> None:
    watch = watched(torch.relu_, lambda z: z @ z.T, torch.tanh)
    assert watch.response("layer") == ReLUGaussian()
    assert watch.untold("layer") == []


def test_equal_options_make_equal_responses() -> None:
    twice = watched(lambda z: functional.softplus(z, 2.0), lambda z: functional.softplus(z, 2.0))
    assert isinstance(twice.response("layer"), ActivationGaussian)
    differently = watched(lambda z: functional.softplus(z, 2.0), lambda z: functional.softplus(z, 3.0))
    assert differently.response("layer") == LinearGaussian()


def test_an_activation_in_another_argument_is_not_one_of_the_pre_activation() -> None:
    watch = watched(lambda z: torch.where(z > 0, z, 0.0))
    assert watch.response("layer") == LinearGaussian()


def test_takers_that_are_neither_activations_nor_joins_are_told() -> None:
    watch = watched(torch.digamma, lambda z: z + 1, lambda z: 1 - z, lambda z: torch.cumsum(z, 0))
    assert watch.untold("layer") == ["cumsum", "digamma"]


def test_tensors_inside_lists_are_seen() -> None:
    watch = watched(lambda z: torch.vstack([z, z]))
    assert watch.untold("layer") == ["vstack"]


def test_nothing_is_seen_outside_the_watch_or_after_forgetting() -> None:
    watch = ActivationWatch()
    z = torch.ones(2)
    watch.show("layer", z)
    torch.relu(z)
    with watch:
        watch.forget()
        torch.tanh(z)
    assert watch.response("layer") == LinearGaussian()
