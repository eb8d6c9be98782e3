"""What runs on a CPU runs on another device, to rounding: on one that is always there, and on a GPU if there is one."""

import copy
import os
import subprocess
import sys

import elsewhere
import pytest
import torch
from builders import EveryKind, inputs, mlp, resumed, step
from torch import nn
from torch.nn.functional import cross_entropy

from relfisher import RNGD, MetricOptions, Preconditioner, softmax_metric

APART = "TESTS_ELSEWHERE"  # set in a process of its own: no other test is to find the device that is made up
THERE = pytest.param("elsewhere", marks=pytest.mark.skipif(APART not in os.environ, reason="runs in its own process"))
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))
RULES = ["spectral", "normalized", "trust-region"]
METRIC = MetricOptions(stats_interval=1, refresh_interval=4)


@pytest.fixture(params=[THERE, GPU])
def device(request):
    return elsewhere.available() if request.param == "elsewhere" else request.param


@pytest.mark.skipif(APART in os.environ, reason="is there")
def test_a_device_that_is_made_up():
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=os.environ | {APART: "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


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


OPTIONS = [
    {},
    {"step_rule": "normalized", "fit": "interpolate", "total_steps": 12},
    {"step_rule": "trust-region", "averaging": 0.5, "momentum": 0.5, "state_bytes": "1.2x adam"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_are_those_of_a_cpu(options, device):
    torch.manual_seed(0)
    model = EveryKind().double()
    (here, first), (there, second) = (trained(model, place, **options) for place in ("cpu", device))
    assert second.health.failed_refreshes == second.health.skipped_steps == 0
    for layer in first.layers:
        torch.testing.assert_close(second.metric(layer.name).to_dense().cpu(), first.metric(layer.name).to_dense())
    for (name, mine), theirs in zip(here.named_parameters(), there.parameters(), strict=True):
        assert torch.allclose(mine, theirs.cpu(), rtol=1e-5, atol=1e-7), name
    for parameter, state in second.state.items():
        on_host = {key for key, value in state.items() if value.device.type == "cpu"}
        assert on_host <= {"ema_weight", "updates", "trainable", "is_head", "step"}, (parameter.shape, on_host)


@pytest.mark.skipif(APART not in os.environ, reason="runs in its own process")
@pytest.mark.parametrize("rule", RULES)
def test_the_host_reads_nothing_between_updates_of_the_metric_and_once_for_all_refreshes(rule):
    device = elsewhere.available()
    model = mlp().to(device)
    seldom = MetricOptions(stats_interval=10**6, refresh_interval=10, warmup_refreshes=())
    optimizer = RNGD(model, step_rule=rule, metric=seldom)
    reads = []
    for seed in range(21):
        x = inputs(seed).to(device)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        before = elsewhere.Counter.reads
        optimizer.step()
        reads.append(elsewhere.Counter.reads - before)
    assert set(reads[1:]) == {0, 1}
    assert sum(reads[1:]) == 6  # three layers were refreshed twice


class OfTheCPU(torch.Generator):
    """A generator for any device."""

    def __new__(cls, *_):
        return super().__new__(cls)


def test_momentum_and_average_in_half_of_their_memory(device, monkeypatch):
    if device == elsewhere.NAME:  # which has no generator of its own
        monkeypatch.setattr(torch, "Generator", OfTheCPU)
    models = [mlp(dtype=torch.float32).to(place) for place in ("cpu", device)]
    for seed in range(8):
        losses = []
        for place, model in zip(("cpu", device), models, strict=True):
            if not seed:
                model.optimizer = RNGD(model, metric=METRIC, state_dtype=torch.bfloat16)
            losses.append(step(model, model.optimizer, inputs(seed, dtype=torch.float32).to(place)))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert models[1].optimizer.state[models[1][0].weight]["momentum"].dtype == torch.bfloat16


def test_rewritten_gradients_are_those_of_a_cpu(device):
    gradients = []
    for place in ("cpu", device):
        torch.manual_seed(0)
        model = mlp().to(place)
        preconditioner = Preconditioner(model, metric=METRIC)
        for seed in range(3):
            preconditioner.zero_grad()
            model(inputs(seed).to(place)).square().sum().backward()
            preconditioner.step()
        gradients.append([parameter.grad.cpu() for parameter in model.parameters()])
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_wide_layers_take_the_steps_of_a_cpu(device):
    """Also where one multiplies in bfloat16: the polar factor of a gradient of full rank is that of float32 to 1 %."""
    model = mlp(nn.ReLU, (200, 300, 10), dtype=torch.float32)
    weights = []
    for place in ("cpu", device):
        mine = copy.deepcopy(model).to(place)
        optimizer = RNGD(mine, averaging=0.0, weight_decay=0.0)
        x = torch.randn(2000, 200, generator=torch.Generator().manual_seed(1)).to(place)
        step(mine, optimizer, x)
        weights.append(mine[0].weight.detach().cpu() - model[0].weight.detach())
    assert (weights[0] - weights[1]).norm() < 0.05 * weights[0].norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
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


def test_a_state_moves_between_devices(device):
    model = mlp(dtype=torch.float32).to(device)
    optimizer = RNGD(model, metric=METRIC)
    for seed in range(6):
        step(model, optimizer, inputs(seed, dtype=torch.float32).to(device))
    here = copy.deepcopy(model).cpu()
    other = RNGD(here, metric=METRIC)
    other.load_state_dict(optimizer.state_dict())
    x = inputs(9, dtype=torch.float32)
    torch.testing.assert_close(step(here, other, x), step(model, optimizer, x.to(device)), rtol=1e-4, atol=1e-6)
    there = copy.deepcopy(here).to(device)
    back = RNGD(there, metric=METRIC)
    back.load_state_dict(other.state_dict())
    torch.testing.assert_close(step(here, other, x), step(there, back, x.to(device)), rtol=1e-4, atol=1e-6)


def test_a_model_that_moves_takes_its_state_along(device, monkeypatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)  # parameters stay the same objects
    model, twin = mlp(), mlp()
    optimizers = [RNGD(each, metric=METRIC) for each in (model, twin)]
    for seed in range(10):
        if seed == 5:
            model.to(device)
        place = device if seed >= 5 else "cpu"
        mine = step(model, optimizers[0], inputs(seed).to(place))
        assert mine == pytest.approx(step(twin, optimizers[1], inputs(seed)))


def test_the_geometry_of_a_layer(device):
    layer, x = nn.Linear(6, 4, dtype=torch.float64), inputs()
    there, here = (
        softmax_metric(x.to(place), layer.weight.detach().to(place), layer.bias.detach().to(place))
        for place in (device, "cpu")
    )
    torch.testing.assert_close(there.to_dense().cpu(), here.to_dense())
    torch.testing.assert_close(there.eigvalsh(3).cpu(), here.eigvalsh(3))
    v = torch.randn(28, dtype=torch.float64)
    torch.testing.assert_close(there.solve(v.to(device), damping=0.1).cpu(), here.solve(v, damping=0.1))
