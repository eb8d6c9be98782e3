"""Layers share the steps in which they have statistics and refreshes, so that most steps of a deep model are plain."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from relfisher import RNGD, MetricOptions
from relfisher.optim import refreshing
from relfisher.optim.turns import _turns
from relfisher.studies.networks import Transformer
from relfisher.studies.operations import Counted


def transformer(depth, **options):
    """Return the layers of a small GPT, and an optimizer for it."""
    torch.manual_seed(0)
    model = Transformer(16, 8, 8, depth, tied=True)
    return model, RNGD(model, **options)


def iterate(model, optimizer, seed, counted=None):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(16, (2, 9), generator=generator)
    optimizer.zero_grad()
    cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
    with counted or Counted():
        optimizer.step()


def at(optimizer, iteration):
    """Let an optimizer be at an iteration after those of its warm-up."""
    for group in optimizer.param_groups:
        group["iteration"] = iteration
    optimizer._curvature.advance(iteration)


def test_most_steps_of_a_deep_model_are_plain():
    """Of 200 steps, 123 have neither statistics nor refreshes. If each of the 75 layers had its own turn, none had."""
    _, optimizer = transformer(12)
    curvature = optimizer._curvature
    turns, schedule = curvature._turns, curvature._schedule
    layers = len(curvature.records)
    assert sum(map(len, turns.refreshes)) == layers
    assert max(map(len, turns.refreshes)) <= layers // 4
    busy = set()
    for iteration in range(400, 600):
        for own, is_due in ((turns.statistics, schedule.statistics_due), (turns.refreshes, schedule.refresh_due)):
            if any(is_due(iteration, place, len(own)) for place in range(len(own))):
                busy.add(iteration)
    assert (layers, 200 - len(busy)) == (75, 123)


def test_a_step_with_refreshes_reads_once_for_all():
    model, optimizer = transformer(4, metric=MetricOptions(stagger=False))
    for seed in range(3):
        iterate(model, optimizer, seed)
    at(optimizer, 200)
    with_all = Counted()
    optimizer._curvature.observer.due = set()
    iterate(model, optimizer, 3, with_all)
    # Of each layer and each of its factors a number that is on the host anyway.
    states = [state for state in optimizer.state.values() if "ema_weight" in state]
    on_host = sum(1 + len([key for key in ("metric", "output") if key in state]) for state in states)
    assert with_all.reads == 1 + on_host


@pytest.mark.parametrize("rule", ["spectral", "normalized"])
@pytest.mark.parametrize("structure", ["auto", "shared", "neuron", "kronecker"])
def test_refreshes_together_are_those_of_single_layers(rule, structure, monkeypatch):
    weights = []
    for how_many in (refreshing.how_many, lambda *_: 1):
        monkeypatch.setattr(refreshing, "how_many", how_many)
        metric = MetricOptions(structure={"Linear": structure}, stats_interval=2, refresh_interval=3)
        model, _ = transformer(3)
        model = model.double()
        optimizer = RNGD(model, step_rule=rule, fit="plain", metric=metric)
        for seed in range(6):
            iterate(model, optimizer, seed)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_one_layer_that_cannot_be_refreshed_keeps_its_factor_and_others_get_theirs():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)]).double()
    metric = MetricOptions(structure="shared", stats_interval=1, refresh_interval=1, warmup_refreshes=(), stagger=False)
    optimizer = RNGD(model, step_rule="trust-region", fit="plain", metric=metric)
    x = torch.randn(7, 4, dtype=torch.float64)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.state[model[2].weight]["metric"].fill_(-1.0)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    with pytest.warns(UserWarning, match="the metric of 2 could not be factorised"):
        optimizer.step()
    after = optimizer.state_dict()["state"]
    same = [torch.equal(before[2 * place]["inverse"], after[2 * place]["inverse"]) for place in range(5)]
    assert same == [False, False, True, False, False]
    assert optimizer.health.failed_refreshes == 1


def test_turns_are_of_a_kind_as_far_as_they_are_not_too_long():
    def turns(items, limit=100):
        return _turns(items, lambda item: item[0], lambda _: 1, lambda item: int(item[1:]), limit)

    many = [f"a{1}" for _ in range(3)] + ["b1"] * 2 + ["c1"] * 3
    assert turns(many) == [["a1"] * 2, ["a1"], ["b1"] * 2, ["c1"] * 2, ["c1"]]
    assert turns(["a60", "b1", "a60", *["c1"] * 5]) == [["a60"], ["a60", "b1"], ["c1"] * 2, ["c1"] * 2, ["c1"]]
    assert turns(["a500", "a300", "a300", *["b1"] * 5])[:3] == [["a500"], ["a300"], ["a300"]]
    assert turns([]) == []
