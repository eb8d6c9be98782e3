"""The response of a layer is that of the code that takes its outputs, written in whatever way."""

import copy
import functools
import math
import pickle

import pytest
import torch
from builders import Code, inputs
from cases import assert_close
from torch import nn
from torch.nn import functional

from relfisher import RNGD, layer_metric, module_metric, responses
from relfisher.observe import ResponseWarning
from relfisher.responses import (
    ActivationGaussian,
    ELUGaussian,
    LinearGaussian,
    ReLUGaussian,
    Response,
    SigmoidBernoulli,
    TanhBernoulli,
)

PER_UNIT = nn.PReLU(3, dtype=torch.float64)
PER_UNIT.weight.data = torch.tensor([0.3, -0.2, 1.5], dtype=torch.float64)


def of(slope):
    """Return the response of an activation with this derivative."""

    class Known(ActivationGaussian):
        def slope(self, z):
            return slope(z)

    return Known(torch.clone)


def slopes(below: float | list[float]) -> Response:
    """Return the response of units with these slopes below 0."""
    return ActivationGaussian(lambda z: torch.where(z > 0, z, torch.tensor(below, dtype=z.dtype) * z))


CODE = {
    "F.relu": (functional.relu, ReLUGaussian()),
    "F.relu in place": (lambda z: functional.relu(z, inplace=True), ReLUGaussian()),
    "relu_": (lambda z: z.relu_(), ReLUGaussian()),
    "nn.ReLU in place": (nn.ReLU(inplace=True), ReLUGaussian()),
    "leaky": (lambda z: functional.leaky_relu(z, 0.2), ReLUGaussian(iota=0.2)),
    "leaky in place": (nn.LeakyReLU(0.3, inplace=True), ReLUGaussian(iota=0.3)),
    "torch.tanh": (torch.tanh, TanhBernoulli()),
    "tanh_": (lambda z: z.tanh_(), TanhBernoulli()),
    "method": (lambda z: z.sigmoid(), SigmoidBernoulli()),
    "nn.ELU": (nn.ELU(alpha=0.5), ELUGaussian(alpha=0.5)),
    "gelu": (functional.gelu, ActivationGaussian(functional.gelu)),
    "gelu by tanh": (
        lambda z: functional.gelu(z, approximate="tanh"),
        ActivationGaussian(lambda z: functional.gelu(z, approximate="tanh")),
    ),
    "leaky, steep": (lambda z: functional.leaky_relu(z, 1.5), slopes(1.5)),
    "leaky, falling": (nn.LeakyReLU(-0.2), slopes(-0.2)),
    "leaky_relu_": (lambda z: functional.leaky_relu_(z, 0.6), ReLUGaussian(iota=0.6)),
    "elu_": (lambda z: functional.elu_(z, 1.7), ELUGaussian(alpha=1.7)),
    "elu_ with scales": (
        lambda z: functional.elu_(z, 1.7, 1.3, 0.5),
        ActivationGaussian(lambda z: torch.where(z > 0, 1.3 * z, 1.3 * 1.7 * torch.expm1(0.5 * z))),
    ),
    "torch.celu": (lambda z: torch.celu(z, 0.3), ActivationGaussian(lambda z: functional.celu(z, 0.3))),
    "hardtanh_ between": (
        lambda z: functional.hardtanh_(z, -0.2, 0.3), ActivationGaussian(lambda z: functional.hardtanh(z, -0.2, 0.3)),
    ),
    "torch.threshold": (
        lambda z: torch.threshold(z, 0.1, 0.2), ActivationGaussian(lambda z: functional.threshold(z, 0.1, 0.2)),
    ),
    "torch.rrelu": (lambda z: torch.rrelu(z, 0.2, 0.4), ReLUGaussian(iota=0.3)),
    "PReLU": (nn.PReLU(init=0.3, dtype=torch.float64), slopes(0.3)),
    "PReLU, steep": (nn.PReLU(init=1.5, dtype=torch.float64), slopes(1.5)),
    "PReLU, falling": (nn.PReLU(init=-0.2, dtype=torch.float64), slopes(-0.2)),
    "PReLU of each unit": (PER_UNIT, slopes([0.3, -0.2, 1.5])),
    "F.prelu": (lambda z: functional.prelu(z, PER_UNIT.weight), slopes([0.3, -0.2, 1.5])),
    "prelu": (lambda z: z.prelu(PER_UNIT.weight), slopes([0.3, -0.2, 1.5])),
    "softplus": (nn.Softplus(beta=2.0), ActivationGaussian(lambda z: functional.softplus(z, 2.0))),
    "silu in place": (nn.SiLU(inplace=True), ActivationGaussian(functional.silu)),
    "hardtanh_": (functional.hardtanh_, ActivationGaussian(functional.hardtanh)),
    "identity": (lambda z: z, LinearGaussian()),
    "residual": (lambda z: z + torch.tanh(z), of(lambda z: 2 - z.tanh() ** 2)),
    "added in place, then an activation": (lambda z: z.add_(1.0).tanh(), of(lambda z: 1 - (z + 1).tanh() ** 2)),
    "scaled": (lambda z: z * 2, LinearGaussian()),
    "scaled twice": (lambda z: 1 - (z - 1) / 2, LinearGaussian()),
    "sin(30 z)": (lambda z: torch.sin(30 * z), of(lambda z: 30 * torch.cos(30 * z))),
    "a number in a tensor, which may change": (lambda z: torch.sin(torch.tensor(3.0) * z), LinearGaussian()),
    "a number divided by it": (lambda z: torch.tanh(1 / z), LinearGaussian()),
    "1.7 tanh(0.67 z)": (lambda z: 1.7 * torch.tanh(0.67 * z), of(lambda z: 1.139 * (1 - (0.67 * z).tanh() ** 2))),
    "z sigmoid(z)": (lambda z: z * torch.sigmoid(z), ActivationGaussian(functional.silu)),
    "z^2": (lambda z: z * z, of(lambda z: 2 * z)),
    "squared relu": (lambda z: torch.relu(z) ** 2, of(lambda z: 2 * z.clamp_min(0))),
    "exp(-z^2)": (lambda z: torch.exp(-z.square()), of(lambda z: -2 * z * torch.exp(-z * z))),
    "clamp": (lambda z: z.clamp(-0.2, 0.3), of(lambda z: ((z > -0.2) & (z < 0.3)).to(z.dtype))),
    "clamp_min_": (lambda z: torch.clamp_min_(z, 0.1), of(lambda z: (z > 0.1).to(z.dtype))),
    "snake": (lambda z: z + torch.sin(2 * z) ** 2 / 2, of(lambda z: 1 + torch.sin(4 * z))),
    "gelu by hand": (
        lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * torch.pow(z, 3.0)))),
        ActivationGaussian(lambda z: functional.gelu(z, approximate="tanh")),
    ),
    "in place twice": (lambda z: z.mul_(2.0).sin_(), of(lambda z: 2 * torch.cos(2 * z))),
    "mish by hand": (lambda z: z * torch.tanh(functional.softplus(z)), ActivationGaussian(functional.mish)),
    "an activation, scaled": (lambda z: 3 * torch.tanh(z) - 1, TanhBernoulli()),
    "an activation, used twice": (lambda z: torch.tanh(z).sum(-1, keepdim=True) * torch.tanh(z), TanhBernoulli()),
    "in another shape": (lambda z: torch.sin(3 * z.view(-1, 1)).view(z.shape), of(lambda z: 3 * torch.cos(3 * z))),
    "in another dtype": (lambda z: torch.sin(3 * z.float()).double(), of(lambda z: 3 * torch.cos(3 * z))),
    "gated by other units": (lambda z: z * torch.sigmoid(z.flip(-1)), LinearGaussian()),
    "gated by its parts": (lambda z: torch.cat([z[:, :1] * torch.sigmoid(z[:, 1:2]), z[:, 1:]], -1), LinearGaussian()),
    "a root, whose derivative may be infinite": (lambda z: (1 + z * z).sqrt(), LinearGaussian()),
    "a chain below a line": (lambda z: z / (1 + z.abs()), LinearGaussian()),
    "a power that is no number": (lambda z: 2 + z.abs() ** 0.5, LinearGaussian()),
    "too long a chain": (lambda z: functools.reduce(lambda y, _: torch.sin(y), range(40), z), LinearGaussian()),
    "an unknown function": (torch.digamma, LinearGaussian()),
    "looked at": (lambda z: torch.tanh(z) if z.shape[0] and z.dim() == 2 else z, TanhBernoulli()),
}  # fmt: skip


@pytest.mark.parametrize(("activation", "response"), CODE.values(), ids=CODE)
def test_response_is_that_of_the_code_that_follows(activation, response: Response) -> None:
    model, x = Code(activation), inputs(n=7, width=3)
    kept = x.clone()
    metric = module_metric(model, "fc", x)
    expected = layer_metric(x, model.fc.weight.detach(), model.fc.bias.detach(), response)
    assert metric.parameter_shape == (3, 4)
    assert_close(metric.to_dense(), expected.to_dense())
    assert torch.equal(x, kept)


def test_all_responses_are_public() -> None:
    public = {getattr(responses, name) for name in responses.__all__}
    assert all(public & set(type(response).__mro__) for _, response in CODE.values())


@pytest.mark.parametrize("name", ["sin(30 z)", "snake", "gelu by hand", "in place twice", "clamp", "squared relu"])
def test_chains_compare_by_value_and_can_be_pickled(name) -> None:
    activation, _ = CODE[name]
    models = Code(activation), Code(activation)
    optimizers = [RNGD(model) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        model(inputs(n=7, width=3)).sum().backward()
        optimizer.step()
    first, second = (next(layer.role.response for layer in each.layers) for each in optimizers)
    assert first == second == pickle.loads(pickle.dumps(first))
    assert "z" in repr(first)


def test_slopes_that_are_learned_count_as_they_are() -> None:
    """The response follows the parameter, and its copy the copy."""
    model, x = Code(nn.PReLU(3, dtype=torch.float64)), inputs(n=7, width=3)
    optimizer = RNGD(model)
    model(x).sum().backward()
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    twin.activation.weight.data += 1
    z = torch.tensor([[-1.0, -1.0, 2.0]], dtype=torch.float64)
    for network, trained in ((model, optimizer), (twin, other)):
        response = next(layer.role.response for layer in trained.layers if layer.name == "fc")
        slope = torch.cat([network.activation.weight[:2].detach(), torch.ones(1)])
        assert_close(response.information(z), slope.square().unsqueeze(0))
    assert repr(response) == "ActivationGaussian(function=prelu, sigma=1.0)"


def test_slopes_of_the_channels_of_a_convolution() -> None:
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.PReLU(3)).double()
    model[1].weight.data = PER_UNIT.weight.data
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    rows = x.movedim(1, -1).reshape(-1, 2)
    expected = layer_metric(rows, model[0].weight.detach()[..., 0], model[0].bias.detach(), slopes([0.3, -0.2, 1.5]))
    assert_close(module_metric(model, "0", x).to_dense(), expected.to_dense())


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(3, 4), nn.PReLU(4)), (2, 4, 3)),  # a slope for each position
        (nn.Sequential(nn.LayerNorm(3), nn.PReLU(3)), (5, 3)),
        (nn.Sequential(nn.Conv1d(2, 4, 1, groups=2), nn.PReLU(4)), (5, 2, 3)),
    ],
    ids=["positions", "normalization", "groups"],
)
def test_slopes_that_are_not_those_of_a_units_response_are_named(model: nn.Module, shape: tuple[int, ...]) -> None:
    optimizer = RNGD(model)
    with pytest.warns(ResponseWarning, match="the activation is not known: 0 feeds prelu"):
        model(torch.randn(shape))
    optimizer.close()
    assert torch.equal(
        module_metric(model, "0", torch.ones(shape)).to_dense(),
        module_metric(model[0], "", torch.ones(shape)).to_dense(),
    )


def test_a_response_for_prelu_can_be_stated() -> None:
    model, x = Code(nn.PReLU(dtype=torch.float64)), inputs(n=7, width=3)
    optimizer = RNGD(model, responses={nn.PReLU: ReLUGaussian(0.5)})
    model(x).sum().backward()
    optimizer.step()
    assert next(layer.role.response for layer in optimizer.layers if layer.name == "fc") == ReLUGaussian(0.5)
