"""Steps of any layer against dense solves with the RFIM of its own parameters, by automatic differentiation.

The oracle runs a layer as a function z(theta) of all its parameters and takes G = mean_n J_n' diag(nu_n) J_n with
J_n = dz_n / dtheta: it knows neither patches nor normalised inputs, groups nor one-hot tokens.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from builders import Following
from cases import assert_close
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from relfisher import RNGD, MetricOptions, TrustRegion

ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": (lambda z: z, torch.ones_like),
    "tanh": (torch.tanh, lambda z: 1 - torch.tanh(z) ** 2),
    "sigmoid": (torch.sigmoid, lambda z: torch.sigmoid(z) * (1 - torch.sigmoid(z))),
    "relu": (torch.relu, lambda z: (z > 0).to(z.dtype)),
    "leaky": (lambda z: functional.leaky_relu(z, 0.3), lambda z: torch.where(z > 0, torch.ones_like(z), 0.09)),
    "elu": (functional.elu, lambda z: torch.where(z > 0, 1.0, torch.exp(2 * z))),
    "softplus": (functional.softplus, lambda z: torch.sigmoid(z) ** 2),
}
activations = st.sampled_from([*ACTIVATIONS])
dampings = st.floats(0.01, 1.0)
seeds = st.integers(0, 10**6)
exact = partial(pytest.mark.supports, "a step is the dense solve with the RFIM by automatic differentiation, to 1e-8")


every = pytest.mark.parametrize("structure", ["neuron", "shared", "diagonal", "kronecker"])
affine = pytest.mark.parametrize("structure", ["neuron", "shared", "diagonal"])
of_tokens = pytest.mark.parametrize("structure", ["diagonal", "shared"])


@dataclass
class Case:
    """A layer and what it is called with.

    `rows` turns its output into samples [n, units], `kept` is the layer as the oracle runs it, `looped` says that
    torch cannot differentiate all outputs of it at once.
    """

    layer: nn.Module
    args: tuple[Any, ...]
    rows: Callable[[Tensor], Tensor]
    kwargs: dict[str, Any] = field(default_factory=dict)
    looped: bool = False


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def last(output: Tensor) -> Tensor:
    """Return the rows of what has its units last."""
    return output.reshape(-1, output.shape[-1])


def second(output: Tensor) -> Tensor:
    """Return the rows of what has its units in the second place."""
    return last(output.movedim(1, -1))


def randomised(layer: nn.Module) -> nn.Module:
    """Return a layer in float64 with random parameters, none of them 0 or 1."""
    for parameter in layer.double().parameters():
        nn.init.normal_(parameter, std=0.7)
    return layer


@dataclass(frozen=True)
class Moments:
    """Pre-activations [n, units] and their Jacobian [n, units, P] in theta, the parameters one after another."""

    z: Tensor
    jacobian: Tensor

    def metric(self, nu: Tensor) -> Tensor:
        """Return mean_n J_n' diag(nu_n) J_n."""
        return torch.einsum("nup,nu,nuq->pq", self.jacobian, nu, self.jacobian) / len(self.z)


def moments(z: Callable[[dict[str, Tensor]], Tensor], theta: Mapping[str, Tensor], looped: bool = False) -> Moments:
    """Return the moments of a function of named parameters."""
    theta = {name: value.detach().clone() for name, value in theta.items()}
    jacobians = jacrev(z, chunk_size=1 if looped else None)(theta)
    value = z(theta)
    return Moments(value, torch.cat([jacobians[name].flatten(2) for name in theta], dim=2))


def moments_of(case: Case) -> Moments:
    layer = copy.deepcopy(case.layer)
    if getattr(layer, "sparse", False):
        layer.sparse = False
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}

    def z(theta: dict[str, Tensor]) -> Tensor:
        buffers_of_call = {name: buffer.clone() for name, buffer in buffers.items()}
        return case.rows(functional_call(layer, {**theta, **buffers_of_call}, case.args, case.kwargs))

    return moments(z, dict(layer.named_parameters()), case.looped)


def damped(matrix: Tensor, damping: float) -> Tensor:
    """Return a matrix with a multiple of its mean eigenvalue on the diagonal."""
    return matrix + damping * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def solved(seen: Moments, structure: str, activation: str, damping: float, gradient: Tensor) -> Tensor:
    """Return (G + damping)^-1 times the gradient, with G as a structure takes it."""
    nu = ACTIVATIONS[activation][1](seen.z)
    linear = seen.metric(torch.ones_like(seen.z))
    match structure:
        case "neuron":
            return torch.linalg.solve(damped(seen.metric(nu), damping), gradient)
        case "shared":
            return torch.linalg.solve(damped(linear, damping), gradient)
        case "diagonal":
            return torch.linalg.solve(damped(torch.diag(linear.diagonal()), damping), gradient)
    # Outputs have mean_n diag(nu_n), inputs the block of a linear unit, each with the root of the damping.
    units = seen.jacobian.abs().sum(0).argmax(0)  # of each parameter
    outputs = damped(torch.diag(nu.mean(0)), math.sqrt(damping)).diagonal()
    return torch.linalg.solve(damped(linear, math.sqrt(damping)) * outputs[units].unsqueeze(1), gradient)


def speaks(seen: Moments, activation: str) -> bool:
    """Return whether some unit responds to some parameter."""
    nu = ACTIVATIONS[activation][1](seen.z)
    return float(nu.mean()) > 1e-6 and float(seen.metric(nu).diagonal().mean()) > 1e-6


def stepped(model: nn.Module, damping: float, structure: str | dict, *args: Any, **kwargs: Any) -> tuple[dict, dict]:
    """Return the gradients and the moves of one step with learning rate 1, by the parameters' names."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with RNGD(
        model, 1.0, momentum=0, damping=damping, step_rule=TrustRegion(None), metric=MetricOptions(structure=structure)
    ) as optimizer:
        output = model(*args, **kwargs)
        (output * torch.randn_like(output)).sum().backward()
        gradients = {name: parameter.grad.to_dense() for name, parameter in model.named_parameters()}
        optimizer.step()
        assert optimizer.health.skipped_steps == 0
    return gradients, {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def check(case: Case, structure: str, activation: str, damping: float) -> None:
    """Compare a step with the dense solve."""
    model = Following(case.layer, ACTIVATIONS[activation][0])
    seen = moments_of(case)
    if not speaks(seen, activation):
        reject()
    # One name for all layers leaves embeddings their diagonal.
    rule = {"layer": structure} if isinstance(case.layer, nn.Embedding | nn.EmbeddingBag) else structure
    gradients, moves = stepped(model, damping, rule, *case.args, **case.kwargs)
    assert_close(flat(moves), solved(seen, structure, activation, damping, flat(gradients)), 1e-8)
