"""The response of a layer is that of the code that takes its outputs, written in whatever way."""

import pytest
import torch
from builders import Code, inputs
from cases import assert_close
from torch import nn
from torch.nn import functional

from relfisher import layer_metric, module_metric, responses
from relfisher.responses import (
    ActivationGaussian,
    ELUGaussian,
    LinearGaussian,
    ReLUGaussian,
    Response,
    SigmoidBernoulli,
    TanhBernoulli,
)

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
    "softplus": (nn.Softplus(beta=2.0), ActivationGaussian(lambda z: functional.softplus(z, 2.0))),
    "silu in place": (nn.SiLU(inplace=True), ActivationGaussian(functional.silu)),
    "hardtanh_": (functional.hardtanh_, ActivationGaussian(functional.hardtanh)),
    "identity": (lambda z: z, LinearGaussian()),
    "residual": (lambda z: z + torch.tanh(z), LinearGaussian()),
    "added in place, then an activation": (lambda z: z.add_(1.0).tanh(), LinearGaussian()),
    "gated": (lambda z: z * 2, LinearGaussian()),
    "an unknown function": (torch.digamma, LinearGaussian()),
    "looked at": (lambda z: torch.tanh(z) if z.shape[0] and z.dim() == 2 else z, TanhBernoulli()),
}


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
    assert {type(response).__name__ for _, response in CODE.values()} <= set(responses.__all__)
