"""The preconditioner before optimizers of torch: the same direction as RNGD, and nothing else touched."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from builders import assert_close_weights, inputs, is_hooked, mlp, squares, through_a_file

from relfisher import RNGD, MetricOptions, Preconditioner, TrustRegion
from relfisher.optim import HealthWarning


def network():
    return mlp(sizes=(6, 5, 3))


def backward(model, seed=0):
    model.zero_grad()
    loss = squares(model, inputs(seed))
    loss.backward()
    return loss.item()


def test_before_plain_gradient_descent_it_is_rngd_without_a_bound():
    one, two = network(), network()
    preconditioner, sgd = Preconditioner(one), torch.optim.SGD(one.parameters(), lr=0.1)
    optimizer = RNGD(two, lr=0.1, step_rule=TrustRegion(None))
    for seed in range(12):
        backward(one, seed)
        preconditioner.step()
        sgd.step()
        backward(two, seed)
        optimizer.step()
        assert_close_weights(one, two)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_learns_before_any_optimizer(kind):
    model = network()
    optimizer = kind(model.parameters(), lr=0.01)
    with Preconditioner(model, grafted=True) as preconditioner:
        losses = []
        for seed in range(200):
            losses.append(backward(model, seed))
            preconditioner.step()
            optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert not is_hooked(model)


def test_grafted_gradients_keep_their_norm():
    model = network()
    preconditioner = Preconditioner(model, grafted=True)
    backward(model)
    before = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
    preconditioner.step()
    after = torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1)
    torch.testing.assert_close(after.norm(), before.norm())
    assert not torch.allclose(after, before)


def test_what_has_no_metric_keeps_its_gradient():
    model = network()
    preconditioner = Preconditioner(model, metric=MetricOptions(structure={"0": "fallback"}))
    backward(model)
    kept, changed = model[0].weight.grad.clone(), model[2].weight.grad.clone()
    preconditioner.step()
    assert torch.equal(model[0].weight.grad, kept)
    assert not torch.equal(model[2].weight.grad, changed)


def test_resumes_bitwise():
    model, twin = network(), network()
    one, two = (
        Preconditioner(model, metric=MetricOptions(refresh_interval=4)),
        Preconditioner(twin, metric=MetricOptions(refresh_interval=4)),
    )
    for seed in range(6):
        backward(model, seed)
        one.step()
    two.load_state_dict(through_a_file(one.state_dict()))
    for seed in range(6, 14):
        for each, preconditioner in ((model, one), (twin, two)):
            backward(each, seed)
            preconditioner.step()
        assert torch.equal(model[0].weight.grad, twin[0].weight.grad)


def test_a_copy_of_model_and_preconditioner_goes_on_as_the_original_does():
    model = network()
    preconditioner = Preconditioner(model, metric=MetricOptions(refresh_interval=4))
    for seed in range(6):
        backward(model, seed)
        preconditioner.step()
    twin, other = copy.deepcopy((model, preconditioner))
    kept = copy.deepcopy(preconditioner.state_dict())
    assert other.state_dict()["layers"].keys() == kept["layers"].keys()
    for seed in range(6, 14):
        found = []
        for each, one in ((twin, other), (model, preconditioner)):
            backward(each, seed)
            one.step()
            found.append(each[0].weight.grad)
            if each is twin and seed == 6:
                assert torch.equal(preconditioner.state_dict()["layers"]["0"]["metric"], kept["layers"]["0"]["metric"])
        assert torch.equal(*found)
    gone = weakref.ref(other)
    del other, one
    gc.collect()
    assert gone() is None
    kept = copy.deepcopy(preconditioner.state_dict())
    backward(twin, 14)
    preconditioner.step()
    torch.testing.assert_close(preconditioner.state_dict()["layers"], kept["layers"], rtol=0, atol=0)


def test_a_pickle_goes_on_as_the_original_does():
    model = network()
    preconditioner = Preconditioner(model)
    for seed in range(3):
        backward(model, seed)
        preconditioner.step()
    twin, other = pickle.loads(pickle.dumps((model, preconditioner)))
    for each, one in ((model, preconditioner), (twin, other)):
        backward(each, 3)
        one.step()
    assert torch.equal(model[0].weight.grad, twin[0].weight.grad)


def test_resumes_bitwise_where_a_part_is_frozen_at_once():
    model, twin = network(), network()
    one, two = Preconditioner(model), Preconditioner(twin)
    for seed in range(12):
        backward(model, seed)
        one.step()
    two.load_state_dict(one.state_dict())
    for seed in range(12, 15):
        for each, preconditioner in ((model, one), (twin, two)):
            each[0].bias.requires_grad_(False)
            backward(each, seed)
            preconditioner.step()
        assert torch.equal(model[0].weight.grad, twin[0].weight.grad)


def test_a_state_of_other_layers_is_refused():
    other = Preconditioner(mlp(sizes=(6, 5)))
    with pytest.raises(ValueError, match="of other layers"):
        other.load_state_dict(Preconditioner(network()).state_dict())


def test_a_gradient_that_is_not_finite_stays_as_it_is():
    model = network()
    preconditioner = Preconditioner(model)
    backward(model)
    model[0].weight.grad[0, 0] = float("inf")
    with pytest.warns(HealthWarning, match="gradient of 0 is not finite"):
        preconditioner.step()
    assert torch.isinf(model[0].weight.grad).sum() == 1


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"damping": -1.0}, ValueError, "damping must lie"),
        ({"damping": {"nothing": 1.0}}, ValueError, "damping names 'nothing', which is no layer, pattern or class"),
        ({"structure": "kron"}, TypeError, r"write metric=MetricOptions\(structure=...\)"),
        ({"unheard_of": 1}, TypeError, r"takes no argument 'unheard_of'$"),
    ],
)
def test_arguments_outside_what_is_allowed_are_named(options, kind, message):
    with pytest.raises(kind, match=message):
        Preconditioner(network(), **options)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_that_are_forgotten_leave_no_samples(set_to_none):
    """Those of a generator flow back through the critic before the critic's own."""
    critic = mlp(sizes=(1, 1), bias=False)
    preconditioner = Preconditioner(critic, metric=MetricOptions(decay=0.0, structure="shared", stats_interval=1))
    ones = torch.ones(10, 1, dtype=torch.float64)
    fake = torch.zeros(10, 1, dtype=torch.float64, requires_grad=True)
    for _ in range(2):
        critic(fake).sum().backward()
        preconditioner.zero_grad(set_to_none)
        assert critic[0].weight.grad is None or not critic[0].weight.grad.any()
        critic(ones).sum().backward()
        preconditioner.step()
        assert float(preconditioner.state_dict()["layers"]["0"]["metric"]) == pytest.approx(1.0)
