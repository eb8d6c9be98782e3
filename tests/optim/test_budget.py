"""A limit of the whole state: plan and training fit the same structures into it, and keep as many bytes as planned."""

import copy
import math
import re
from functools import cache

import pytest
import torch
from builders import step, structures, taken
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from relfisher import RNGD, MetricOptions, plan
from relfisher.observe import Role
from relfisher.optim.assignment import choices, state_bytes
from relfisher.responses import SigmoidBernoulli
from relfisher.studies.networks import Transformer


def dense():
    return nn.Sequential(nn.Linear(20, 520), nn.ReLU(), nn.Linear(520, 72), nn.Tanh(), nn.Linear(72, 10)), (20,)


def convolutional():
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(576, 30), nn.Sigmoid()]
    return nn.Sequential(*layers, nn.LayerNorm(30), nn.Linear(30, 10)), (3, 8, 8)


def language():
    return Transformer(40, 8, 64, 1, tied=True), None


class Mixed(nn.Module):
    """Layers of which one is refused, one is frozen, one is never reached and one has its weight computed."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(11, 24), nn.RMSNorm(24)
        self.hidden, self.frozen = nn.Linear(24, 24), nn.Linear(24, 24).requires_grad_(False)
        self.spare, self.normed = nn.Linear(50, 50), parametrizations.weight_norm(nn.Linear(24, 24))
        self.scale, self.head, self.twin = nn.Parameter(torch.ones(24)), nn.Linear(24, 11), nn.Linear(24, 11)
        self.twin.weight = self.head.weight

    def forward(self, tokens):
        h = torch.tanh(self.hidden(self.norm(self.embed(tokens))))
        h = self.normed(self.frozen(h)) * self.scale
        return self.head(h) + self.twin(h)


def mixed():
    return Mixed(), None


def made(make):
    """Return a model, a batch and a loss of its outputs."""
    torch.manual_seed(0)
    model, shape = make()
    x = torch.randint(11, (6, 8)) if shape is None else torch.randn(6, *shape)
    return model, x, lambda z: functional.cross_entropy(z.flatten(0, -2), torch.arange(z[..., 0].numel()) % 10)


@cache
def ends(make, **options):
    """Return the bytes without a limit, and the fewest."""
    model, x, loss = made(make)
    metrics = MetricOptions(), MetricOptions(structure="diagonal")
    return [plan(model, x, metric, loss=loss, **options).bytes for metric in metrics]


def trained(model, x, loss, **options):
    optimizer = RNGD(model, **options)
    loss(model(x)).backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("make", [dense, convolutional, language, mixed])
@pytest.mark.filterwarnings("ignore")
@given(share=st.floats(0, 1), options=st.sampled_from([{}, {"momentum": 0.0}, {"averaging": 0.0}]))
def test_plan_and_training_fit_the_same_structures_into_a_limit(make, share, options):
    model, x, loss = made(make)
    free, least = ends(make, **options)
    limit = round(least + share * (free - least))
    planned = plan(model, x, loss=loss, state_bytes=limit, **options)
    assert planned.bytes <= limit
    optimizer = trained(model, x, loss, state_bytes=limit, **options)
    assert taken(optimizer) == planned.bytes
    kept = {layer.name: layer.chosen.structure for layer in planned if layer.samples}
    views = {each.name: each for each in optimizer.layers if each.structure is not None}
    shapes = {layer.name: layer.shape for layer in planned}
    assert kept == {name: each.structure.label(shapes[name]) for name, each in views.items()}


@pytest.mark.parametrize("make", [dense, convolutional, language])
def test_a_limit_that_does_not_bind_changes_nothing(make):
    model, x, loss = made(make)
    free = plan(model, x, loss=loss)
    assert str(plan(model, x, loss=loss, state_bytes=free.bytes)) == str(free)
    assert plan(model, x, loss=loss, state_bytes=free.bytes - 1).bytes < free.bytes


@pytest.mark.parametrize("make", [dense, convolutional, language])
def test_a_limit_that_cannot_be_met_says_what_can(make):
    model, x, loss = made(make)
    least = plan(model, x, MetricOptions(structure="diagonal"), loss=loss)
    assert plan(model, x, loss=loss, state_bytes=least.bytes).bytes == least.bytes
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for limit in (least.bytes - 1, 1, "1x adam"):
        with pytest.raises(ValueError, match=f"state_bytes must be at least {least.bytes} .*got {limit!r}") as caught:
            plan(model, x, loss=loss, state_bytes=limit)
        with pytest.raises(ValueError, match=re.escape(str(caught.value))):
            RNGD(model, state_bytes=limit)
        assert f"the average takes {4 * numbers}, the momentum {4 * numbers}, AdamW 0, and" in str(caught.value)
    times = float(re.search(r"\(([0-9.]+)x adam\)", str(caught.value))[1])
    assert plan(model, x, loss=loss, state_bytes=f"{times}x adam").bytes <= times * 8 * numbers
    assert times * 8 * numbers - least.bytes < 0.001 * 8 * numbers


@pytest.mark.parametrize("given_", ["adam", "x adam", "0x adam", "-1x adam", "1x sgd", "", 0, -1, math.inf, math.nan])
def test_what_is_no_limit_is_refused(given_):
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="state_bytes must be a"):
        RNGD(model, state_bytes=given_)
    with pytest.raises(ValueError, match="state_bytes must be a"):
        plan(model, torch.ones(1, 3), state_bytes=given_)


def test_adam_is_that_of_the_trained_parameters():
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 30)).double()
    model[2].requires_grad_(False)
    x = torch.randn(4, 40).double()
    adam = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    model(x).sum().backward()
    adam.step()
    moments = sum(
        value.nbytes for state in adam.state.values() for key, value in state.items() if key.startswith("exp")
    )
    assert plan(model, x, state_bytes="1.5 x adam").bytes == plan(model, x, state_bytes=1.5 * moments).bytes
    with pytest.raises(ValueError, match=f"got '0.5x adam', which is {moments // 2}"):
        plan(model, x, state_bytes="0.5x adam")


def test_structures_get_smaller_by_rank_then_to_shared_blocks_then_to_the_diagonal():
    model, x, loss = made(dense)
    limit, seen = None, []
    while not seen or seen[-1] != "diagonal":
        planned = plan(model, x, loss=loss, fit="plain", state_bytes=limit)
        limit = planned.bytes - 1  # asks for the next smaller structure of some layer
        seen += [each.chosen.structure for each in planned if each.name == "2"]
    ranks = [f"kronecker, rank {rank}" for rank in (64, 32, 16, 8)]
    assert list(dict.fromkeys(seen)) == [*ranks, "shared, rank 8", "diagonal"]
    network = made(dense)[0]
    optimizer = RNGD(network)
    for record in optimizer._curvature.records.values():
        role = Role(SigmoidBernoulli())
        (found,) = choices({record.layer: role}, {record.layer: "auto"}, 1 << 30).values()
        sizes = [state_bytes(record.layer, each) for each in found]
        assert sizes == sorted(set(sizes), reverse=True)
        assert found[-1].name == "diagonal"


def test_layers_with_a_structure_of_their_own_keep_it():
    model, x, loss = made(dense)
    metric = MetricOptions(structure={"2": "shared"})
    least = plan(model, x, MetricOptions(structure={"0": "diagonal", "2": "shared", "4": "diagonal"}), loss=loss)
    found = plan(model, x, metric, loss=loss, state_bytes=least.bytes)
    assert [layer.chosen.structure for layer in found] == ["diagonal", "shared", "diagonal"]
    with pytest.raises(ValueError, match=f"at least {least.bytes}"):
        plan(model, x, metric, loss=loss, state_bytes=least.bytes - 1)


class Late(nn.Module):
    """A model, a part of which runs later."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(30, 30), nn.Linear(30, 30)
        self.late, self.tied = nn.Linear(30, 30), nn.Linear(30, 30)
        self.goes = False

    def forward(self, x):
        h = self.second(torch.relu(self.first(x))).square()
        return self.tied(torch.tanh(self.late(h))) if self.goes else h


def run(model, optimizer, x):
    optimizer.zero_grad()
    functional.cross_entropy(model(x), torch.arange(len(x))).backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_layers_that_run_later_keep_to_what_was_left_for_them():
    torch.manual_seed(0)
    model, x = Late(), torch.randn(7, 30)
    metric = MetricOptions(structure_bytes=1 << 30)
    free, least = (plan(model, x, each, fit="plain").bytes for each in (metric, MetricOptions(structure="diagonal")))
    limit = (free + least) // 2
    optimizer = RNGD(model, fit="plain", state_bytes=limit, metric=metric)
    for iteration in range(4):
        model.goes = iteration > 1
        run(model, optimizer, x)
        assert taken(optimizer) <= limit
    assert len(structures(optimizer)) == 4
    again = copy.deepcopy(model)
    other = RNGD(again, fit="plain", state_bytes=limit, metric=metric)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):  # all roles are known at once, and in another order
        run(model, optimizer, x)
        run(again, other, x)
    assert structures(optimizer) == structures(other)
    for mine, its in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, its)


@pytest.mark.parametrize("make", [dense, convolutional, language])
@pytest.mark.filterwarnings("ignore")
def test_a_limited_run_resumes_and_is_copied_bitwise(make):
    model, x, loss = made(make)
    limit = sum(ends(make)) // 2
    optimizer = trained(model, x, loss, state_bytes=limit)
    resumed = copy.deepcopy(model)
    loaded = RNGD(resumed, state_bytes=limit)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied = copy.deepcopy({"model": model, "optimizer": optimizer})
    for net, own in ((model, optimizer), (resumed, loaded), (copied["model"], copied["optimizer"])):
        for _ in range(2):
            own.zero_grad()
            loss(net(x)).backward()
            own.step()
    for mine, *its in zip(*(each.parameters() for each in (model, resumed, copied["model"])), strict=True):
        assert all(torch.equal(mine, each) for each in its)


def test_layers_that_turn_out_to_have_no_metric_count_with_the_moments_of_adamw():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.twice = nn.Linear(9, 9), nn.Linear(9, 9)

        def forward(self, x):
            h = self.first(x)
            return torch.tanh(self.twice(h)) @ self.twice.weight

    model, x = Tied(), torch.randn(4, 9)
    planned = plan(model, x, MetricOptions(structure="diagonal"))
    assert planned.fallback_bytes == 8 * sum(parameter.numel() for parameter in model.twice.parameters())
    optimizer, before = RNGD(model, state_bytes=planned.bytes - 1), copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match="twice"), pytest.raises(ValueError, match=f"at least {planned.bytes} "):
        step(model, optimizer, x)
    assert all(torch.equal(mine, its) for mine, its in zip(model.state_dict().values(), before.values(), strict=True))
