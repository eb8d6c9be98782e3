"""The average of the iterates against its definition, and which of the two a model holds when."""

import contextlib
import copy
import gc

import pytest
import torch
from builders import assert_same_weights, batch, classified, inputs, mlp, skipped, step, train, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relfisher import RNGD

# So wide a window that the average is another than the last iterate after a few steps.
WIDE = 0.9


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
    found = iterates(model, RNGD(model, averaging=WIDE), 5)
    optimizer = RNGD(plain, averaging=0.0)
    for seed in range(5):
        step(plain, optimizer, batch(seed), classified)
        assert_holds(plain, found[seed])


@pytest.mark.parametrize("passes", ["evaluation", "without gradients"])
def test_other_passes_see_the_average(passes):
    model, _optimizer, _ = trained()
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


class Entered(nn.Module):
    """A model that is not called itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 5), nn.Linear(5, 4)])
        self.inner = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 3))
        self.double()

    def encode(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def decode(self, x):
        return self.inner[1](self.inner[0](x))

    def inside(self, x):
        return self.inner[1](torch.tanh(self.inner[0][0](x)))


@pytest.mark.filterwarnings("ignore:linear response for some layers")
@pytest.mark.parametrize("way", ["methods", "inside"])
def test_a_model_trains_at_the_iterate_however_it_is_entered(way):
    """The steps are those without an average, whose gradients are at the iterate."""
    found = {}
    for averaging in (WIDE, 0.0):
        model = Entered()
        trained = model if way == "methods" else model.inner
        optimizer = RNGD(model, params=list(trained.parameters()), averaging=averaging)
        for seed in range(8):
            x, y = batch(seed)
            features = model.encode(x) if way == "methods" else x[:, :4]
            optimizer.zero_grad()
            classified(model.decode if way == "methods" else model.inside, (features, y)).backward()
            optimizer.step()
        model.inner[1](torch.zeros(1, 4, dtype=torch.float64))
        found[averaging] = weights(model)
    for name, weight in found[0.0].items():
        torch.testing.assert_close(found[WIDE][name], weight)


def test_a_penalty_that_is_computed_before_the_pass_is_of_the_iterate():
    found = []
    for averaging, is_before in ((WIDE, True), (WIDE, False), (0.0, False)):
        model = mlp()
        optimizer = RNGD(model, averaging=averaging)
        for seed in range(5):
            x, y = batch(seed)
            optimizer.zero_grad()
            penalty = sum(weight.square().sum() for weight in model.parameters()) if is_before else 0.0
            loss = classified(model, (x, y))
            penalty = penalty if is_before else sum(weight.square().sum() for weight in model.parameters())
            (loss + 0.1 * penalty).backward()
            optimizer.step()
        model(batch(9)[0])
        found.append(weights(model))
    for name, weight in found[2].items():
        torch.testing.assert_close(found[0][name], weight)
        torch.testing.assert_close(found[1][name], weight)


@pytest.mark.parametrize("end", ["close", "average", "a pass", "nothing else"])
@pytest.mark.parametrize("how", ["load_state_dict", "data", "in place"])
def test_weights_that_are_loaded_after_a_pass_stay(end, how):
    model, optimizer, _ = trained()
    classified(model, batch(0)).backward()
    wanted = {name: weight + 1 for name, weight in mlp(seed=1).state_dict().items()}
    if how == "load_state_dict":
        model.load_state_dict(wanted)
    for name, weight in model.named_parameters():
        if how == "data":
            weight.data = wanted[name].clone()
        elif how == "in place":
            with torch.no_grad():
                weight.copy_(wanted[name])
    if end == "close":
        optimizer.close()
    elif end == "average":
        with optimizer.average():
            assert_holds(model, wanted)
    elif end == "a pass":
        model(inputs())
        with optimizer.average():
            assert_holds(model, wanted)
    assert_holds(model, wanted)


def test_steps_go_on_from_weights_that_are_loaded_after_a_pass():
    model, optimizer, _ = trained()
    model(inputs())
    wanted = {name: weight + 1 for name, weight in model.state_dict().items()}
    model.load_state_dict(wanted)
    step(model, optimizer, batch(7), classified)
    assert max(float((weight.detach() - wanted[name]).norm()) for name, weight in model.named_parameters()) < 0.1


def test_weights_that_are_moved_and_moved_back_before_a_step_are_averaged():
    """As by sharpness-aware minimization, which takes the gradient of a step near the iterate."""

    def sharp(model, optimizer, seed):
        kept = {}
        optimizer.zero_grad()
        classified(model, batch(seed)).backward()
        with torch.no_grad():
            for weight in model.parameters():
                kept[weight] = weight.detach().clone()
                weight.add_(weight.grad, alpha=0.1)
        optimizer.zero_grad()
        classified(model, batch(seed)).backward()
        for weight, before in kept.items():
            weight.data = before
        optimizer.step()

    found = {}
    for averaging in (WIDE, 0.0):
        model = mlp()
        optimizer = RNGD(model, averaging=averaging)
        for seed in range(6):
            sharp(model, optimizer, seed)
        average = weights(model)
        model(inputs())
        found[averaging] = weights(model)
        assert torch.equal(average["0.weight"], found[averaging]["0.weight"]) == (averaging == 0)
    for name, weight in found[0.0].items():
        torch.testing.assert_close(found[WIDE][name], weight)


def test_weights_that_change_their_device_or_precision_after_a_pass_are_not_changed():
    model, optimizer, kept = trained()
    model(inputs())
    iterate = weights(model)
    model.float()
    assert not torch.equal(model[0].weight.detach().double(), kept["0.weight"])
    optimizer.close()
    for name, weight in model.named_parameters():
        assert float((weight.detach() - kept[name]).norm()) < 0.01 * float((iterate[name] - kept[name]).norm())


def test_an_optimizer_that_goes_leaves_the_average():
    model, optimizer, kept = trained()
    model(inputs())
    del optimizer
    gc.collect()
    assert_holds(model, kept)


def test_a_step_while_the_average_is_in_the_model_ends_with_the_new_average():
    model, optimizer, _ = trained()
    other, same, _ = trained()
    for each, own in ((model, optimizer), (other, same)):
        own.zero_grad()
        classified(each, batch(0)).backward()
        with own.average() if each is model else contextlib.nullcontext():
            own.step()
        assert not any(group["at_iterate"] for group in own.param_groups)
    assert_same_weights(model, other)


@pytest.mark.parametrize("is_between", [True, False], ids=["between steps", "after a pass"])
def test_an_average_that_was_off_starts_anew(is_between):
    model, optimizer, kept = trained()
    if not is_between:
        model(inputs())
        kept = weights(model)
    for group in optimizer.param_groups:
        group["averaging"] = 0.0
    train(model, optimizer, 5)
    for group in optimizer.param_groups:
        group["averaging"] = WIDE
    before = weights(model)
    model(inputs())
    assert_holds(model, before)
    assert not torch.equal(before["0.weight"], kept["0.weight"])
    train(model, optimizer, 1)
    assert {group["averaged"] for group in optimizer.param_groups} == {1}
    with optimizer.average():
        last = weights(model)
    model(inputs())
    assert_holds(model, last)  # the first iterate is its own average


def test_the_average_and_the_iterate_follow_weights_that_are_changed_from_outside():
    model, optimizer, kept = trained()
    model(inputs())
    lead = model[0].weight.detach() - kept["0.weight"]
    with optimizer.average(), torch.no_grad():
        model[0].weight.copy_(torch.ones_like(lead))
    torch.testing.assert_close(model[0].weight.detach(), 1 + lead)


def trained():
    """A model that holds the average of five steps, other than the last, its optimizer, and the weights."""
    model = mlp()
    optimizer = RNGD(model, averaging=WIDE)
    train(model, optimizer, 5)
    assert max(float(state["lead"].norm()) for state in optimizer.state.values()) > 1e-3
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

    model, optimizer, _ = trained()
    if between != "steps":
        model(inputs())
    other = mlp()
    other.load_state_dict(model.state_dict())
    resumed = RNGD(other, averaging=WIDE)
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


@pytest.mark.parametrize("is_between", [True, False], ids=["between steps", "after a pass"])
def test_a_layer_that_is_frozen_again_stays_at_its_average(is_between):
    model, optimizer, kept = trained()
    if not is_between:
        model(inputs())
    model[0].requires_grad_(False)
    if not is_between:
        optimizer.zero_grad()
        optimizer.step()
    for seed in range(5):
        model(inputs(seed))
        torch.testing.assert_close(model[0].weight.detach(), kept["0.weight"])
        step(model, optimizer, batch(seed), classified)
        torch.testing.assert_close(model[0].weight.detach(), kept["0.weight"])
    other = mlp()
    resumed = RNGD(other, averaging=WIDE)
    other[0].requires_grad_(False)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each, own in ((model, optimizer), (other, resumed)):
        each[0].requires_grad_(True)
        train(each, own, 3)
    assert_same_weights(model, other)
    assert not torch.equal(model[0].weight, kept["0.weight"])


@pytest.mark.filterwarnings("ignore:linear response for some layers")
@pytest.mark.parametrize("is_called", [True, False], ids=["as a whole", "in parts"])
@pytest.mark.parametrize("is_frozen", [True, False])
def test_a_pass_that_begins_in_evaluation_mode_is_at_one_point(is_called, is_frozen):
    """At the average, whose weights its graph has; where those of the part are frozen, the rest is at the iterate."""
    body = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
    body.requires_grad_(not is_frozen)
    model = nn.Sequential(body, nn.Linear(5, 3).double())
    optimizer = RNGD(model, averaging=WIDE)
    train(model, optimizer, 6)
    average = copy.deepcopy(model)
    model.eval()
    model[1].train()
    x, y = batch(9)
    optimizer.zero_grad()
    classified(model if is_called else lambda x: model[1](model[0](x)), (x, y)).backward()
    point = average
    if is_frozen:
        assert any(group["at_iterate"] for group in optimizer.param_groups)
        point = copy.deepcopy(model)
    point.zero_grad()
    classified(point, (x, y)).backward()
    for weight, other in zip(model.parameters(), point.parameters(), strict=True):
        if weight.grad is not None:
            torch.testing.assert_close(weight.grad, other.grad)
    optimizer.step()
    assert not any(group["at_iterate"] for group in optimizer.param_groups)


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
