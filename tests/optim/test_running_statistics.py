"""The running statistics of batch normalization are averaged over the same window as the weights."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from relfisher import RNGD, MetricOptions
from relfisher.optim import HealthWarning

MOMENTUM, SHARE = 0.3, 0.25


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 4), nn.BatchNorm1d(4, **{"momentum": MOMENTUM, **options}), nn.ReLU(), nn.Linear(4, 2)
    ).double()


def batch(seed):
    return torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def step(model, optimizer, seed, scale=1.0):
    optimizer.zero_grad()
    (scale * model(batch(seed))).square().mean().backward()
    optimizer.step()


def skipped(model, optimizer):
    step(model, optimizer, 3)
    assert optimizer.health.skipped_steps == 1


def test_they_are_averages_over_the_window_of_the_weights():
    model = network()
    optimizer = RNGD(model, averaging=SHARE)
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    mean, variance = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for count in range(1, 40):
        step(model, optimizer, count)
        share = min(MOMENTUM, 1 / (SHARE * count))
        mean += share * (seen[-1].mean(0) - mean)
        variance += share * (seen[-1].var(0) - variance)
        assert_close(model[1].running_mean, mean)
        assert_close(model[1].running_var, variance)


def test_the_passes_of_one_step_move_them_less_by_the_same_factor():
    model = network()
    optimizer = RNGD(model, averaging=SHARE)
    for count in range(1, 40):
        step(model, optimizer, count)
    before, seen = model[1].running_mean.clone(), []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().mean(0)))
    for seed in (50, 51):
        model(batch(seed)).square().mean().backward()
    optimizer.step()
    plain = before.lerp(seen[0], MOMENTUM).lerp(seen[1], MOMENTUM)
    assert_close(model[1].running_mean, before.lerp(plain, 1 / (SHARE * 40 * MOMENTUM)))


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}])
def test_others_are_left_to_torch(options):
    model, plain = network(**options), network(**options)
    optimizer = RNGD(model)
    for seed in range(3):
        step(model, optimizer, seed)
        plain(batch(seed))
    assert (model[1].running_mean is None) == (plain[1].running_mean is None)
    if plain[1].num_batches_tracked is not None:
        assert model[1].num_batches_tracked == plain[1].num_batches_tracked


def test_without_an_average_they_are_those_of_torch():
    model = network()
    optimizer = RNGD(model, averaging=0.0)
    seen = []
    model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    mean = torch.zeros(4, dtype=torch.float64)
    for seed in range(20):
        step(model, optimizer, seed)
        mean += MOMENTUM * (seen[-1].mean(0) - mean)
    assert_close(model[1].running_mean, mean)


@pytest.mark.parametrize("interval", [1, 100], ids=["with statistics", "plain"])
def test_a_batch_that_is_not_finite_leaves_them_as_they_are(interval):
    model = network()
    metric = MetricOptions(stats_interval=interval, refresh_interval=interval, warmup_refreshes=())
    optimizer = RNGD(model, metric=metric)
    for seed in range(3):
        step(model, optimizer, seed)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    model[0].register_forward_pre_hook(lambda _, args: (args[0] * float("nan"),))
    with pytest.warns(HealthWarning, match="skipped"):
        skipped(model, optimizer)
    for name, each in model.state_dict().items():
        assert name.endswith("num_batches_tracked") or torch.equal(each, before[name])


@pytest.mark.parametrize("affine", [True, False])
def test_two_optimizers_of_parts_average_each_their_own(affine):
    torch.manual_seed(0)
    parts = [
        nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, momentum=MOMENTUM, affine=affine), nn.ReLU()) for _ in range(2)
    ]
    model = nn.Sequential(*parts).double()
    optimizers = [RNGD(model, params=list(part.parameters()), averaging=SHARE) for part in model]
    seen, means = {}, [torch.zeros(5, dtype=torch.float64) for _ in range(2)]
    for place, part in enumerate(model):
        part[1].register_forward_pre_hook(lambda _, args, place=place: seen.update({place: args[0].detach().mean(0)}))
    for count in range(1, 30):
        for each in optimizers:
            each.zero_grad()
        model(batch(count)).square().mean().backward()
        for each in optimizers:
            each.step()
        for place, mean in enumerate(means):
            mean += min(MOMENTUM, 1 / (SHARE * count)) * (seen[place] - mean)
    for part, mean in zip(model, means, strict=True):
        assert_close(part[1].running_mean, mean)


def test_those_of_parts_that_join_later_are_averaged_from_then_on():
    model = nn.Sequential(network(), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, momentum=MOMENTUM)).double())
    optimizer = RNGD(model, params=list(model[0].parameters()), averaging=SHARE)
    for seed in range(30):
        step(model, optimizer, seed)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    step(model, optimizer, 30)
    before, seen = model[1][1].running_mean.clone(), []
    model[1][1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().mean(0)))
    step(model, optimizer, 31)
    moved = (model[1][1].running_mean - before) / (seen[0] - before)
    assert float(moved.max()) < MOMENTUM
