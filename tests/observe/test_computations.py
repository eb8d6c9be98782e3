"""Weights that a forward pass computes from the parameters of its module have a metric, pulled back to these."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from builders import assert_same_weights
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.testing import assert_close

import relfisher
from relfisher import RNGD, AdamWOptions, MetricOptions, Preconditioner
from relfisher.layers import discover
from relfisher.observe import UncoveredWarning
from relfisher.responses import TanhBernoulli


class Of(nn.Module):
    """A linear layer or a convolution whose weight a function computes from its parameters, before tanh."""

    def __init__(self, function, kind="linear", *, takes_gain=False):
        super().__init__()
        torch.manual_seed(0)
        self.function, self.kind = function, kind
        self.weight = nn.Parameter(torch.randn((4, 6) if kind == "linear" else (4, 2, 3)))
        if takes_gain:
            self.gain = nn.Parameter(torch.rand((4, 1) if kind == "linear" else (4, 1, 1)) + 0.5)
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("mask", (torch.rand(self.weight.shape) > 0.3).double())
        self.double()

    def forward(self, x):
        weight = self.function(self)
        operation = functional.linear if self.kind == "linear" else functional.conv1d
        return torch.tanh(operation(x, weight, self.bias))


class OfConv(nn.Conv1d):
    def __init__(self, function, *, takes_gain):
        super().__init__(2, 4, 3)
        plain = Of(function, "conv", takes_gain=takes_gain)
        self.function = function
        self.register_buffer("mask", plain.mask)
        for name, parameter in plain.named_parameters():
            setattr(self, name, parameter)

    def forward(self, x):
        return torch.tanh(functional.conv1d(x, self.function(self), self.bias))


def standardized(module):
    variance, mean = torch.var_mean(module.weight, dim=list(range(1, module.weight.ndim)), keepdim=True)
    return (module.weight - mean) / torch.sqrt(variance + 1e-5)


def by_batch_norm(module):
    flat = module.weight.reshape(1, len(module.weight), -1)
    scale = (0.7 * module.gain).view(-1)
    return functional.batch_norm(flat, None, None, weight=scale, training=True).reshape_as(module.weight)


def in_place(module):
    weight = module.weight * 2.0
    weight += 1.0
    return weight.mul_(module.mask)


COMPUTED = {
    "scaled": (lambda module: module.weight * 0.3, False),
    "masked": (lambda module: module.mask * module.weight, False),
    "standardized": (standardized, False),
    "standardized by batch norm, with a gain": (by_batch_norm, True),
    "with a gain": (lambda module: module.gain * module.weight, True),
    "of directions": (lambda module: functional.normalize(module.weight, dim=1), False),
    "in place": (in_place, False),
    "in a list": (lambda module: torch.stack([module.weight, -module.weight]).sum(0) + 3 * module.weight, False),
}
CASES = [(name, kind) for name in COMPUTED for kind in ("linear", "conv")]


def made(name, kind):
    function, takes_gain = COMPUTED[name]
    made = Of(function, takes_gain=takes_gain) if kind == "linear" else OfConv(function, takes_gain=takes_gain)
    model = nn.Sequential(made)
    shape = (9, 6) if kind == "linear" else (5, 2, 6)
    return model, torch.randn(shape, dtype=torch.float64), ["weight", "gain"][: 1 + takes_gain]


@pytest.mark.supports("weights that a forward pass computes from parameters of its module", "Linear", "Conv1d")
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_are_pulled_back(name, kind):
    """By the pseudo-inverse of the derivative, between which the step is that of a weight that is trained itself."""
    model, x, names = made(name, kind)
    module, (function, _) = model[0], COMPUTED[name]

    def weight_of(*values):
        given = {"mask": module.mask, **dict(zip(names, values, strict=True))}
        return function(SimpleNamespace(**given))

    trained = tuple(getattr(module, each).detach() for each in names)
    size = module.weight.numel()
    blocks = torch.autograd.functional.jacobian(weight_of, trained)
    jacobian = torch.cat([block.reshape(size, -1) for block in blocks], dim=1)
    inverse = torch.linalg.pinv(jacobian, rtol=1e-3)

    optimizer = Preconditioner(model, damping=0.1)
    model(x).pow(3).sum().backward()
    gradients = torch.cat([getattr(module, each).grad.flatten() for each in names])
    optimizer.step()
    found = torch.cat([getattr(module, each).grad.flatten() for each in names])

    plain = nn.Linear(6, 4) if kind == "linear" else nn.Conv1d(2, 4, 3)
    twin = nn.Sequential(plain.double(), nn.Tanh())
    with torch.no_grad():
        plain.weight.copy_(weight_of(*trained))
        plain.bias.copy_(module.bias)
    other = Preconditioner(twin, damping=0.1)
    twin(x).pow(3).sum().backward()
    assert_close(jacobian.t() @ plain.weight.grad.flatten(), gradients)
    plain.weight.grad = (inverse.t() @ gradients).view_as(plain.weight)  # what the parameters can tell of it
    other.step()
    expected = inverse @ plain.weight.grad.flatten()
    assert (found - expected).norm() < 0.05 * expected.norm()
    assert (module.bias.grad - plain.bias.grad).norm() < 0.05 * plain.bias.grad.norm()


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_learns_and_resumes_bitwise_and_says_what_is_trained_how(name, kind):
    model, x, names = made(name, kind)
    target = made(name, kind)[0](x).detach().flip(0) * 0.5
    optimizer = RNGD(model, metric=MetricOptions(refresh_interval=4), fit="interpolate")

    def trained(model, optimizer, steps):
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            losses.append((model(x) - target).square().mean())
            losses[-1].backward()
            optimizer.step()
        return losses

    losses = trained(model, optimizer, 60)
    twin, _, _ = made(name, kind)
    twin.load_state_dict(model.state_dict())
    again = RNGD(twin, metric=MetricOptions(refresh_interval=4), fit="interpolate")
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    trained(model, optimizer, 6)
    trained(twin, again, 6)
    assert_same_weights(model, twin)
    assert losses[-1] < losses[0]
    (layer,) = [layer for layer in optimizer.layers if not layer.role.refused]
    assert (layer.role.response, layer.role.reads_input) == (TanhBernoulli(), True)
    metric = {f"0.{each}" for each in (*names, "bias")}
    assert {each.name for each in relfisher.coverage(model, x) if each.by == "metric"} == metric


def drawn(module):
    return functional.dropout(module.weight, 0.5)


def of_other_data(module):
    return module.weight + torch.ones(4, 1, dtype=torch.float64)


def overwritten(module):
    weight = module.weight * 2.0
    weight[0] = 0.0
    return weight


@pytest.mark.parametrize("function", [drawn, of_other_data, overwritten])
def test_what_may_differ_the_next_time_is_no_program(function):
    model = nn.Sequential(Of(function, "linear"))
    optimizer = RNGD(model)
    with pytest.warns(UncoveredWarning, match="no metric for some layers: 0, "):
        model(torch.randn(9, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert optimizer.layers[0].role.refused


def one_step(model, x, **options):
    """Return the change of the parameters in a step without momentum, averaging and decay."""
    before = [p.detach().clone().double() for p in model.parameters()]
    optimizer = RNGD(model, momentum=0.0, averaging=0.0, weight_decay=0.0, **options)
    model(x).float().pow(2).sum().backward()
    optimizer.step()
    return torch.cat([(p.detach().double() - q).flatten() for p, q in zip(model.parameters(), before, strict=True)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_takes_about_the_same_step(dtype):
    x = torch.randn(32, 6, dtype=torch.float64)
    steps = []
    for each in (torch.float64, dtype):
        model = nn.Sequential(Of(standardized, "linear")).to(each)
        steps.append(one_step(model, x.to(each)))
    assert 0.5 < steps[1].norm() / steps[0].norm() < 2
    assert torch.cosine_similarity(*steps, dim=0) > 0.7


def test_numbers_in_what_is_computed_may_change():
    model = nn.Sequential(Of(lambda module: module.weight * module.share, "linear"))
    x = torch.randn(9, 6, dtype=torch.float64)
    before = model[0].weight.detach().clone()
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=1), weight_decay=0.0)
    for step in range(12):
        model[0].share = min(1.0, step / 6)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert not torch.equal(model[0].weight, before)
    record = next(iter(optimizer._curvature.records.values()))
    assert_close(record.layer.matrix(record.layer.parameters)[:, :-1], model[0].weight.detach())


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(_, weight):
        return weight.round(decimals=1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(_, gradient):
        return gradient


class Quantized(nn.Module):
    def forward(self, weight):
        return Rounded.apply(weight)


def test_what_has_no_second_derivative_is_left_to_adamw():
    layer = nn.Linear(6, 4).double()
    parametrize.register_parametrization(layer, "weight", Quantized())
    assert "0.parametrizations.weight.original" in discover(nn.Sequential(layer)).refused
    model = nn.Sequential(Of(lambda module: Rounded.apply(module.weight), "linear"))
    with pytest.warns(UncoveredWarning, match="no metric for some layers: 0, "):
        assert one_step(model, torch.randn(9, 6, dtype=torch.float64)).norm() > 0


class Shared(nn.Module):
    """Two weights with one scale."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(6, 6)) for _ in range(2))
        self.scale = nn.Parameter(torch.ones(1))
        self.double()

    def forward(self, x):
        h = torch.tanh(functional.linear(x, self.scale * self.first))
        return functional.linear(h, self.scale * self.second)


class LowRank(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = nn.Parameter(torch.randn(5, 6)) if base else None
        self.register_buffer("fixed", torch.randn(5, 6))
        self.left, self.right = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 6))
        self.double()

    def forward(self, x):
        return functional.linear(x, (self.fixed if self.base is None else self.base) + self.left @ self.right)


def test_layers_with_a_parameter_in_common_are_refused():
    model = nn.Sequential(Shared())
    with pytest.warns(UncoveredWarning, match=r"no metric for some layers: 0\.first, .*; 0\.second, "):
        assert (one_step(model, torch.randn(9, 6, dtype=torch.float64)).abs() > 0).all()


def test_a_product_of_parameters_has_no_samples():
    with pytest.warns(UncoveredWarning, match=r"no metric for some layers: 0\.left, .*; 0\.right, "):
        one_step(nn.Sequential(LowRank(base=False)), torch.randn(9, 6, dtype=torch.float64))
    model = nn.Sequential(LowRank(base=True))
    optimizer = RNGD(model)
    model(torch.randn(9, 6, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    (layer,) = [layer for layer in optimizer.layers if not layer.role.refused]
    assert layer.name == "0.base"
    assert not any("exp_avg" in state for state in optimizer.state.values())


def test_parameters_that_are_not_given_do_not_move():
    model, x, _ = made("with a gain", "linear")
    before = model[0].gain.detach().clone()
    optimizer = RNGD(model, params=[model[0].weight, model[0].bias])
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(model[0].gain, before)


def test_a_gain_that_is_frozen_later_no_longer_counts():
    model, x, _ = made("with a gain", "linear")
    optimizer = RNGD(model)
    for frozen in (False, True):
        model[0].gain.requires_grad_(not frozen)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        record = next(record for record in optimizer._curvature.records.values() if record.layer.name == "0")
        optimizer.step()
    found = record.gradient()[:, :-1] * model[0].gain.detach()
    assert (found - model[0].weight.grad).norm() < 0.01 * found.norm()


def through_a_view(module):
    weight = module.weight * 1.0
    weight.diagonal().zero_()
    return weight


def test_changes_through_views_are_no_program():
    model = nn.Sequential(Of(through_a_view, "linear"))
    with pytest.warns(UncoveredWarning, match="no metric for some layers: 0, "):
        one_step(model, torch.randn(9, 6, dtype=torch.float64))


def test_gradients_that_underflow_end_in_no_error():
    model = nn.Sequential(Of(lambda module: module.weight * 0.01, "linear")).half()
    optimizer = RNGD(model)
    (1e-4 * model(torch.randn(9, 6, dtype=torch.float16)).float().square().sum()).backward()
    optimizer.step()
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("function", [lambda m: m.weight - m.weight.mT.mT * 0.5, lambda m: m.weight**2])
def test_programs_are_copied_with_their_optimizer(function):
    model = nn.Sequential(Of(None, "linear"))
    object.__setattr__(model[0], "function", function)
    x = torch.randn(9, 6, dtype=torch.float64)
    optimizer = RNGD(model)
    model(x).square().sum().backward()
    optimizer.step()
    twin, again = copy.deepcopy((model, optimizer))
    for each, other in ((model, optimizer), (twin, again)):
        other.zero_grad()
        each(x).square().sum().backward()
        other.step()
    assert_same_weights(model, twin)


def test_a_weight_that_is_unfrozen_has_its_metric_then():
    model, x, _ = made("scaled", "linear")
    model[0].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    head = nn.Linear(4, 2).double()
    whole = nn.Sequential(model, head)
    optimizer = RNGD(whole)
    for step in range(3):
        if step == 1:
            for parameter in model.parameters():
                parameter.requires_grad_()
        optimizer.zero_grad()
        whole(x).square().sum().backward()
        optimizer.step()
    assert all(layer.role.refused is None for layer in optimizer.layers)
    assert not any("exp_avg" in state for state in optimizer.state.values())


def test_a_gain_that_turns_out_to_belong_to_a_layer_is_not_said_to_be_without_a_metric():
    model = nn.Sequential(Of(lambda module: module.gain[:, None] * module.weight, takes_gain=True))
    model[0].gain = nn.Parameter(torch.ones(4, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = RNGD(model, fallback=AdamWOptions(max_share=0.0))
        model(torch.randn(9, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert all(float(state.get("step", 0)) == 0 for state in optimizer.state.values())


def test_a_parameter_that_turns_out_to_belong_to_none_is_said_to_be():
    model = nn.Sequential(Of(lambda module: module.weight, takes_gain=True))
    model[0].gain = nn.Parameter(torch.ones(8, dtype=torch.float64))
    optimizer = RNGD(model)
    model(torch.randn(9, 6, dtype=torch.float64)).square().sum().backward()
    with pytest.warns(UncoveredWarning, match=r"AdamW trains 1 of 3 parameters, 22.2 %.* Of \(0\.gain\)"):
        optimizer.step()
