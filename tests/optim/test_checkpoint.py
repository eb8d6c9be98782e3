"""Save, load and copy: what goes on bitwise as if nothing had happened, and what is refused and why."""

import copy
import io
import pickle

import pytest
import torch
from builders import (
    KINDS,
    assert_same_weights,
    batch,
    classified,
    every_kind,
    inputs,
    mlp,
    normed_mlp,
    predict,
    resumed,
    squares,
    step,
    structures,
    through_a_file,
    train,
)
from torch import nn

from relfisher import RNGD, MetricOptions


@pytest.mark.supports("resumes bitwise from a state in the middle of an interval, for each step rule", *KINDS)
@pytest.mark.parametrize("rule", ["trust-region", "normalized", "spectral"])
@pytest.mark.parametrize("saved_at", [3, 8])
def test_resumes_bitwise_in_the_middle_of_an_interval(rule, saved_at):
    metric = MetricOptions(stats_interval=2, refresh_interval=6)
    options = {"metric": metric, "momentum": 0.5, "step_rule": rule, "weight_decay": 0.01}
    model = every_kind()
    optimizer = RNGD(model, **options)
    for seed in range(saved_at):
        predict(model, optimizer, seed)
    saved = through_a_file({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    twin = every_kind()
    other = RNGD(twin, **options)
    twin.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    for seed in range(saved_at, saved_at + 10):
        assert predict(model, optimizer, seed) == predict(twin, other, seed)


def test_state_dict_resumes_bitwise_in_the_middle_of_a_refresh_interval():
    options = {"momentum": 0.5, "metric": MetricOptions(refresh_interval=20)}
    model = mlp()
    optimizer = RNGD(model, **options)
    train(model, optimizer, 33)
    loaded = mlp(seed=5)
    loaded.load_state_dict(model.state_dict())
    other = RNGD(loaded, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert train(model, optimizer, 30, first=33) == train(loaded, other, 30, first=33)
    assert_same_weights(model, loaded)


def test_statistics_that_were_saved_are_not_due_at_once():
    model = mlp()
    optimizer = RNGD(model, metric=MetricOptions(warmup_refreshes=(0,)))
    step(model, optimizer, inputs())
    twin, other = resumed(model, optimizer, metric=MetricOptions(warmup_refreshes=(0,)))
    first, second = copy.deepcopy((model, optimizer))
    mass = float(optimizer.state[model[0].weight]["ema_weight"])
    for each, its in ((model, optimizer), (twin, other), (first, second)):
        step(each, its, inputs(1))
        assert float(its.state[each[0].weight]["ema_weight"]) == mass
    assert_same_weights(model, twin, first)


def test_a_head_whose_gradients_have_become_rounding_resumes_as_a_softmax():
    model = mlp(nn.ReLU, dtype=torch.float32)
    optimizer = RNGD(model)
    x, y = batch(dtype=torch.float32)
    step(model, optimizer, (x, y), classified)
    twin = copy.deepcopy(model)
    with torch.no_grad():  # now certain of what is right
        for net in (model, twin):
            net[4].weight.zero_()
            net[4].bias.copy_(torch.tensor([0.0, -17.0, -17.0]))
    y.zero_()
    other = RNGD(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        step(model, optimizer, (x, y), classified)
        step(twin, other, (x, y), classified)
    assert structures(other)["4"] == "kronecker"
    assert_same_weights(model, twin)


@pytest.mark.parametrize("frozen_first", [False, True], ids=["freezes", "unfreezes"])
def test_what_is_frozen_right_after_a_copy_or_a_load_is_left_out_at_once(frozen_first):
    model = mlp()
    model[0].bias.requires_grad_(not frozen_first)
    optimizer = RNGD(model)
    for seed in range(12):
        step(model, optimizer, inputs(seed))
    twin, other = copy.deepcopy((model, optimizer))
    loaded = copy.deepcopy(model)
    last = RNGD(loaded)
    last.load_state_dict(optimizer.state_dict())
    for each in (model, twin, loaded):
        each[0].bias.requires_grad_(frozen_first)
    for seed in range(12, 16):
        expected = step(model, optimizer, inputs(seed))
        assert step(twin, other, inputs(seed)) == expected
        assert step(loaded, last, inputs(seed)) == expected


def test_states_that_do_not_fit_are_explained():
    model = mlp()
    with pytest.raises(ValueError, match="must be that of an RNGD optimizer"):
        RNGD(model).load_state_dict(torch.optim.AdamW(model.parameters()).state_dict())
    optimizer = RNGD(model)
    start = copy.deepcopy(optimizer.state_dict())
    first = step(model, optimizer, inputs())
    optimizer.load_state_dict(start)  # as a learning-rate finder does
    assert first > step(model, optimizer, inputs()) > 0


def test_a_state_of_another_structure_is_refused():
    model = mlp()
    optimizer = RNGD(model, metric=MetricOptions(structure="neuron"))
    train(model, optimizer, 2)
    fresh = mlp()
    other = RNGD(fresh, metric=MetricOptions(structure="shared"))
    with pytest.raises(ValueError, match=r"metric of '0' has.*\(5, 7, 7\).*'shared' needs.*\(7, 7\)"):
        other.load_state_dict(optimizer.state_dict())
    train(fresh, other, 1)


def test_a_state_of_other_parameters_is_refused_by_name():
    model = normed_mlp()
    state = RNGD(model).state_dict()
    other = nn.ModuleDict({"first": model[0], "norm": model[2], "last": model[3]})
    with pytest.raises(ValueError, match=r"lacks first\.weight.*; it has 0\.weight"):
        RNGD(other).load_state_dict(state)


@pytest.mark.parametrize(("structure", "momentum"), [("fallback", 0.0), ("shared", 0.5)])
def test_a_state_of_parameters_of_other_shapes_is_refused_by_name(structure, momentum):
    options = {"momentum": momentum, "metric": MetricOptions(structure=structure)}
    model = normed_mlp()
    optimizer = RNGD(model, **options)
    step(model, optimizer, inputs())
    other = nn.Sequential(*model[:3], nn.Linear(5, 4).double())
    last = RNGD(other, **options)
    before = copy.deepcopy(last.state_dict())
    with pytest.raises(ValueError, match=r"of '3\.weight' has the shape \[3, [56]\], but .* \[4, [56]\]"):
        last.load_state_dict(optimizer.state_dict())
    after = last.state_dict()
    assert all(
        torch.equal(after["state"][place][key], value)
        for place in before["state"]
        for key, value in before["state"][place].items()
    )


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_the_state_of_a_compiled_model_is_that_of_the_model():
    model = normed_mlp()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    compiled = torch.compile(copy.deepcopy(model), backend="eager")
    other = RNGD(compiled)
    other.load_state_dict(optimizer.state_dict())
    assert step(model, optimizer, inputs(1)) == pytest.approx(step(compiled, other, inputs(1)), rel=1e-12)


def test_the_state_is_there_before_the_first_step_and_as_large_afterwards():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scale = normed_mlp(), nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return self.body(x) * self.scale

    model = Scaled()
    optimizer = RNGD(model, metric=MetricOptions(structure={"body.*": "shared", "scale": "fallback"}))
    before = {index: set(state) for index, state in optimizer.state_dict()["state"].items()}
    step(model, optimizer, inputs())
    assert before == {index: set(state) for index, state in optimizer.state_dict()["state"].items()}
    assert {key for state in before.values() for key in state} >= {
        "metric",
        "root",
        "ema_weight",
        "lead",
        "momentum",
        "exp_avg",
    }


def test_a_watched_model_can_be_saved_whole():
    model = mlp()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    torch.testing.assert_close(loaded(inputs()), model(inputs()))


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def saved_and_loaded(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [pickled, saved_and_loaded])
def test_a_pickle_of_model_and_optimizer_goes_on_as_the_original_does(again):
    model = mlp()
    optimizer = RNGD(model, momentum=0.5, metric=MetricOptions(refresh_interval=4))
    for seed in range(3):
        step(model, optimizer, inputs(seed))
    twin, other = again((model, optimizer))
    assert other.param_groups[0]["params"][0] is twin[0].weight
    for seed in range(3, 12):
        assert step(model, optimizer, inputs(seed)) == step(twin, other, inputs(seed))
    assert_same_weights(model, twin)


def test_a_copy_of_the_model_is_not_watched():
    """Neither does what it sees go into the metric; and it can be watched by an optimizer of its own."""
    model, plain = mlp(), mlp()
    optimizer, other = (
        RNGD(model, metric=MetricOptions(stats_interval=1)),
        RNGD(plain, metric=MetricOptions(stats_interval=1)),
    )
    for seed in range(3):
        step(plain, other, inputs(seed))
        optimizer.zero_grad()
        squares(model, inputs(seed)).backward()
        twin = copy.deepcopy(model)
        twin(100 * inputs()).sum().backward()
        optimizer.step()
        assert torch.equal(optimizer.state[model[0].weight]["metric"], other.state[plain[0].weight]["metric"])
    assert_same_weights(model, plain)
    own = RNGD(twin)
    step(twin, own, inputs())
    assert structures(own).keys() == {"0", "2", "4"}


def test_a_copy_of_model_and_optimizer_goes_on_as_the_original_does():
    model = mlp()
    optimizer = RNGD(model, momentum=0.5, metric=MetricOptions(refresh_interval=4))
    for seed in range(3):
        step(model, optimizer, inputs(seed))
    twin, other = copy.deepcopy((model, optimizer))
    for seed in range(3, 12):
        assert step(model, optimizer, inputs(seed)) == step(twin, other, inputs(seed))
    kept = copy.deepcopy(model)
    step(twin, other, inputs())
    assert_same_weights(model, kept)


def test_a_copy_of_the_optimizer_alone_has_a_model_of_its_own():
    model = mlp()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    twin = copy.deepcopy(optimizer)
    assert twin.param_groups[0]["params"][0] is not model[0].weight
    del model
    optimizer = optimizer.state_dict()
    with pytest.raises(TypeError, match="the model is gone"):
        copy.deepcopy(copy.deepcopy(twin))


def test_a_copy_reads_its_own_next_layer():
    model = mlp()
    optimizer = RNGD(model)
    train(model, optimizer, 1)
    twin, other = copy.deepcopy((model, optimizer))
    for seed in range(1, 12):
        train(model, optimizer, 1, first=seed)
        train(twin, other, 1, first=seed)
    assert_same_weights(model, twin)
