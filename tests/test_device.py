"""What runs on a CPU runs on a GPU, to rounding; without one, these tests are skipped."""

import copy

import pytest
import torch
from builders import EveryKind, inputs, mlp, resumed, step
from torch import nn
from torch.nn.functional import cross_entropy

from relfisher import RNGD, MetricOptions, softmax_metric

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

RULES = ["spectral", "normalized", "trust-region"]
METRIC = MetricOptions(stats_interval=1, refresh_interval=4)


def trained(model, device, **options):
    """Return a model of every kind of layer after some steps on a device."""
    model = copy.deepcopy(model).to(device)
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.0
    optimizer = RNGD(model, metric=METRIC, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        tokens, targets = (torch.randint(7, size, generator=generator).to(device) for size in ((4, 6), (24,)))
        optimizer.zero_grad()
        cross_entropy(model(tokens).flatten(0, 1), targets).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("rule", RULES)
def test_steps_are_those_of_a_cpu(rule):
    torch.manual_seed(0)
    model = EveryKind().double()
    (here, first), (there, second) = (trained(model, device, step_rule=rule) for device in ("cpu", "cuda"))
    assert second.health.failed_refreshes == second.health.skipped_steps == 0
    for layer in first.layers:
        torch.testing.assert_close(second.metric(layer.name).to_dense().cpu(), first.metric(layer.name).to_dense())
    for (name, mine), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        assert torch.allclose(mine, theirs.cpu(), rtol=1e-5, atol=1e-7), name


def test_wide_layers_are_multiplied_in_bfloat16():
    """The polar factor is that of float32 to 1 %, and takes a float32 step."""
    model = mlp(nn.ReLU, (200, 300, 10), dtype=torch.float32)
    weights = []
    for device in ("cpu", "cuda"):
        mine = copy.deepcopy(model).to(device)
        optimizer = RNGD(mine, averaging=0.0, weight_decay=0.0)
        x = torch.randn(64, 200, generator=torch.Generator().manual_seed(1)).to(device)
        step(mine, optimizer, x)
        weights.append(mine[0].weight.detach().cpu() - model[0].weight.detach())
    assert (weights[0] - weights[1]).norm() < 0.05 * weights[0].norm()


def test_a_run_resumes_bitwise_on_the_gpu():
    torch.use_deterministic_algorithms(True)
    model = mlp(dtype=torch.float32).cuda()
    optimizer = RNGD(model, metric=METRIC)
    for seed in range(6):
        step(model, optimizer, inputs(seed, dtype=torch.float32).cuda())
    twin, other = resumed(model, optimizer, metric=METRIC)
    for seed in range(6, 12):
        x = inputs(seed, dtype=torch.float32).cuda()
        assert step(model, optimizer, x) == step(twin, other, x)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_with_a_scaler(dtype):
    model = mlp(nn.ReLU, (20, 30, 5), dtype=torch.float32).cuda()
    optimizer, scaler = (
        RNGD(model, lr=0.05, metric=METRIC),
        torch.amp.GradScaler("cuda", enabled=dtype == torch.float16),
    )
    x = torch.randn(64, 20, device="cuda")
    target = x[:, :5].argmax(1)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype):
            loss = cross_entropy(model(x), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert optimizer.state[model[0].weight]["metric"].dtype == torch.float32


def test_a_state_moves_between_devices():
    model = mlp(dtype=torch.float32).cuda()
    optimizer = RNGD(model, metric=METRIC)
    for seed in range(6):
        step(model, optimizer, inputs(seed, dtype=torch.float32).cuda())
    here = copy.deepcopy(model).cpu()
    other = RNGD(here, metric=METRIC)
    other.load_state_dict(optimizer.state_dict())
    x = inputs(9, dtype=torch.float32)
    torch.testing.assert_close(step(here, other, x), step(model, optimizer, x.cuda()), rtol=1e-4, atol=1e-6)


def test_the_geometry_of_a_layer():
    layer, x = nn.Linear(6, 4, dtype=torch.float64), inputs()
    there, here = (
        softmax_metric(x.to(device), layer.weight.detach().to(device), layer.bias.detach().to(device))
        for device in ("cuda", "cpu")
    )
    torch.testing.assert_close(there.to_dense().cpu(), here.to_dense())
    torch.testing.assert_close(there.eigvalsh(3).cpu(), here.eigvalsh(3))
    v = torch.randn(28, dtype=torch.float64)
    torch.testing.assert_close(there.solve(v.cuda(), damping=0.1).cpu(), here.solve(v, damping=0.1))
