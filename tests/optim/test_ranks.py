"""Several processes that train one model take the steps of one process with all samples, or say why they do not."""

import copy
import itertools
import math
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import ddp
import fsdp
import pytest
import torch
from processes import run_together, unchecked
from scenarios import (
    METRIC,
    SCENARIOS,
    STEPS,
    WRAPPED,
    Bare,
    Experts,
    batches,
    distance,
    made,
    masked,
    perceptron,
    table,
    vectors,
)
from torch import nn
from torch.distributed import get_rank
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import register_optimizer_step_pre_hook

from relfisher import RNGD, Preconditioner
from relfisher.observe import Reading
from relfisher.optim.rules import Spectral

NAMES = [name for name, each in SCENARIOS.items() if each.is_wrapped]
GOING_ON = ("spectral", "trust region", "language", "adapted", "experts")


def test_the_docs_say_what_is_tested():
    text = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row for row in rows if row in set(table())] == list(table())


def trained(name, parts, *, together=False, start=0, saved=None, replicate=None):
    """Train on the batches of some processes, and return the model and its optimizer."""
    model = made(name)
    net = DistributedDataParallel(model, find_unused_parameters=name == "experts") if together else model
    # Some frameworks make the optimizer before they wrap the model.
    options = {**SCENARIOS[name].options, "metric": METRIC, "replicate": replicate}
    optimizer = RNGD(model if name == "spectral" else net, **options)
    if saved is not None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    for step in range(start, start + STEPS):
        optimizer.zero_grad()
        for part in parts:
            several = batches(name, step, part)
            for place, (x, y) in enumerate(several, start=1):
                with net.no_sync() if together and place < len(several) else nullcontext():
                    with masked(name, optimizer, x):
                        outputs = net(x)
                    (cross_entropy(outputs, y) / len(several) / len(parts)).backward()
        optimizer.step()
    return model, optimizer


def all_trained(alone):
    """Return, for each scenario, what a process saves after its steps, and which metrics it keeps.

    It does all of the work, or a share, or a share with what one process has saved.
    """
    found, parts = {}, [get_rank()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in NAMES:
            ways = {"all": {"replicate": True}, "shared": {"replicate": False}}
            if name in alone:
                ways["loaded"] = {"replicate": False, "start": STEPS, "saved": alone[name]}
            for way, options in ways.items():
                model, optimizer = trained(name, parts, together=True, **options)
                kept = [key for key, p in model.named_parameters() if "metric" in optimizer.state.get(p, {})]
                found[name, way] = copy.deepcopy((model.state_dict(), optimizer.state_dict())), kept
    return found


@pytest.mark.parametrize("world", WRAPPED)
@pytest.mark.filterwarnings("ignore")
def test_several_processes_step_as_one_with_all_samples_and_their_states_load_into_one(world):
    parts, saved, after = range(world), {}, {}
    for name in NAMES:
        with unchecked():
            model, optimizer = trained(name, parts)
            saved[name] = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            if name in GOING_ON:
                after[name] = trained(name, parts, start=STEPS, saved=saved[name])[0].state_dict()
    found = run_together(world, all_trained, {name: saved[name] for name in GOING_ON})
    for name, way in found[0]:
        expected = after[name] if way == "loaded" else saved[name][0]
        for rank, each in enumerate(found):
            (weights, _), _ = each[name, way]
            assert distance(weights, found[0][name, way][0][0]) == 0, f"{name}, {way}: ranks 0 and {rank} differ"
            assert distance(weights, expected) < 1e-9, f"{name}, {way}: rank {rank} differs from one process"
        everything, kept = found[0][name, "all"][1], [each[name, way][1] for each in found]
        if way == "all":
            assert kept == [everything] * world, name
        else:
            assert sorted(itertools.chain(*kept)) == sorted(everything), f"{name}: metrics are not shared out"
        if way == "shared" and name in GOING_ON:
            with unchecked():
                weights = trained(name, parts, start=STEPS, saved=found[-1][name, way][0])[0].state_dict()
            assert distance(weights, after[name]) < 1e-9, f"{name}: a state of {world} goes on differently in one"


def before_a_step(net, optimizer, seed):
    """Compute the gradients of random samples, and return a copy of the weights."""
    x, y = vectors(torch.Generator().manual_seed(seed), 6)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.zero_grad()
    cross_entropy(net(x), y).backward()
    return before


class Stumbling(Spectral):
    """The spectral rule, with a step of one layer that is not finite."""

    stumbles = False

    def polar(self, field):
        return super().polar(field) * (math.nan if self.stumbles and field.shape[-1] == 5 else 1.0)


def troubled(parts, *, together=False):
    """Train with a gradient, a step, a batch and a metric that are not good, each somewhere, and share the work."""
    torch.manual_seed(0)
    rule, model, add = Stumbling(), perceptron().double(), Reading.average_in
    net = DistributedDataParallel(model) if together else model
    optimizer = RNGD(net, step_rule=rule, metric=METRIC, replicate=False)

    def drop(reading, layer, *others):
        return layer.name != "3" and add(reading, layer, *others)

    for step in range(16):
        optimizer.zero_grad()
        for part in parts:
            x, y = vectors(torch.Generator().manual_seed(10 * step + part), 6)
            (cross_entropy(net(x), y) / len(parts)).backward()
        if step == 3 and 1 in parts:
            next(net.parameters()).grad[0, 0] = math.nan
        rule.stumbles = step == 7
        for state in optimizer.state.values():
            if step == 10 and "metric" in state:
                state["metric"].neg_()
        with patch.object(Reading, "average_in", drop) if step == 13 else nullcontext():
            optimizer.step()
    return net, optimizer


def difficult():
    """Return what happens to a process in some difficult situations."""
    found, rank = {}, get_rank()
    torch.manual_seed(0)
    net = DistributedDataParallel(perceptron().double())
    optimizer = RNGD(net, metric=METRIC)
    for step in range(6):
        before = before_a_step(net, optimizer, 10 * step + rank)
        if step == 3 and rank == 1:
            next(net.parameters()).grad[0, 0] = math.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        moved = any(not torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
        assert moved or step == 3
    found["nan"] = net.module.state_dict(), optimizer.health.skipped_steps

    net, optimizer = troubled([rank], together=True)
    found["trouble"] = copy.deepcopy(net.module.state_dict()), optimizer.health
    for name in ("0", "2", "3"):
        try:
            found[name] = optimizer.metric(name).shape
        except ValueError as error:
            found[name] = str(error)
    model, other = copy.deepcopy((net.module, optimizer))  # the copy trains alone
    for seed in range(2):  # the second has what was seen since the first
        before_a_step(model, other, seed)
        other.step()
    found["copied"] = [other.metric(name).shape for name in ("0", "2", "3")]

    torch.manual_seed(0)
    model = perceptron().double()
    optimizer = RNGD(model, metric=METRIC)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for step in range(6):
            before_a_step(model, optimizer, 10 * step + rank)
            optimizer.step()
    found["apart"] = model.state_dict(), [str(each.message) for each in told]

    net = DistributedDataParallel(perceptron().double())
    optimizer = RNGD(net, metric=METRIC)
    if rank == 1:
        model = perceptron().double()
        loaded = RNGD(model, metric=METRIC)
        before_a_step(model, loaded, 0)
        loaded.step()
        optimizer.load_state_dict(loaded.state_dict())
    for situation, inside in {"state": nullcontext(), "join": net.join()}.items():
        before_a_step(net, optimizer, rank)
        if situation == "join":
            optimizer = RNGD(net, metric=METRIC)
        try:
            with inside:
                optimizer.step()
        except ValueError as error:
            found[situation] = str(error)

    torch.manual_seed(0)
    net = DistributedDataParallel(Bare().double(), find_unused_parameters=True)
    optimizer = RNGD(net, metric=METRIC, fit="interpolate")
    for step in range(12):
        before_a_step(net, optimizer, 10 * step + rank)
        optimizer.step()
    found["bare"] = (
        net.module.state_dict(),
        all("metric" in optimizer.state[each.matrix] for each in net.module.experts),
    )

    torch.manual_seed(0)
    model = Experts()
    model.experts = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.PReLU()) for _ in range(2))
    net = DistributedDataParallel(model.double(), find_unused_parameters=True)
    optimizer = RNGD(net, metric=METRIC, fit="interpolate")
    for step in range(12):
        before_a_step(net, optimizer, 10 * step + rank)
        optimizer.step()
    roles = {layer.name: layer.role for layer in optimizer.layers}
    found["slopes"] = [
        roles[f"experts.{place}.0"].response.function.weight is each[1].weight
        for place, each in enumerate(model.experts)
    ]

    torch.manual_seed(0)
    net = DistributedDataParallel(perceptron().double())
    optimizer = RNGD(net, metric=METRIC)
    for step in range(6):
        before_a_step(net, optimizer, 10 * step + rank)
        if step == 0:
            optimizer.zero_grad(set_to_none=False)
        optimizer.step()
    found["zeros"] = net.module.state_dict()
    model, other = copy.deepcopy((net.module, optimizer))  # the copy trains alone
    if rank == 0:
        before_a_step(model, other, 0)
        other.step()

    for replicate in (False, True):
        torch.manual_seed(0)
        net = DistributedDataParallel(perceptron().double())
        optimizer = RNGD(net, metric=METRIC, state_dtype=torch.bfloat16, replicate=replicate)
        for step in range(12):
            before_a_step(net, optimizer, 10 * step + rank)
            optimizer.step()
        found[f"rounded, {replicate}"] = net.module.state_dict()

    torch.manual_seed(0)
    net = DistributedDataParallel(perceptron().double())
    preconditioner = Preconditioner(net, metric=METRIC)
    before_a_step(net, preconditioner, rank)
    preconditioner.step()
    found["gradients"] = [parameter.grad for parameter in net.parameters()]
    return found


@pytest.mark.filterwarnings("ignore")
def test_processes_skip_together_and_train_apart_only_if_they_are():
    found = run_together(2, difficult)
    (one, skipped), (other, others) = (each["nan"] for each in found)
    assert skipped == others == 1
    assert distance(one, other) == 0
    alone, own = troubled(range(2))
    assert (own.health.skipped_steps, own.health.dropped_batches) == (2, 1)
    assert own.health.failed_refreshes > 0
    for name in ("0", "2", "3"):
        shape = own.metric(name).shape
        assert {each[name] for each in found} > {shape}, name
        assert any("is kept by process" in str(each[name]) for each in found), name
    for rank, each in enumerate(found):
        assert distance(each["trouble"][0], found[0]["trouble"][0]) == 0
        assert distance(each["trouble"][0], alone.state_dict()) < 1e-9
        assert each["trouble"][1] == own.health
        assert each["copied"] == [own.metric(name).shape for name in ("0", "2", "3")]
        weights, told = each["apart"]
        assert any("each of 2 processes trains a model of its own" in message for message in told)
        torch.manual_seed(0)
        model = perceptron().double()
        optimizer = RNGD(model, metric=METRIC)
        for step in range(6):
            before_a_step(model, optimizer, 10 * step + rank)
            optimizer.step()
        assert distance(weights, model.state_dict()) < 1e-12
        for name in ("0", "2", "3"):
            assert f"the metric of {name}" in each["state"]
        assert "inside of DistributedDataParallel.join, RNGD cannot step" in each["join"]
        assert each["bare"][1]
        assert each["slopes"] == [True, True]
    for name in ("bare", "zeros", "rounded, False", "rounded, True"):
        one, other = (each[name][0] if name == "bare" else each[name] for each in found)
        assert distance(one, other) == 0, name
    for one, other in zip(*(each["gradients"] for each in found), strict=True):
        assert torch.equal(one, other)


def precisely(task, *arguments):
    """Return what a task does in double precision."""
    torch.set_default_dtype(torch.float64)
    return task(*arguments)


def interrupted(example, checkpoint):
    """Train until process 1 is lost, and return the error of the others."""
    steps = itertools.count(1)

    def lose(*_):
        if get_rank() == 1 and next(steps) == 25:
            os._exit(0)

    register_optimizer_step_pre_hook(lose)
    try:
        example.train(checkpoint)
    except RuntimeError as error:
        return str(error)
    return None


@pytest.mark.parametrize("example", [ddp, fsdp], ids=lambda module: module.__name__)
@pytest.mark.filterwarnings("ignore")
def test_a_lost_process_is_an_error_for_the_others_and_the_run_goes_on_with_more_of_them(tmp_path, example):
    lost, whole = tmp_path / "lost.pt", tmp_path / "whole.pt"
    error, gone = run_together(2, precisely, interrupted, example, lost)
    assert gone is None
    assert error
    assert torch.load(lost)["steps"] == 20
    resumed = run_together(3, precisely, example.train, lost)
    straight = run_together(2, precisely, example.train, whole)
    assert len({*resumed, *straight}) == 1
    assert torch.load(lost)["model"]["1.weight"].dtype == torch.float64
    assert distance(torch.load(lost)["model"], torch.load(whole)["model"]) < 1e-12
