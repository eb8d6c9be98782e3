"""Checkpoints load into optimizers that have taken no step, in any number of processes."""

import copy
import warnings

import pytest
import torch
from processes import run_together
from scenarios import METRIC, SCENARIOS, batches, distance, made
from torch import nn
from torch.distributed import checkpoint, get_rank
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from relfisher import RNGD, MetricOptions, expect

NAME, STEPS = "adapted", 8
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
# Which of what two processes saved is loaded, by whom, and how.
LOADS = [
    ("wrapped", "parts", "wrapped"),
    ("wrapped", "parts", "shared"),
    ("wrapped", "parts", "sharded"),
    ("sharded", "parts", "shared"),
    ("sharded", "parts", "sharded"),
    ("sharded", "parts", "replicated"),
    ("sharded", "flat", "sharded"),
    ("sharded", "whole", "shared"),
    ("wrapped", "first", "sharded"),
]
REPLICATE = {"wrapped": True, "shared": False, "sharded": None, "replicated": True, "alone": None}


def started(kind):
    """Return a new model, what wraps it, and their optimizer."""
    model = made(NAME)
    if kind in ("sharded", "replicated"):
        model = SCENARIOS[NAME].shard(model)
    net = DistributedDataParallel(model) if kind in ("wrapped", "shared") else model
    return model, net, RNGD(net, metric=METRIC, replicate=REPLICATE[kind])


def train(net, optimizer, parts, start=0):
    for step in range(start, start + STEPS):
        optimizer.zero_grad()
        for part in parts:
            for x, y in batches(NAME, step, part):
                (cross_entropy(net(x), y) / len(parts)).backward()
        optimizer.step()


def saved(folder):
    """Train in both ways, and save in all ways."""
    for kind in ("wrapped", "sharded"):
        _, net, optimizer = started(kind)
        train(net, optimizer, [get_rank()])
        for way, options in {"parts": None, "flat": FLAT}.items():
            model, state = get_state_dict(net, optimizer, options=options)
            checkpoint.save({"model": model, "optimizer": state}, checkpoint_id=folder / kind / way)
        both = get_state_dict(net, optimizer, options=WHOLE)
        if get_rank() == 0:
            torch.save(both, folder / kind / "whole.pt")


def load(folder, way, net, optimizer):
    """Load what was saved into a new model and optimizer."""
    if way in ("parts", "flat"):
        options = FLAT if way == "flat" else None
        expect(net, optimizer, checkpoint.FileSystemReader(folder / way).read_metadata())
        state = dict(zip(("model", "optimizer"), get_state_dict(net, optimizer, options=options), strict=True))
        checkpoint.load(state, checkpoint_id=folder / way)
        model, own = state["model"], state["optimizer"]
    else:  # of which only the first process has something, or all
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=way == "first")
        model, own = torch.load(folder / "whole.pt", weights_only=False)
        if way == "first" and get_rank() > 0:
            model, own = {}, {}
        expect(net, optimizer, own)
    set_model_state_dict(net, model, options=options)
    set_optimizer_state_dict(net, optimizer, own, options=options)


def resumed(folder):
    """Return the weights after further steps, for all of `LOADS`."""
    found = {}
    for source, way, kind in LOADS:
        model, net, optimizer = started(kind)
        load(folder / source, way, net, optimizer)
        train(net, optimizer, [get_rank()], STEPS)
        weights = model.state_dict()
        found[source, way, kind] = {
            name: each.full_tensor() if hasattr(each, "full_tensor") else each for name, each in weights.items()
        }
    return found


def quietly(task, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return task(*arguments)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_two_loads_before_the_first_step_of_three_and_of_one(tmp_path):
    run_together(2, quietly, saved, tmp_path)
    model, _, optimizer = started("alone")
    train(model, optimizer, range(2))
    one = copy.deepcopy((model, optimizer))
    for source, way in (("wrapped", "parts"), ("sharded", "flat")):
        own, _, other = started("alone")
        load(tmp_path / source, way, own, other)
        for parameter, p in zip(model.parameters(), own.parameters(), strict=True):
            assert optimizer.state[parameter].keys() == other.state[p].keys()
            for key, value in optimizer.state[parameter].items():
                torch.testing.assert_close(other.state[p][key], value, atol=1e-12, rtol=1e-12)
        train(own, other, range(2), STEPS)
        two = copy.deepcopy(one)
        train(*two, range(2), STEPS)
        assert distance(own.state_dict(), two[0].state_dict()) < 1e-12
    train(*one, range(3), STEPS)
    for rank, each in enumerate(run_together(3, quietly, resumed, tmp_path)):
        for how, weights in each.items():
            assert distance(weights, one[0].state_dict()) < 1e-12, (how, rank)


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def stepped(model, optimizer, steps=3):
    for seed in range(steps):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        cross_entropy(model(x), x.argmax(1) % 2).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_without_processes_goes_on_bit_by_bit(tmp_path):
    model = net()
    _, optimizer = stepped(model, RNGD(model))
    states = get_state_dict(model, optimizer)
    checkpoint.save(dict(zip("mo", states, strict=True)), checkpoint_id=tmp_path)
    other = net()
    new = RNGD(other)
    expect(other, new, checkpoint.FileSystemReader(tmp_path).read_metadata())
    state = dict(zip("mo", get_state_dict(other, new), strict=True))
    checkpoint.load(state, checkpoint_id=tmp_path)
    set_state_dict(other, new, model_state_dict=state["m"], optim_state_dict=state["o"])
    stepped(model, optimizer)
    stepped(other, new)
    assert distance(model.state_dict(), other.state_dict()) == 0


def test_what_is_expected_has_the_forms_of_what_was_saved():
    model = net()
    _, optimizer = stepped(model, RNGD(model, metric=MetricOptions(structure={"0": "shared", "2": "fallback"})))
    saved = get_optimizer_state_dict(model, optimizer)
    other = net()
    new = RNGD(other)  # with other structures
    expect(other, new, saved)
    for name, p in other.named_parameters():
        forms = {key: (value.shape, value.dtype) for key, value in saved["state"][name].items()}
        assert {key: (value.shape, value.dtype) for key, value in new.state[p].items()} == forms


def test_nothing_is_expected_of_another_model_or_after_a_step():
    model = net()
    optimizer = RNGD(model)
    with pytest.raises(ValueError, match=r"must have the optimizer's state of parameters of the model, such as '0.wei"):
        expect(model, optimizer, {"state": {"other.weight": {"metric": torch.zeros(2)}}})
    with pytest.raises(TypeError, match="checkpoint must be metadata or a mapping, got str"):
        expect(model, optimizer, "folder")
    stepped(model, optimizer)
    with pytest.raises(ValueError, match="optimizer must be new"):
        expect(model, optimizer, {})


def test_a_state_that_lost_all_metrics_is_refused():
    model = net()
    saved = copy.deepcopy(get_optimizer_state_dict(*stepped(model, RNGD(model))))
    for state in saved["state"].values():
        for key in state.keys() - {"lead"}:
            del state[key]
    other = net()
    with pytest.raises(ValueError, match=r"state_dict is of 3 steps, but has no metric of any layer.*relfisher.expect"):
        set_optimizer_state_dict(other, RNGD(other), saved)


@pytest.mark.parametrize("structure", ["auto", "fallback"])
def test_a_step_without_a_pass_a_rate_and_gradients_does_not_count(structure):
    metric = MetricOptions(structure=structure)
    models = [net(), net()]
    models[1].load_state_dict(models[0].state_dict())
    first, second = (RNGD(model, metric=metric, averaging=0.5) for model in models)
    before, rates = copy.deepcopy(first.state_dict()), [group["lr"] for group in first.param_groups]
    for group in first.param_groups:
        group["lr"] = torch.tensor(0.0)
    for parameter in models[0].parameters():
        parameter.grad = torch.zeros_like(parameter)
    first.step()
    for group, lr in zip(first.param_groups, rates, strict=True):
        group["lr"] = lr
    after = first.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for place, state in before["state"].items():
        assert all(torch.equal(value, after["state"][place][key]) for key, value in state.items())
    for model, optimizer in zip(models, (first, second), strict=True):
        stepped(model, optimizer)
    assert distance(models[0].state_dict(), models[1].state_dict()) == 0
