"""Responses beside the densities that they should have, and random problems: shared by the theory tests."""

from __future__ import annotations

from dataclasses import dataclass

import reference
import torch
from hypothesis import strategies
from torch import Tensor
from torch.nn import functional

from relfisher import responses

GAUSSIAN = {
    "linear": (responses.LinearGaussian(sigma=0.7), reference.gaussian(lambda z: z, 0.7)),
    "relu": (responses.ReLUGaussian(), reference.gaussian(reference.relu(0.0))),
    "prelu": (responses.ReLUGaussian(iota=0.3, sigma=0.5), reference.gaussian(reference.relu(0.3), 0.5)),
    "smooth relu": (
        responses.SmoothReLUGaussian(omega=0.4, iota=0.2, sigma=1.5),
        reference.gaussian(reference.smooth_relu(0.4, 0.2), 1.5),
    ),
    "elu": (responses.ELUGaussian(alpha=1.7, sigma=0.8), reference.gaussian(reference.elu(1.7), 0.8)),
    "softplus": (
        responses.ActivationGaussian(functional.softplus, sigma=2.0),
        reference.gaussian(lambda z: torch.log(1 + torch.exp(z)), 2.0),
    ),
    "gelu": (
        responses.ActivationGaussian(functional.gelu),
        reference.gaussian(lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2),
    ),
}
BERNOULLI = {
    "tanh": (responses.TanhBernoulli(), reference.tanh_bernoulli()),
    "sigmoid": (responses.SigmoidBernoulli(), reference.sigmoid_bernoulli()),
}
UNITS = {**BERNOULLI, **GAUSSIAN}
JOINT = {"softmax": (responses.Categorical(), reference.categorical())}
RESPONSES = {**UNITS, **JOINT}


@dataclass(frozen=True)
class Problem:
    """Inputs and parameters of a layer, and of the layer after it."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    next_weight: Tensor
    next_bias: Tensor

    @property
    def theta(self) -> Tensor:
        """The first layer's parameters, stacked neuron by neuron."""
        return torch.cat([self.weight, self.bias.unsqueeze(1)], dim=1).reshape(-1)

    @property
    def z(self) -> Tensor:
        """The first layer's pre-activations."""
        return self.x @ self.weight.T + self.bias


def problem(
    n: int = 5, inputs: int = 3, out: int = 2, following: int = 2, seed: int = 0, scale: float = 1.0
) -> Problem:
    """Return a random problem in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Problem(normal(n, inputs), normal(out, inputs), normal(out), normal(following, out), normal(following))


def problems(max_n: int = 6, max_inputs: int = 4, max_out: int = 3) -> strategies.SearchStrategy[Problem]:
    """Problems of all small shapes, with inputs and weights from small to saturating."""
    return strategies.builds(
        problem,
        n=strategies.integers(1, max_n),
        inputs=strategies.integers(1, max_inputs),
        out=strategies.integers(1, max_out),
        following=strategies.integers(1, max_out),
        seed=strategies.integers(0, 10**6),
        scale=strategies.floats(0.2, 1.5),
    )


def assert_close(found: Tensor, wanted: Tensor, rtol: float = 1e-9) -> None:
    """Compare to a tolerance relative to the largest entry, with a floor where all of them are rounding errors."""
    scale = max(float(wanted.abs().max()), 1e-4)
    torch.testing.assert_close(found, wanted, rtol=0, atol=rtol * scale)
