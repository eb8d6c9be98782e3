"""What is seen of the functions that take the outputs of layers, while a model runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from relfisher.layers import Call, LinearLayer
from relfisher.observe import Trace
from relfisher.responses import ActivationGaussian, LinearGaussian, ReLUGaussian, TanhBernoulli

LAYER, OTHER = (LinearLayer.found_in(name, nn.Linear(2, 3))[0] for name in ("layer", "other"))
NEXT = LinearLayer.found_in("next", nn.Linear(3, 4))[0]
WEIGHT = NEXT.module.weight


def watched(*functions) -> Trace:
    """Return a trace that saw the functions take one pre-activation, one after another."""
    watch = Trace([NEXT])
    z = torch.linspace(-1, 1, 6).reshape(2, 3)
    with watch:
        watch.show(LAYER, Call((), {}, z), z)
        for function in functions:
            function(z)
    return watch


def test_the_one_activation_that_takes_the_pre_activation() -> None:
    assert watched(torch.tanh).takers.response(LAYER) == TanhBernoulli()
    assert watched(torch.tanh, torch.tanh).takers.response(LAYER) == TanhBernoulli()


def test_two_takers_make_a_linear_response() -> None:
    assert watched(torch.tanh, torch.relu).takers.response(LAYER) == LinearGaussian()
    assert watched(torch.tanh, lambda z: z + 1).takers.response(LAYER) == LinearGaussian()


def test_no_taker_makes_a_linear_response() -> None:
    assert watched().takers.response(LAYER) == LinearGaussian()
    assert watched().takers.response(OTHER) == LinearGaussian()


def test_looking_at_a_tensor_takes_it_nowhere() -> None:
    watch = watched(lambda z: z.shape, lambda z: z.requires_grad, lambda z: z.detach(), lambda z: z.size(0), torch.relu)
    assert watch.takers.response(LAYER) == ReLUGaussian()


@pytest.mark.parametrize(
    "make",
    [
        *(torch.empty_like, torch.zeros_like, torch.ones_like, torch.rand_like, torch.randn_like),
        lambda z: torch.full_like(z, 2.0),
        lambda z: torch.randint_like(z, 5),
        lambda z: z.new_empty(3),
        lambda z: z.new_zeros(3),
        lambda z: z.new_ones(3),
        lambda z: z.new_full((3,), 2.0),
        lambda z: z.new_tensor([1.0]),
    ],
)
def test_making_a_tensor_of_its_shape_takes_it_nowhere(make) -> None:
    watch = watched(make, torch.relu)
    assert watch.takers.response(LAYER) == ReLUGaussian()
    assert watch.takers.unresolved(LAYER) == []


def test_what_follows_an_in_place_activation_is_not_a_taker() -> None:
    watch = watched(torch.relu_, lambda z: z @ z.T, lambda z: torch.cumsum(z, 0))
    assert watch.takers.response(LAYER) == ReLUGaussian()
    assert watch.takers.unresolved(LAYER) == []


def test_equal_options_make_equal_responses() -> None:
    twice = watched(lambda z: functional.softplus(z, 2.0), lambda z: functional.softplus(z, 2.0))
    assert isinstance(twice.takers.response(LAYER), ActivationGaussian)
    differently = watched(lambda z: functional.softplus(z, 2.0), lambda z: functional.softplus(z, 3.0))
    assert differently.takers.response(LAYER) == LinearGaussian()


def test_an_activation_in_another_argument_is_not_one_of_the_pre_activation() -> None:
    watch = watched(lambda z: torch.where(z > 0, z, 0.0))
    assert watch.takers.response(LAYER) == LinearGaussian()


def test_takers_that_are_neither_activations_nor_joins_are_told() -> None:
    watch = watched(torch.digamma, lambda z: z + 1, lambda z: 1 - z, lambda z: torch.cumsum(z, 0))
    assert watch.takers.unresolved(LAYER) == ["cumsum", "digamma"]


def test_tensors_inside_lists_are_seen() -> None:
    watch = watched(lambda z: torch.vstack([z, z]))
    assert watch.takers.unresolved(LAYER) == ["vstack"]


def test_nothing_is_seen_outside_the_watch_or_after_forgetting() -> None:
    watch = Trace()
    z = torch.ones(2)
    watch.show(LAYER, Call((), {}, z), z)
    torch.relu(z)
    with watch:
        watch.forget()
        torch.tanh(z)
    assert watch.takers.response(LAYER) == LinearGaussian()


def test_the_linear_function_that_takes_the_activated_units() -> None:
    assert watched(lambda z: functional.linear(torch.tanh(z), WEIGHT)).takers.following(LAYER) is NEXT


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
    assert watched(lambda z: functional.linear(between(torch.relu(z)), WEIGHT)).takers.following(LAYER) is NEXT


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
    assert watched(lambda z: function(torch.tanh(z))).takers.following(LAYER) is None


def test_units_before_their_activation_have_no_following_layer() -> None:
    assert watched(lambda z: functional.linear(z, WEIGHT)).takers.following(LAYER) is None
    both = watched(lambda z: functional.linear(torch.tanh(z), WEIGHT), lambda z: z + 1)
    assert both.takers.following(LAYER) is None


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda z: functional.softmax(z, -1), True),
        (lambda z: z.log_softmax(dim=1), True),
        (lambda z: functional.cross_entropy(z, torch.tensor([0, 2])), True),
        (lambda z: functional.cross_entropy(z.float().view(-1, 3), torch.tensor([0, 2])), True),
        (lambda z: functional.softmax(z, 0), False),
        (lambda z: functional.cross_entropy(z.view(1, 3, 2), torch.zeros(1, 2, dtype=torch.long)), False),
        (lambda z: functional.mse_loss(z, torch.ones(2, 3)), False),
        (lambda z: (torch.tanh(z), z.softmax(-1)), False),
        (torch.detach, False),
    ],
)
def test_a_softmax_of_the_units_inside_the_forward_pass(function: Callable[[Tensor], object], told: bool) -> None:
    assert watched(function).takers.is_softmax(LAYER) == told


def test_an_output_goes_nowhere() -> None:
    assert watched(torch.detach).takers.is_output(LAYER)
    assert not watched(torch.relu).takers.is_output(LAYER)
    assert not watched().takers.is_output(OTHER)
