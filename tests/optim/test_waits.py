"""Between updates of the metric the host does not wait for the device; and what is not finite changes nothing."""

import copy
import math

import pytest
import torch
from builders import moved, weights
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from relfisher import RNGD, AdamWOptions, MetricOptions
from relfisher.optim import HealthWarning
from relfisher.studies.operations import Counted

SELDOM = MetricOptions(structure={"LayerNorm": "fallback"}, stats_interval=1000, refresh_interval=1000)


class Mixed(nn.Module):
    """Layers with a metric, one that is a head, and parameters that AdamW trains, one of them complex."""

    def __init__(self):
        super().__init__()
        self.words, self.first, self.norm = nn.Embedding(7, 6), nn.Linear(6, 8), nn.LayerNorm(8)
        self.conv, self.free = nn.Conv1d(2, 3, 3), nn.Parameter(torch.ones(4))
        self.phases = nn.Parameter(torch.ones(4, dtype=torch.complex128))
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        h = self.norm(torch.relu(self.first(self.words(x))))
        h = self.conv(h.view(-1, 2, 8)).flatten(1).relu()
        return self.head(nn.functional.pad(h, (0, 24 - h.shape[1]))) * self.free * self.phases.abs()


def run(model, seed):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randint(7, (24, 2), generator=generator), torch.randint(4, (24,), generator=generator)
    nn.functional.cross_entropy(model(x), y).backward()


def after_some(rule, **options):
    torch.manual_seed(0)
    model = Mixed().double()
    optimizer = RNGD(model, step_rule=rule, metric=SELDOM, fallback=AdamWOptions(max_share=1.0), **options)
    for seed in range(5):
        optimizer.zero_grad()
        run(model, seed)
        optimizer.step()
    optimizer.zero_grad()
    run(model, 5)
    return model, optimizer


CASES = [
    ("spectral", {}),
    ("normalized", {"total_steps": 100}),
    ("trust-region", {"averaging": 0.5, "momentum": 0.5}),
    ("spectral", {"averaging": 0.0, "weight_decay": 0.1}),
    ("normalized", {"state_dtype": torch.bfloat16}),
]


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_a_plain_step_reads_nothing(rule, options):
    _, optimizer = after_some(rule, **options)
    with Counted() as counted:
        optimizer.step()
    assert counted.reads == 0


@pytest.mark.parametrize(("rule", "options"), CASES)
def test_a_plain_step_runs_where_numbers_have_no_values(rule, options):
    _, optimizer = after_some(rule, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):  # any read raises
        optimizer.step()


@pytest.mark.parametrize(("rule", "options"), CASES)
@pytest.mark.parametrize("name", ["words.weight", "first.bias", "norm.weight", "free", "phases", "head.weight"])
def test_one_gradient_that_is_not_finite_changes_nothing(rule, options, name):
    model, optimizer = after_some(rule, **options)
    with optimizer.average():
        before = weights(model)
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    gradient = model.get_parameter(name).grad
    gradient.view(-1)[1] = math.inf if name == "head.weight" else math.nan
    with Counted() as counted:
        optimizer.step()
    assert counted.reads == 0
    exact = {"rtol": 1e-15, "atol": 1e-16}  # but for the way to the average and back
    torch.testing.assert_close(weights(model), before, **exact)
    torch.testing.assert_close(optimizer.state_dict()["state"], kept, **exact)
    with pytest.warns(HealthWarning, match="step skipped"):
        assert optimizer.health.skipped_steps == 1
    optimizer.zero_grad()
    run(model, 6)
    optimizer.step()
    assert all(bool(torch.isfinite(value).all()) for value in weights(model).values())
    assert any(not torch.equal(before[each], value) for each, value in weights(model).items())


def test_the_warning_comes_with_the_next_update_of_the_metric():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    metric = MetricOptions(stats_interval=4, refresh_interval=4, warmup_refreshes=())
    optimizer = RNGD(model, metric=metric)
    for iteration in range(4):
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().mean().backward()
        if iteration == 2:
            model.weight.grad[0, 0] = math.nan
        optimizer.step()
    optimizer.zero_grad()
    model(torch.randn(5, 3)).square().mean().backward()
    with pytest.warns(HealthWarning, match=r"step skipped: .*iteration 3"):
        optimizer.step()
    assert optimizer.health.skipped_steps == 1
    assert "skipped_steps=1" in repr(optimizer.health)
    assert moved(model, optimizer, torch.randn(5, 3)) == {"weight", "bias"}


@pytest.mark.parametrize(("refreshed", "reads"), [(1000, 2 + 3 * 2), (1, 3 + 3 * 4)])
def test_a_step_with_statistics_reads_two_numbers_and_few_for_each_layer(refreshed, reads):
    """For each layer a number that is on the host anyway, and whether its samples are finite; one for all refreshes.

    A refresh also uses the number on the host, twice.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    metric = MetricOptions(structure="shared", stats_interval=1, refresh_interval=refreshed, warmup_refreshes=())
    optimizer = RNGD(model, fit="plain", metric=metric)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(9, 6).double()).square().mean().backward()
        with Counted() as counted:
            optimizer.step()
    assert counted.reads == reads
