"""What a loaded state may hold: hooks complete it first, then it is checked whole, before anything is changed."""

import copy
import math

import pytest
import torch
from builders import inputs, mlp, resumed, step, through_a_file, train
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from relfisher import RNGD, MetricOptions, Preconditioner


def trained(**options):
    model = mlp()
    optimizer = RNGD(model, **options)
    train(model, optimizer, 3)
    return model, optimizer


def contents(optimizer):
    state = optimizer.state_dict()
    return copy.deepcopy((state["state"], state["param_groups"]))


def assert_unchanged(optimizer, before):
    after = contents(optimizer)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1] == before[1]


def test_hooks_complete_a_state_before_it_is_checked_and_see_it_whole_afterwards():
    model, optimizer = trained()
    saved = through_a_file(optimizer.state_dict())
    groups = saved.pop("param_groups")
    other = RNGD(copy.deepcopy(model))
    seen = []
    other.register_load_state_dict_pre_hook(lambda _, given: {**given, "param_groups": groups})
    other.register_load_state_dict_post_hook(lambda loaded: seen.append(contents(loaded)))
    other.load_state_dict(saved)
    assert_unchanged(optimizer, seen[0])


@pytest.mark.parametrize("key", sorted(RNGD(mlp()).param_groups[0].keys() - {"params", "param_names"}))
def test_groups_without_a_key_are_refused_while_loading(key):
    _, optimizer = trained()
    saved, before = copy.deepcopy(optimizer.state_dict()), contents(optimizer)
    del saved["param_groups"][0][key]
    with pytest.raises(ValueError, match=f"its groups lack '{key}'"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("value", ["a", None, math.nan, -1, [1]], ids=repr)
@pytest.mark.parametrize("key", ["lr", "momentum", "damping", "iteration", "averaged", "peak_lr", "fallback_ratio"])
def test_groups_with_a_value_of_another_kind_are_refused_while_loading(key, value):
    _, optimizer = trained()
    saved, before = copy.deepcopy(optimizer.state_dict()), contents(optimizer)
    saved["param_groups"][0][key] = value
    with pytest.raises(ValueError, match=f"cannot go on: {key} must"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_a_learning_rate_that_a_scheduler_set_to_0_can_be_loaded():
    model, optimizer = trained()
    optimizer.param_groups[0]["lr"] = 0.0
    assert resumed(model, optimizer)[1].param_groups[0]["lr"] == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["lead", "metric", "momentum", "log_norm_stats"])
def test_records_that_are_not_finite_are_refused_while_loading(key, value):
    _, optimizer = trained(metric=MetricOptions(structure="shared"))
    saved, before = copy.deepcopy(optimizer.state_dict()), contents(optimizer)
    saved["state"][0][key].view(-1)[0] = value
    with pytest.raises(ValueError, match=f"the saved {key} of parameter 0 must be finite"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("key", ["metric", "ema_weight", "log_norm_stats", "is_head"])
def test_states_without_a_record_are_refused_while_loading(key):
    _, optimizer = trained(metric=MetricOptions(structure="shared"))
    saved, before = copy.deepcopy(optimizer.state_dict()), contents(optimizer)
    del saved["state"][0][key]
    with pytest.raises(ValueError, match=r"'?0(\.weight)?'? (lacks|has the shapes)"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("key", ["momentum", "lead"])
def test_momentum_and_average_begin_anew_where_the_state_has_none(key):
    model, optimizer = trained()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state.pop(key, None)
    optimizer.load_state_dict(saved)
    assert all(map(math.isfinite, train(model, optimizer, 3)))
    assert key in optimizer.state[model[0].weight]


@pytest.mark.parametrize(
    "given",
    [
        {"state": 3, "param_groups": RNGD(mlp()).state_dict()["param_groups"]},
        {"state": {0: 3}, "param_groups": RNGD(mlp()).state_dict()["param_groups"]},
        {"state": {}, "param_groups": 4},
        {"state": {}, "param_groups": [3, 4]},
        {"state": {}, "param_groups": [{"params": 3}]},
        {"state": {}},
        {},
        None,
        [],
    ],
    ids=repr,
)
def test_what_is_no_state_is_refused(given):
    optimizer = RNGD(mlp())
    before = contents(optimizer)
    with pytest.raises(ValueError, match=r"state_dict must|the saved state"):
        optimizer.load_state_dict(given)
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize(
    "given", [{}, None, {"iteration": -1, "layers": {}}, {"iteration": "a", "layers": {}}], ids=repr
)
def test_a_preconditioner_refuses_what_is_no_state(given):
    preconditioner = Preconditioner(mlp())
    if given and "layers" in given:
        given = {**given, "layers": preconditioner.state_dict()["layers"]}
    with pytest.raises(ValueError, match=r"state_dict must|iteration must"):
        preconditioner.load_state_dict(given)


def test_the_metric_is_there_right_after_loading():
    model, optimizer = trained()
    other = RNGD(mlp(seed=3))
    other.load_state_dict(optimizer.state_dict())
    for name in ("0", "2", "4"):
        torch.testing.assert_close(other.metric(name).to_dense(), optimizer.metric(name).to_dense(), rtol=0, atol=0)
    step(model, other, inputs())


class Mixed(nn.Module):
    """A layer that is trained, one that is frozen, one that is not reached, and a parameter without a metric."""

    def __init__(self):
        super().__init__()
        self.body, self.frozen, self.idle = mlp(), mlp(sizes=(3, 3)), mlp(sizes=(3, 3))
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.body(x)) * self.scale


@pytest.mark.filterwarnings("ignore:no part in the first step")
@pytest.mark.parametrize("steps", [0, 3])
def test_distributed_checkpoints_find_a_state_for_every_parameter_that_is_trained(steps):
    model, twin = Mixed(), Mixed()
    optimizer, other = RNGD(model), RNGD(twin)
    for seed in range(steps):
        step(model, optimizer, inputs(seed))
    weights, state = get_state_dict(model, optimizer)
    set_state_dict(twin, other, model_state_dict=weights, optim_state_dict=state)
    for seed in range(3):
        assert step(model, optimizer, inputs(seed)) == step(twin, other, inputs(seed))


def test_a_metric_without_its_number_of_updates_is_refused():
    _, optimizer = trained()
    saved, before = copy.deepcopy(optimizer.state_dict()), contents(optimizer)
    del saved["state"][0]["updates"]
    with pytest.raises(ValueError, match="lacks updates"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_a_state_of_no_parameter_is_refused():
    """As of a group whose list of parameters is torn."""
    _, optimizer = trained()
    saved, before = copy.deepcopy(optimizer.state_dict()), contents(optimizer)
    saved["param_groups"][0]["params"][1] = 99
    with pytest.raises(ValueError, match="state of parameter 1, which is in none of its groups"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)


def test_a_head_that_was_none_is_refused_before_anything_is_loaded():
    """Its structure would be another one, whose metric has other shapes."""
    model, optimizer = trained()
    saved, before = copy.deepcopy(optimizer.state_dict()), contents(optimizer)
    (head,) = (name for name, role in ((each.name, each.role) for each in optimizer.layers) if role.is_head)
    place = list(dict(model.named_parameters())).index(f"{head}.weight")
    saved["state"][place]["is_head"].zero_()
    with pytest.raises(ValueError, match=f"the loaded metric of '{head}'"):
        optimizer.load_state_dict(saved)
    assert_unchanged(optimizer, before)
    assert next(each.role for each in optimizer.layers if each.name == head).is_head
