"""The average of the iterates against its definition, and which of the two a model holds when."""

import copy

import pytest
import torch
from builders import assert_same_weights, batch, classified, inputs, mlp, skipped, step, train, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relfisher import RNGD


def assert_holds(model, wanted):
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), wanted[name])


def iterates(model, optimizer, count):
    """Train, and return the iterate of each step, which the next training pass puts into the model."""
    found = []
    for seed in range(count):
        step(model, optimizer, batch(seed), classified)
        kept = weights(model)
        model(batch(seed)[0])
        found.append(weights(model))
        with optimizer.average():
            assert_holds(model, kept)
    return found


@given(share=st.sampled_from([0.1, 0.3, 0.5, 1.0]), seed=st.integers(0, 100))
def test_a_model_holds_the_weighted_mean_of_the_iterates(share, seed):
    """The i-th iterate weighs as the differences of its products say; with the share 1 all weigh the same."""
    torch.manual_seed(seed)
    model = mlp(sizes=(6, 5, 3), seed=seed)
    optimizer = RNGD(model, averaging=share)
    found = iterates(model, optimizer, 6)
    expected = {name: torch.zeros_like(weight) for name, weight in found[0].items()}
    for number, iterate in enumerate(found, start=1):
        new = min(1.0, 1 / (share * number))
        expected = {name: (1 - new) * mean + new * iterate[name] for name, mean in expected.items()}
    if share == 1.0:
        mean = torch.stack([iterate["0.weight"] for iterate in found]).mean(0)
        torch.testing.assert_close(expected["0.weight"], mean)
    with optimizer.average():
        assert_holds(model, expected)


def test_iterates_do_not_depend_on_their_average():
    """Gradients are taken at the iterates: the run is that without an average."""
    model, plain = mlp(), mlp()
    found = iterates(model, RNGD(model), 5)
    optimizer = RNGD(plain, averaging=0.0)
    for seed in range(5):
        step(plain, optimizer, batch(seed), classified)
        assert_holds(plain, found[seed])


@pytest.mark.parametrize("passes", ["evaluation", "without gradients"])
def test_other_passes_see_the_average(passes):
    model = mlp()
    optimizer = RNGD(model)
    train(model, optimizer, 5)
    kept = copy.deepcopy(model)
    model.train(passes != "evaluation")
    with torch.set_grad_enabled(passes == "evaluation"):
        model(inputs())
    assert_same_weights(model, kept)


@pytest.mark.filterwarnings("ignore:linear response for some layers")
def test_parts_that_are_called_by_themselves_train_at_the_iterate_too():
    model = nn.ModuleDict({"encoder": nn.Linear(6, 4), "decoder": nn.Linear(4, 3)})
    optimizer = RNGD(model, lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        model["decoder"](torch.tanh(model["encoder"](torch.ones(2, 6)))).square().sum().backward()
        optimizer.step()
    kept = weights(model)
    model["encoder"](torch.ones(2, 6))
    assert not torch.equal(model["decoder"].weight, kept["decoder.weight"])


def test_the_average_and_the_iterate_follow_weights_that_are_changed_from_outside():
    model, optimizer, kept = trained()
    model(inputs())
    lead = model[0].weight.detach() - kept["0.weight"]
    with optimizer.average(), torch.no_grad():
        model[0].weight.copy_(torch.ones_like(lead))
    torch.testing.assert_close(model[0].weight.detach(), 1 + lead)


def trained():
    """A model that holds the average of five steps, its optimizer, and the weights."""
    model = mlp()
    optimizer = RNGD(model)
    train(model, optimizer, 5)
    return model, optimizer, weights(model)


def test_a_skipped_step_leaves_the_average():
    model, optimizer, kept = trained()
    (model(inputs()) * float("nan")).sum().backward()
    with pytest.warns(UserWarning, match="not finite"):
        assert skipped(optimizer) == 1
    assert_holds(model, kept)


def test_closing_leaves_the_average():
    model, optimizer, kept = trained()
    model(inputs())
    optimizer.close()
    assert_holds(model, kept)


@pytest.mark.parametrize("between", ["steps", "a pass and its step"])
def test_a_run_goes_on_from_a_saved_state(between):
    def go_on(model, optimizer):
        for seed in range(5, 8):
            step(model, optimizer, batch(seed), classified)

    model = mlp()
    optimizer = RNGD(model)
    train(model, optimizer, 5)
    if between != "steps":
        model(inputs())
    other = mlp()
    other.load_state_dict(model.state_dict())
    resumed = RNGD(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    pair = copy.deepcopy((model, optimizer))
    for each in ((model, optimizer), (other, resumed), pair):
        go_on(*each)
    assert_same_weights(model, other, pair[0])


def test_averaged_weights_are_steadier_than_the_iterates():
    distances = {}
    for averaging in (0.0, 0.1):
        model = mlp(sizes=(6, 5, 3))
        optimizer = RNGD(model, lr=0.03, averaging=averaging)
        train(model, optimizer, 200)
        before = model[0].weight.detach().clone()
        train(model, optimizer, 1, first=200)
        distances[averaging] = float((model[0].weight.detach() - before).norm())
    assert distances[0.1] < 0.5 * distances[0.0]


def test_a_layer_that_joins_later_starts_where_it_is():
    model = mlp(sizes=(6, 5, 3))
    optimizer = RNGD(model, params=list(model[0].parameters()))
    train(model, optimizer, 5)
    before = model[2].weight.detach().clone()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer, 1, first=100)
    assert 0 < float((model[2].weight.detach() - before).norm()) < 0.1


def test_a_layer_that_is_unfrozen_later_is_averaged_from_then_on():
    model = mlp(sizes=(6, 5, 3))
    model[0].requires_grad_(False)
    optimizer = RNGD(model)
    train(model, optimizer, 5)
    model[0].requires_grad_(True)
    train(model, optimizer, 20)
    kept = weights(model)
    model(inputs())
    assert all(not torch.equal(weight, kept[name]) for name, weight in model.named_parameters())


def test_half_precision_has_no_average():
    model = mlp(dtype=torch.bfloat16)
    optimizer = RNGD(model)
    assert not any("lead" in state for state in optimizer.state.values())
    optimizer.zero_grad()
    model(torch.randn(4, 6, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert not any(group["at_iterate"] for group in optimizer.param_groups)


def test_a_run_of_known_length_ends_at_rest():
    model = mlp()
    optimizer = RNGD(model, total_steps=20, momentum=0)
    train(model, optimizer, 20)
    kept = weights(model)
    model(inputs())
    last = weights(model)
    for seed in range(5):
        step(model, optimizer, batch(seed), classified)
    model(inputs())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.detach(), last[name], rtol=0, atol=1e-12)
    lead = {name: weight.detach() - kept[name] for name, weight in model.named_parameters()}
    assert max(float(each.abs().max()) for each in lead.values()) < 1e-3
    assert optimizer.param_groups[0]["lr"] == 0.01
