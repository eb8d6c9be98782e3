"""Weights that are computed from what is trained take the steps of weights, pulled back."""

import copy

import pytest
import torch
from builders import assert_same_weights, inputs
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm
from torch.testing import assert_close

import relfisher
from relfisher import RNGD, MetricOptions, Preconditioner
from relfisher.layers import discover

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")


class Centred(nn.Module):
    def forward(self, weight):
        return weight - weight.mean(1, keepdim=True)


class Sum(nn.Module):
    """A weight of two factors and a fixed matrix, as in fine-tuning by changes of low rank."""

    def __init__(self, fixed):
        super().__init__()
        self.register_buffer("fixed", fixed)

    def forward(self, left, right):
        return self.fixed + left @ right

    def right_inverse(self, weight):
        generator = torch.Generator().manual_seed(0)
        sizes = (len(weight), 2), (2, weight.shape[1])
        return tuple(torch.randn(size, generator=generator, dtype=weight.dtype) for size in sizes)


def centred(module):
    return parametrize.register_parametrization(module, "weight", Centred())


def of_low_rank(module):
    return parametrize.register_parametrization(module, "weight", Sum(module.weight.detach().clone()))


def value(wrap, module, trained):
    """Return the weight for values of what is trained, by its definition."""
    first = trained[0]
    if wrap in ("weight_norm", "old weight_norm", "one norm"):
        axes = tuple(range(first.ndim)) if wrap == "one norm" else tuple(range(1, first.ndim))
        return trained[1] * first / first.square().sum(axes, keepdim=True).sqrt()
    if wrap == "centred":
        return first - first.mean(1, keepdim=True)
    if wrap == "low rank":
        left, right = sorted(trained, key=lambda each: each.shape[1])
        return module.parametrizations.weight[0].fixed + left @ right
    vectors = module.parametrizations.weight[0] if wrap == "spectral_norm" else module
    names = ("_u", "_v") if wrap == "spectral_norm" else ("weight_u", "weight_v")
    left, right = (getattr(vectors, name) for name in names)
    return first / (left @ first.flatten(1) @ right)


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": weight_norm,
    "one norm": lambda module: parametrizations.weight_norm(module, dim=None),
    "centred": centred,
    "low rank": of_low_rank,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": spectral_norm,
}
CLOSED_FORMS = ("weight_norm", "old weight_norm", "one norm")
MODULES = {"linear": (lambda: nn.Linear(6, 4), (9, 6)), "conv": (lambda: nn.Conv1d(2, 4, 3), (5, 2, 6))}


def wrapped(wrap, kind):
    torch.manual_seed(0)
    make, shape = MODULES[kind]
    module = WRAPS[wrap](make().double())
    with torch.no_grad():  # away from the start, where |v| is g
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(shape, dtype=torch.float64)
    module(x)
    return nn.Sequential(module, nn.Tanh()), x


def jacobian_of(wrap, module, trained):
    """Return the derivative of the weight [numbers of the weight, numbers of what is trained]."""
    blocks = torch.autograd.functional.jacobian(lambda *values: value(wrap, module, values), tuple(trained))
    size = module.weight.numel()
    return torch.cat([block.reshape(size, -1) for block in blocks], dim=1)


CASES = [(wrap, kind) for wrap in WRAPS for kind in MODULES if (wrap, kind) != ("low rank", "conv")]


@pytest.mark.parametrize(("wrap", "kind"), CASES)
def test_gradients_and_steps_are_pulled_back_by_least_squares(wrap, kind):
    model, x = wrapped(wrap, kind)
    module, layer = model.eval()[0], discover(model).layers[0]
    trained = layer.parameters[:-1]
    module(x)  # an old weight is computed before a call
    assert_close(layer.matrix(layer.parameters)[:, :-1], module.weight.flatten(1))
    assert_close(value(wrap, module, trained), module.weight)
    inverse = torch.linalg.pinv(jacobian_of(wrap, module, trained), rtol=1e-10)
    gradients = torch.autograd.grad(value(wrap, module, trained).pow(3).sum(), trained)
    found = layer.gradient([*gradients, torch.zeros(4, dtype=torch.float64)])[:, :-1]
    close = {"rtol": 0.02, "atol": 0.02} if wrap not in CLOSED_FORMS else {}
    assert_close(found.flatten(), inverse.t() @ torch.cat([each.flatten() for each in gradients]), **close)
    step = torch.randn(layer.shape, dtype=torch.float64)
    changes = layer.steps(step, layer.parameters)
    found = torch.cat([each.flatten() for each in changes[:-1]])
    assert_close(found, inverse @ step[:, :-1].flatten(), **close)


@pytest.mark.supports("weights computed by a parametrization, weight_norm or spectral_norm", "Linear", "Conv1d")
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("wrap", CLOSED_FORMS)
def test_a_natural_gradient_is_that_of_the_metric_pulled_back(wrap, kind):
    """J' (G + lambda) J, with G by the layer whose weight is trained itself."""
    model, x = wrapped(wrap, kind)
    module, plain = model[0], MODULES[kind][0]().double()
    module(x)
    with torch.no_grad():
        plain.weight.copy_(module.weight)
        plain.bias.copy_(module.bias)
    twin = nn.Sequential(plain, nn.Tanh())
    trained = discover(model).layers[0].parameters[:-1]
    for each in (model, twin):
        preconditioner = Preconditioner(each, damping=0.1)
        each(x).pow(3).sum().backward()
        preconditioner.step()
    jacobian = jacobian_of(wrap, module, trained)
    found = torch.cat([each.grad.flatten() for each in trained])
    assert_close(found, torch.linalg.pinv(jacobian, rtol=1e-10) @ plain.weight.grad.flatten())
    assert_close(module.bias.grad, plain.bias.grad)


@pytest.mark.parametrize(("wrap", "kind"), CASES)
def test_learns_and_leaves_nothing_to_adamw(wrap, kind):
    model, x = wrapped(wrap, kind)
    teacher, _ = wrapped(wrap, kind)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        target = teacher(x)
    optimizer = RNGD(model, 0.05, fit="interpolate")
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append((model(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert optimizer.health.skipped_steps == optimizer.health.failed_refreshes == 0
    assert {each.by for each in relfisher.coverage(model, x)} == {"metric"}
    assert not any("exp_avg" in state for state in optimizer.state.values())


def test_copies_and_loaded_states_go_on_bitwise():
    def trained(model, optimizer, steps):
        for seed in steps:
            optimizer.zero_grad()
            cross_entropy(model(inputs(seed)), torch.arange(len(inputs())) % 3).backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    options = MetricOptions(refresh_interval=4)
    optimizer = RNGD(model, metric=options)
    trained(model, optimizer, range(6))
    twin = copy.deepcopy(model)
    again = RNGD(twin, metric=options)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(model, optimizer, range(6, 12))
    trained(twin, again, range(6, 12))
    assert_same_weights(model, twin)


def test_frozen_lengths_stay():
    model, x = wrapped("weight_norm", "linear")
    lengths = model[0].parametrizations.weight.original0.requires_grad_(False)
    before = lengths.clone(), model[0].weight.clone()
    optimizer = RNGD(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(lengths, before[0])
    assert not torch.equal(model[0].weight, before[1])


def test_what_is_computed_otherwise_is_refused_with_the_reason():
    attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
    parametrize.register_parametrization(attention, "in_proj_bias", nn.Identity())
    half = nn.Linear(4, 4)
    parametrize.register_parametrization(half, "bias", nn.Identity())
    found = discover(nn.ModuleList([attention, half]))
    name = "0.parametrizations.in_proj_bias.original"
    assert found.refused[name] == "a parametrization computes a parameter from it"
    assert [layer.name for layer in found.layers] == ["1"]
