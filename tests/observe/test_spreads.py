"""Scales, shifts, tables of positions and free tokens have the metric of the operation that spreads them."""

import copy

import pytest
import torch
from builders import assert_same_weights
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional
from torch.testing import assert_close

import relfisher
from relfisher import RNGD, MetricOptions
from relfisher.observe import UncoveredWarning
from relfisher.responses import LinearGaussian, TanhBernoulli

BATCH, LENGTH, WIDTH = 6, 4, 3


class Own(nn.Module):
    """A parameter of a module of no known class, and a function that spreads it over inputs [batch, length, width]."""

    def __init__(self, function, *shape):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.p = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator))
        places = torch.arange(LENGTH)
        self.register_buffer("center", torch.randn(LENGTH, dtype=torch.float64, generator=generator))
        self.register_buffer("width", torch.rand(LENGTH, dtype=torch.float64, generator=generator) + 0.5)
        self.register_buffer("apart", places[:, None] - places[None, :] + LENGTH - 1)
        self.function = function

    def forward(self, x):
        return self.function(self.p, x, self)


def root_mean_square(x):
    return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


# The function, the shape of the parameter, and the samples in a batch.
WAYS = {
    "positions": (lambda p, x, _: x + p, (LENGTH, WIDTH), BATCH),
    "positions with an axis for the batch": (lambda p, x, _: p + x, (1, LENGTH, WIDTH), BATCH),
    "positions in place": (lambda p, x, _: x.clone().add_(p), (LENGTH, WIDTH), BATCH),
    "the first positions": (lambda p, x, _: x + p[:, : x.shape[1]], (1, 2 * LENGTH, WIDTH), BATCH),
    "a shift": (lambda p, x, _: x - p, (WIDTH,), BATCH * LENGTH),
    "a shift of channels": (lambda p, x, _: x + p[:, None], (LENGTH,), BATCH * WIDTH),
    "a shift in the memory of a transpose": (lambda p, x, _: x + p.t(), (WIDTH, LENGTH), BATCH),
    "a number": (lambda p, x, _: x * p, (), BATCH * LENGTH * WIDTH),
    "a scale": (lambda p, x, _: p * root_mean_square(x), (WIDTH,), BATCH * LENGTH),
    "a scale of channels": (lambda p, x, _: x * p.view(1, -1, 1), (LENGTH,), BATCH * WIDTH),
    "a scale that is one at 0": (lambda p, x, _: root_mean_square(x) * (1.0 + p), (WIDTH,), BATCH * LENGTH),
    "a scale for several elements": (
        lambda p, x, _: torch.cat([x, x[..., :1]], -1) * p.repeat_interleave(2),
        (2,),
        BATCH * LENGTH,
    ),
    "columns of a table": (lambda p, x, _: x.unsqueeze(-1) * p, (WIDTH, 5), BATCH * LENGTH),
    "the function of a norm": (lambda p, x, _: functional.layer_norm(x, (WIDTH,), p, None), (WIDTH,), BATCH * LENGTH),
    "the function of a root mean square": (
        lambda p, x, _: functional.rms_norm(x, (WIDTH,), weight=p, eps=1e-5),
        (WIDTH,),
        BATCH * LENGTH,
    ),
    "the function of a batch norm": (
        lambda p, x, _: functional.batch_norm(x, None, None, p, None, True),
        (LENGTH,),
        BATCH * WIDTH,
    ),
    "the function of a batch norm that goes on with its statistics": (
        lambda p, x, own: functional.batch_norm(
            x, own.center.clone(), running_var=own.width.clone(), weight=p, bias=own.center, training=True
        ),
        (LENGTH,),
        BATCH * WIDTH,
    ),
    "the function of a batch norm with statistics": (
        lambda p, x, own: functional.batch_norm(x, own.center, own.width, weight=1 + p, eps=0.1),
        (LENGTH,),
        BATCH * WIDTH,
    ),
    "the shift of a batch norm": (
        lambda p, x, own: functional.batch_norm(x, own.center, own.width, own.width, p),
        (LENGTH,),
        BATCH * WIDTH,
    ),
    "torch's own function of a batch norm": (
        lambda p, x, own: torch.batch_norm(x, p, own.width, own.center, own.width, False, 0.1, 1e-5, False),
        (LENGTH,),
        BATCH * WIDTH,
    ),
    "the function of a group norm": (
        lambda p, x, _: functional.group_norm(x.unsqueeze(-1), 2, p.view(-1), None),
        (1, LENGTH, 1),
        BATCH * WIDTH,
    ),
    "the shift of a group norm": (
        lambda p, x, own: functional.group_norm(x, 2, own.width, bias=p),
        (LENGTH,),
        BATCH * WIDTH,
    ),
    "the function of an instance norm": (
        lambda p, x, own: functional.instance_norm(x, weight=p, bias=own.center),
        (LENGTH,),
        BATCH * WIDTH,
    ),
    "the function of an instance norm with statistics": (
        lambda p, x, own: functional.instance_norm(x, own.center, own.width, p, use_input_stats=False),
        (LENGTH,),
        BATCH * WIDTH,
    ),
    "relative positions": (
        lambda p, x, own: (x @ x.mT).unsqueeze(1) + p[own.apart.view(-1)].view(LENGTH, LENGTH, 2).permute(2, 0, 1),
        (2 * LENGTH - 1, 2),
        BATCH,
    ),
}


def inputs(seed=0):
    return torch.randn(BATCH, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def jacobian(own, x):
    """Return the derivative of the outputs with respect to the parameter, [outputs, numbers], by differentiation."""
    values = {name: each.detach() for name, each in own.named_parameters()}
    found = jacrev(lambda p: functional_call(own, {**values, "p": p}, (x,)))(values["p"])
    return found.reshape(-1, values["p"].numel())


@pytest.mark.supports(
    "a scale, a shift or a table of positions of a module of any class",
    "LayerNorm",
    "RMSNorm",
    "BatchNorm1d",
    "GroupNorm",
)
@pytest.mark.parametrize("response", [LinearGaussian(), TanhBernoulli()], ids=["linear", "tanh"])
@pytest.mark.parametrize("way", WAYS)
def test_the_metric_is_that_of_the_outputs(way, response):
    function, shape, samples = WAYS[way]
    own = Own(function, *shape)
    several = way in ("relative positions", "a scale for several elements")
    if several and response != LinearGaussian():
        pytest.skip("the response of one of the elements stands for that of all")
    after = nn.Tanh() if response == TanhBernoulli() else nn.Identity()
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), own, after).double()
    optimizer = RNGD(model, weight_decay=0.0, metric=MetricOptions(stats_samples=None))
    x = inputs()
    seen = model[0](x).detach()
    slopes = jacobian(own, seen)
    z = own(seen).detach().flatten()
    weights = torch.ones_like(z) if response == LinearGaussian() else 1 - torch.tanh(z).square()
    expected = slopes.T @ (weights.unsqueeze(1) * slopes) / samples
    before = own.p.detach().clone()
    model(x).sin().sum().backward()
    optimizer.step()
    (layer,) = (layer for layer in optimizer.layers if layer.name == "1.p")
    assert layer.role.response == response
    assert_close(optimizer.metric("1.p").to_dense(), expected)
    used = slopes.abs().sum(0).view(shape) > 0
    assert ((own.p != before) == used).all()
    assert not any("exp_avg" in state for state in optimizer.state.values())
    assert {each.by for each in relfisher.coverage(model, x)} == {"metric"}


class Patches(nn.Module):
    """A vision transformer's first layers: a token in front of the others, and positions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.patch = nn.Linear(WIDTH, WIDTH)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, LENGTH + 1, WIDTH))
        self.gain = nn.Parameter(torch.full((WIDTH,), 0.1))
        self.head = nn.Linear(WIDTH, 2)
        self.double()

    def forward(self, x):
        h = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x)], 1) + self.positions
        return self.head((h + self.gain * torch.tanh(h))[:, 0])


class Normed(nn.Module):
    """A batch norm of no known class, with running statistics."""

    def __init__(self):
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.ones(LENGTH)), nn.Parameter(torch.zeros(LENGTH))
        self.register_buffer("mean", torch.zeros(LENGTH))
        self.register_buffer("var", torch.ones(LENGTH))

    def forward(self, x):
        return functional.batch_norm(x, self.mean, self.var, self.gain, self.shift, self.training)


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_of_no_known_class_goes_on_as_it_would(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Normed(), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
    alone = copy.deepcopy(model)
    for each in (model, alone):
        each[1].train(training)
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=1), weight_decay=0.0)
    model(inputs()).sin().sum().backward()
    alone(inputs())
    assert_close(dict(model[1].named_buffers()), dict(alone[1].named_buffers()), rtol=0, atol=0)
    optimizer.step()
    assert {"1.gain", "1.shift"} < {layer.name for layer in optimizer.layers}
    assert not any("exp_avg" in state for state in optimizer.state.values())
    assert {each.by for each in relfisher.coverage(model, inputs())} == {"metric"}


def trained(model, seeds, optimizer=None):
    optimizer = optimizer or RNGD(model, metric=MetricOptions(stats_interval=2, refresh_interval=4))
    for seed in seeds:
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs(seed)), torch.arange(BATCH) % 2).backward()
        optimizer.step()
    return optimizer


def test_a_free_token_is_a_shift_of_nothing():
    model = Patches()
    optimizer = trained(model, range(9))
    assert_close(optimizer.metric("token").to_dense(), torch.eye(WIDTH, dtype=torch.float64))
    assert {layer.name for layer in optimizer.layers} == {"patch", "token", "positions", "gain", "head"}
    assert not any("exp_avg" in state for state in optimizer.state.values())
    assert {each.by for each in relfisher.coverage(model, inputs())} == {"metric"}


def test_a_run_goes_on_from_a_state_that_is_loaded_before_the_first_pass():
    model = Patches()
    optimizer = trained(model, range(5))
    twin = copy.deepcopy(Patches())
    twin.load_state_dict(model.state_dict())
    resumed = RNGD(twin, metric=MetricOptions(stats_interval=2, refresh_interval=4))
    resumed.load_state_dict(optimizer.state_dict())
    trained(model, range(5, 12), optimizer)
    trained(twin, range(5, 12), resumed)
    assert_same_weights(model, twin)


@pytest.mark.parametrize(
    "function",
    [
        lambda p, x, _: x * p + p,
        lambda p, x, _: x.clone().mul_(p),
        lambda p, x, _: x / p,
        lambda p, x, _: x * torch.view_as_complex(p[:2]).real,
        lambda p, x, _: functional.softmax(x + 0 * p, -1) + p.cumsum(0),
        lambda p, x, _: x @ (torch.outer(p, p) + torch.ones(WIDTH, WIDTH, dtype=p.dtype)),
    ],
    ids=[
        "two uses",
        "inputs in place",
        "another function",
        "another kind of numbers",
        "computed by other functions",
        "noise on a weight",
    ],
)
def test_other_uses_are_left_to_adamw(function):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Own(function, WIDTH)).double()
    optimizer = RNGD(model)
    model(inputs()).sin().sum().backward()
    with pytest.warns(UncoveredWarning, match=r"AdamW trains 1 of 3 parameters.*Own \(1\.p\)"):
        optimizer.step()
    assert optimizer.state[model[1].p].keys() >= {"exp_avg", "exp_avg_sq"}
    assert {each.by for each in relfisher.coverage(model, inputs()) if each.name == "1.p"} == {"adamw"}
