"""Which layers have a metric of their own, and what is seen of the functions that take their outputs."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from relfisher.responses import ActivationGaussian, LinearGaussian, ReLUGaussian, TanhBernoulli
from relfisher.subsystems import ActivationWatch, discover
from relfisher.subsystems.roles import is_softmax_gradient


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
    assert [layer.name for layer in found.subsystems] == [str(len(owners))]
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
    assert [layer.name for layer in found.subsystems] == [head, str(len(owners))]
    assert found.refused == {}


def test_one_module_under_two_names_is_one_layer() -> None:
    layer = nn.Linear(2, 2)
    assert names(nn.ModuleDict({"first": layer, "again": layer})) == ["first"]


def test_a_parametrized_weight_has_no_layer_of_its_own() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.Linear(2, 2))
    assert names(model) == ["1"]


class Standardised(nn.Conv2d):
    """A convolution whose weight has mean 0."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class Doubled(nn.Linear):
    """A layer of another function."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_modules_that_compute_otherwise_are_refused_with_the_reason() -> None:
    replaced = nn.Linear(2, 2)
    forward = replaced.forward
    replaced.forward = lambda x: 2 * forward(x)  # type: ignore[method-assign]
    found = discover(nn.Sequential(Standardised(2, 3, 3), Doubled(2, 2), replaced, nn.Linear(2, 2)))
    assert [layer.name for layer in found.subsystems] == ["3"]
    assert found.refused["0.weight"] == "Standardised has a _conv_forward of its own"
    assert found.refused["1.weight"] == "Doubled has a forward of its own"
    assert found.refused["2.weight"] == found.refused["2.bias"] == "its forward was replaced"


def test_what_accelerate_puts_around_forward_changes_nothing() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = nn.Sequential(nn.Linear(2, 2))
    hooks.add_hook_to_module(model[0], hooks.AlignDevicesHook(execution_device="cpu"))
    assert "forward" in vars(model[0])
    assert names(model) == ["0"]


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


WEIGHT = torch.ones(4, 3)


def test_the_linear_function_that_takes_the_activated_units() -> None:
    assert watched(lambda z: functional.linear(torch.tanh(z), WEIGHT)).following("layer") is WEIGHT


@pytest.mark.parametrize(
    "between",
    [
        lambda a: functional.dropout(a, 0.5),
        lambda a: a.double().float(),
        lambda a: a.view(2, 1, 3),
        lambda a: a.contiguous().clone(),
    ],
)
def test_what_leaves_the_units_along_the_last_axis_is_on_the_way(between: Callable[[Tensor], Tensor]) -> None:
    assert watched(lambda z: functional.linear(between(torch.relu(z)), WEIGHT)).following("layer") is WEIGHT


@pytest.mark.parametrize(
    "function",
    [
        lambda a: functional.layer_norm(a, (3,)),
        lambda a: functional.linear(a.reshape(3, 2), torch.ones(4, 2)),
        lambda a: functional.linear(a + 1, WEIGHT),
        lambda a: functional.linear(WEIGHT, a),
        lambda a: (functional.linear(a, WEIGHT), a + 1),
        lambda a: (functional.linear(a, WEIGHT), functional.linear(a, torch.ones(4, 3))),
        lambda a: a @ WEIGHT.T,
    ],
)
def test_units_that_go_elsewhere_have_no_following_layer(function: Callable[[Tensor], object]) -> None:
    assert watched(lambda z: function(torch.tanh(z))).following("layer") is None


def test_units_before_their_activation_have_no_following_layer() -> None:
    assert watched(lambda z: functional.linear(z, WEIGHT)).following("layer") is None
    both = watched(lambda z: functional.linear(torch.tanh(z), WEIGHT), lambda z: z + 1)
    assert both.following("layer") is None


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda z: functional.softmax(z, -1), True),
        (lambda z: z.log_softmax(dim=1), True),
        (lambda z: functional.cross_entropy(z, torch.tensor([0, 2])), True),
        (lambda z: functional.cross_entropy(z.float().view(-1, 3), torch.tensor([0, 2])), True),
        (lambda z: functional.softmax(z, 0), False),
        (lambda z: functional.cross_entropy(z.view(1, 3, 2), torch.zeros(1, 2, dtype=torch.long)), False),
        (lambda z: functional.mse_loss(z, WEIGHT[:2]), False),
        (lambda z: (torch.tanh(z), z.softmax(-1)), False),
        (torch.detach, False),
    ],
)
def test_a_softmax_of_the_units_inside_the_forward_pass(function: Callable[[Tensor], object], told: bool) -> None:
    assert watched(function).is_softmax("layer") == told


def test_an_output_goes_nowhere() -> None:
    assert watched(torch.detach).is_output("layer")
    assert not watched(torch.relu).is_output("layer")
    assert not watched().is_output("never shown")


Loss = Callable[[Tensor, Tensor], Tensor]


def one_hot(y: Tensor, z: Tensor) -> Tensor:
    """Return the classes as rows like those of z."""
    return functional.one_hot(y, z.shape[-1]).to(z)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("loss", "told"),
    [
        (functional.cross_entropy, True),
        (partial(functional.cross_entropy, label_smoothing=0.1, reduction="sum"), True),
        (lambda z, y: 1000 * functional.cross_entropy(z, y), True),
        (lambda z, y: functional.kl_div(z.log_softmax(-1), one_hot(y, z), reduction="batchmean"), True),
        (lambda z, y: functional.mse_loss(z, one_hot(y, z)), False),
        (lambda z, y: functional.binary_cross_entropy_with_logits(z, one_hot(y, z)), False),
        (lambda z, y: 0 * functional.cross_entropy(z, y), False),
    ],
)
def test_gradients_tell_a_loss_of_the_softmax(loss: Loss, told: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    z = (3 * torch.randn(2, 8, 6, generator=generator)).to(dtype).requires_grad_()
    y = torch.randint(6, (16,), generator=generator)
    (gradient,) = torch.autograd.grad(loss(z.view(16, 6), y), z)
    assert is_softmax_gradient(gradient) == told


def test_rows_that_rounding_spoils_do_not_hide_a_softmax() -> None:
    """The gradient of a confident row is what rounding has left of 1 - p."""
    z = torch.zeros(2, 6)
    z[0, 0] = 16.0
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(z, torch.tensor([0, 1])), z)
    assert abs(float(gradient[0].sum())) > 1e-3 * float(gradient[0].abs().sum())
    assert is_softmax_gradient(gradient)
