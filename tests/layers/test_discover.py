"""Which layers have a metric of their own, and why others have none."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from relfisher.layers import discover


def names(model: nn.Module) -> list[str]:
    return [layer.name for layer in discover(model).layers]


def test_all_layers_in_the_order_of_registration() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model = nn.ModuleDict({"b": nn.Linear(2, 2), "a": inner, "c": nn.Conv1d(2, 2, 1)})
    assert names(model) == ["b", "a.0", "a.1", "c"]


def test_a_frozen_layer_is_listed_since_it_may_be_unfrozen_later() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    assert names(model) == ["0", "1"]


def tied(*owners: nn.Module) -> nn.ModuleList:
    """Return modules with one weight, and a linear layer."""
    for owner in owners[1:]:
        owner.weight = owners[0].weight
    return nn.ModuleList([*owners, nn.Linear(3, 3)])


@pytest.mark.parametrize(
    "owners",
    [
        (nn.Linear(3, 5), nn.Linear(3, 5)),
        (nn.Embedding(5, 3), nn.Embedding(5, 3)),
        (nn.Embedding(5, 3), nn.Linear(3, 5), nn.Linear(3, 5)),
        (nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 5)),
        (nn.Embedding(5, 3, scale_grad_by_freq=True), nn.Linear(3, 5)),
        (nn.EmbeddingBag(5, 3), nn.Linear(3, 5)),
    ],
)
def test_a_tied_weight_has_no_layer_of_its_own(owners) -> None:
    model = tied(*owners)
    found = discover(model)
    assert [layer.name for layer in found.layers] == [str(len(owners))]
    weights = " and ".join(f"{place}.weight" for place in range(len(owners)))
    assert found.refused["0.weight"] == f"tied: {weights} are one parameter"


class Scaled(nn.Embedding):
    """As of BART and Gemma."""

    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


@pytest.mark.parametrize(
    ("owners", "head"),
    [
        ((Scaled(5, 3), nn.Linear(3, 5)), "1"),
        ((nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)), "1"),
        ((nn.Linear(3, 5), nn.Embedding(5, 3, padding_idx=0)), "0"),
        ((nn.Embedding(5, 3), nn.Embedding(5, 3), nn.Linear(3, 5)), "2"),
    ],
)
def test_a_head_that_is_tied_to_embeddings_is_their_layer(owners, head) -> None:
    found = discover(tied(*owners))
    assert [layer.name for layer in found.layers] == [head, str(len(owners))]
    assert found.refused == {}


def test_one_module_under_two_names_is_one_layer() -> None:
    layer = nn.Linear(2, 2)
    assert names(nn.ModuleDict({"first": layer, "again": layer})) == ["first"]


def test_a_parametrized_weight_belongs_to_its_layer() -> None:
    found = discover(nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2)))
    inside = "0.parametrizations.weight.original"
    assert [layer.parameter_names for layer in found.layers] == [
        [f"{inside}1", f"{inside}0", "0.bias"],
        ["1.weight", "1.bias"],
    ]
    assert found.refused == {}


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Doubled(nn.Linear):
    """A layer of another function, with a linear operation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_modules_that_compute_otherwise_are_refused_with_the_reason() -> None:
    replaced = nn.Linear(2, 2)
    forward = replaced.forward
    replaced.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    found = discover(nn.Sequential(Standardised(2, 3, 3), Doubled(2, 2), replaced, nn.Linear(2, 2)))
    operations = [("0", "conv2d"), ("1", "linear"), ("1.bias", "add"), ("3", None)]
    assert [(layer.name, layer.operation) for layer in found.layers] == operations
    assert found.refused["2.weight"] == found.refused["2.bias"] == "its forward was replaced"


def test_what_accelerate_puts_around_forward_changes_nothing() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(2, 2))
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="cpu"))
    assert "forward" in vars(model[0])
    assert names(model) == ["0"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_layers_without_entries_are_left_out():
    found = discover(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3), nn.Linear(3, 2)))
    assert [layer.name for layer in found.layers] == ["2"]
    assert set(found.refused.values()) == {"a parameter of its module is empty"}


def test_complex_parameters_are_refused_with_the_reason():
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.filters = nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))

    found = discover(nn.Sequential(Spectrum(), nn.Linear(2, 2)))
    assert [layer.name for layer in found.layers] == ["1"]
    assert found.refused == {"0.filters": "its dtype is torch.complex64"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_and_traced_models_are_refused():
    scripted = torch.jit.script(nn.Linear(2, 3))
    traced = torch.jit.trace(nn.Linear(2, 3), torch.ones(1, 2))
    for model in (scripted, nn.Sequential(nn.Linear(2, 2), traced)):
        with pytest.raises(TypeError, match=r"compiled by torch\.jit: train the original"):
            discover(model)
