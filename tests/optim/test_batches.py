"""Layers of equal shape are one batch: the same steps, in as many operations as there are shapes."""

import copy
from dataclasses import dataclass

import pytest
import torch
from builders import inputs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from relfisher import RNGD, MetricOptions
from relfisher.optim import batches
from relfisher.structures import SharedBlock
from relfisher.studies.operations import Counted

RULES = ("spectral", "normalized", "trust-region")


class Tower(nn.Module):
    """Branches of several kinds, whose sum goes on: layers of equal shape, some of which may have no part in a pass."""

    def __init__(self, kinds, width=4):
        super().__init__()
        self.branches = nn.ModuleList([KINDS[kind](width) for kind in kinds])
        self.head = nn.Linear(width, 3)
        self.idle = ()

    def forward(self, x):
        for place, branch in enumerate(self.branches):
            if place not in self.idle:
                x = x + torch.tanh(branch(x))
        return self.head(x)


class Convolved(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.filter = nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x):
        return self.filter(x.unsqueeze(1)).squeeze(1)


class Attending(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        x = x.unsqueeze(1)
        return self.attention(x, x, x, need_weights=False)[0].squeeze(1)


class Cross(nn.Module):
    """Attends to keys of another width, so that its projections are layers of their own, in one bias."""

    def __init__(self, width):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, kdim=3, batch_first=True)

    def forward(self, x):
        x = x.unsqueeze(1)
        return self.attention(x, x[..., :3], x, need_weights=False)[0].squeeze(1)


KINDS = {
    "cross-attention": Cross,
    "linear": lambda width: nn.Linear(width, width),
    "no bias": lambda width: nn.Linear(width, width, bias=False),
    "norm": nn.LayerNorm,
    "convolution": Convolved,
    "attention": Attending,
    "weight norm": lambda width: nn.utils.parametrizations.weight_norm(nn.Linear(width, width)),
}


def tower(kinds):
    torch.manual_seed(len(kinds))
    return Tower(kinds).double()


def trained(model, optimizer, first, steps, idle=lambda _: ()):
    for step in range(first, first + steps):
        model.idle = idle(step)
        optimizer.zero_grad()
        loss = model(inputs(step, 12, 4)).square().sum(-1).sub(1).square().mean()
        loss.backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def one_by_one(*_):
    return 1


def options(rule, structure):
    return {"step_rule": rule, "metric": MetricOptions(structure=structure, stats_interval=2, refresh_interval=3)}


@settings(max_examples=20)
@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=2, max_size=6),
    rule=st.sampled_from(RULES),
    structure=st.sampled_from(["auto", "shared", "neuron", "kronecker", "diagonal"]),
    together=st.integers(1, 60),
)
def test_steps_do_not_depend_on_how_layers_are_batched(kinds, rule, structure, together):
    weights = []
    for how_many in (batches.how_many, lambda numbers, _: max(1, together // numbers)):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(batches, "how_many", how_many)
            model = tower(kinds)
            weights.append(trained(model, RNGD(model, **options(rule, structure)), 0, 7))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_batches_are_larger_where_an_operation_is_a_launch():
    layer = 768 * 3073
    assert [batches.how_many(layer, torch.device(name)) for name in ("cpu", "cuda")] == [1, 28]
    assert [batches.how_many(1 << 30, torch.device(name)) for name in ("cpu", "cuda")] == [1, 1]


@pytest.mark.parametrize("rule", RULES)
def test_layers_without_a_gradient_stay_where_they_are_and_others_of_their_batch_move(rule):
    kinds = ["linear", "linear", "linear", "norm", "norm"]
    weights = []
    for how_many in (batches.how_many, one_by_one):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(batches, "how_many", how_many)
            model = tower(kinds)
            optimizer = RNGD(model, averaging=0.0, weight_decay=0.0, **options(rule, "shared"))
            trained(model, optimizer, 0, 4)
            before = model.branches[1].weight.clone()
            trained(model, optimizer, 4, 3, idle=lambda _: (1, 4))
            assert torch.equal(model.branches[1].weight, before)
            weights.append(trained(model, optimizer, 7, 4, idle=lambda step: (step % 3,)))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_a_state_is_that_of_its_layer_whatever_shares_its_memory(rule):
    """Copied, loaded, or with a tensor replaced, the optimizer goes on as before."""
    model = tower(["linear"] * 3)
    optimizer = RNGD(model, **options(rule, "shared"))
    trained(model, optimizer, 0, 5)
    state = optimizer.state[model.branches[1].weight]
    key = "root" if rule == "spectral" else "inverse"
    assert state[key].untyped_storage().nbytes() >= 2 * state[key].nbytes
    twin = tower(["linear"] * 3)
    twin.load_state_dict(model.state_dict())
    loaded = RNGD(twin, **options(rule, "shared"))
    loaded.load_state_dict(optimizer.state_dict())
    copied = copy.deepcopy((model, optimizer))
    replaced = copy.deepcopy((model, optimizer))
    its = replaced[1].state[replaced[0].branches[1].weight]
    its[key] = its[key].clone()
    expected = trained(model, optimizer, 5, 5)
    for other, its_optimizer in ((twin, loaded), copied, replaced):
        for one, two in zip(expected, trained(other, its_optimizer, 5, 5), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def plain_step(rule, depth):
    """Return how many operations and reads a step without statistics and refreshes has."""
    model = tower(["linear", "norm"] * depth)
    optimizer = RNGD(model, step_rule=rule, metric=MetricOptions(stats_interval=1000, refresh_interval=1000))
    trained(model, optimizer, 0, 5)
    optimizer.zero_grad()
    model(inputs(5, 12, 4)).square().mean().backward()
    with Counted() as counted:
        optimizer.step()
    return counted.operations, counted.reads


@pytest.mark.parametrize("rule", RULES)
def test_a_plain_step_takes_as_many_operations_for_many_layers_as_for_few(rule):
    few, many = plain_step(rule, 3), plain_step(rule, 12)
    assert few == many
    assert many[1] == 0


class Multiple(SharedBlock):
    """A structure derived from another one, whose instances differ in how factors are applied."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def apply(self, field, factors):
        return self.factor * super().apply(field, factors)


@dataclass
class Unhashable(SharedBlock):
    """A structure that can be compared, but not hashed."""

    rank: int | None = None


@pytest.mark.parametrize("derived", [Multiple, Unhashable])
def test_derived_structures_are_like_none_but_themselves(derived):
    weights = []
    for how_many in (batches.how_many, one_by_one):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(batches, "how_many", how_many)
            model = tower(["linear"] * 3)
            structures = {f"branches.{place}": derived(place + 1) for place in range(3)}
            metric = MetricOptions(structure=structures)
            weights.append(trained(model, RNGD(model, step_rule="trust-region", metric=metric), 0, 3))
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
