"""Every kind of layer: steps and metrics against the RFIM of its own parameters, by automatic differentiation.

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
from cases import assert_close
from hypothesis import assume, given, reject
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from relfisher import RNGD

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


class Model(nn.Module):
    """A layer and the activation that follows."""

    def __init__(self, layer: nn.Module, activation: str) -> None:
        super().__init__()
        self.layer = layer
        self.activation = ACTIVATIONS[activation][0]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = self.layer(*args, **kwargs)
        return self.activation(output[0] if isinstance(output, tuple) else output)


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
        model, 1.0, momentum=0, damping=damping, step_rule="trust-region", trust_region=None, structure=structure
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
    model = Model(case.layer, activation)
    seen = moments_of(case)
    if not speaks(seen, activation):
        reject()
    # One name for all layers leaves embeddings their diagonal.
    rule = {"layer": structure} if isinstance(case.layer, nn.Embedding | nn.EmbeddingBag) else structure
    gradients, moves = stepped(model, damping, rule, *case.args, **case.kwargs)
    assert_close(flat(moves), solved(seen, structure, activation, damping, flat(gradients)), 1e-8)


every = pytest.mark.parametrize("structure", ["neuron", "shared", "diagonal", "kronecker"])
affine = pytest.mark.parametrize("structure", ["neuron", "shared", "diagonal"])
of_tokens = pytest.mark.parametrize("structure", ["diagonal", "shared"])


class Conv1D(nn.Module):
    """The linear layer of GPT-2, with its weight transposed."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


@st.composite
def linear_layers(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(seeds))
    inputs, out = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    leading = draw(st.lists(st.integers(1, 4), max_size=3))
    if draw(st.booleans()):
        layer: nn.Module = nn.Linear(inputs, out, bias=draw(st.booleans()))
    else:
        layer = Conv1D(out, inputs)
    x = normal(*leading, inputs)
    return (
        Case(randomised(layer), (), last, {"x" if isinstance(layer, Conv1D) else "input": x})
        if draw(st.booleans())
        else Case(randomised(layer), (x,), last)
    )


@st.composite
def bilinear_layers(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(seeds))
    first, second_, out = (draw(st.integers(1, 3)) for _ in range(3))
    leading = draw(st.lists(st.integers(1, 4), min_size=1, max_size=2))
    layer = randomised(nn.Bilinear(first, second_, out, bias=draw(st.booleans())))
    x1, x2 = normal(*leading, first), normal(*leading, second_)
    args, kwargs = draw(
        st.sampled_from([
            ((x1, x2), {}), ((x1,), {"input2": x2}), ((), {"input1": x1, "input2": x2}),
            ((), {"input2": x2, "input1": x1}),
        ])
    )  # fmt: skip
    return Case(layer, args, last, kwargs, looped=True)


@exact("Linear", "Conv1D (GPT-2)", "Bilinear")
@every
@given(case=st.one_of(linear_layers(), bilinear_layers()), activation=activations, damping=dampings)
def test_linear_layers(case: Case, structure: str, activation: str, damping: float) -> None:
    check(case, structure, activation, damping)


CONVOLUTIONS = [nn.Conv1d, nn.Conv2d, nn.Conv3d]
TRANSPOSED = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d]


def images(draw: st.DrawFn, channels: int, size: list[int]) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return inputs of a convolution, with or without a batch dimension, and the rows of its output."""
    if draw(st.booleans()):
        return normal(draw(st.integers(1, 2)), channels, *size), second
    return normal(channels, *size), lambda output: second(output.unsqueeze(0))


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(seeds))
    dimensions = draw(st.integers(1, 3))

    def of_each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(dimensions)]

    groups = draw(st.integers(1, 3))
    kernel, dilation = of_each(1, 2 if dimensions == 3 else 3), of_each(1, 2)
    size = [
        dilation * (kernel - 1) + 1 + more
        for kernel, dilation, more in zip(kernel, dilation, of_each(0, 2), strict=True)
    ]
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    layer = CONVOLUTIONS[dimensions - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride=1 if padding == "same" else of_each(1, 3),
        padding=of_each(0, 1) if padding == "numbers" else padding,
        dilation=dilation,
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )
    if layer.padding_mode in ("reflect", "circular"):
        assume(all(2 * length > max(layer._reversed_padding_repeated_twice) + length for length in size))
    x, rows = images(draw, layer.in_channels, size)
    return Case(randomised(layer), (x,), rows)


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(seeds))
    dimensions = draw(st.integers(1, 3))

    def of_each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(dimensions)]

    groups, stride, dilation = draw(st.integers(1, 2)), of_each(1, 3 if dimensions < 3 else 2), of_each(1, 2)
    kernel, padding = of_each(1, 2), of_each(0, 1)
    extra = [
        draw(st.integers(0, max(step, spread) - 1)) for step, spread in zip(stride, dilation, strict=True)
    ]  # fmt: skip
    size = of_each(1, 2 if dimensions == 3 else 3)
    layer = TRANSPOSED[dimensions - 1](
        groups * draw(st.integers(1, 2)),
        groups * draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        extra,
        groups,
        draw(st.booleans()),
        dilation,
    )
    numbers = zip(size, stride, padding, dilation, kernel, extra, strict=True)
    assume(all((n - 1) * s - 2 * p + d * (k - 1) + e + 1 > 0 for n, s, p, d, k, e in numbers))
    x, rows = images(draw, layer.in_channels, size)
    return Case(randomised(layer), (x,), rows)


@exact("Conv1d", "Conv2d", "Conv3d")
@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@every
@given(case=convolutions(), activation=activations, damping=dampings)
def test_convolutions(case: Case, structure: str, activation: str, damping: float) -> None:
    check(case, structure, activation, damping)


@exact("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
@every
@given(case=transposed_convolutions(), activation=activations, damping=dampings)
def test_transposed_convolutions(case: Case, structure: str, activation: str, damping: float) -> None:
    check(case, structure, activation, damping)


def test_a_transposed_convolution_with_a_stated_output_size() -> None:
    torch.manual_seed(0)
    layer = randomised(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1))
    check(Case(layer, (normal(2, 2, 3, 4),), second, {"output_size": [6, 7]}), "neuron", "tanh", 0.1)
    reordered = Case(layer, (), second, {"output_size": [6, 7], "input": normal(2, 2, 3, 4)})
    check(reordered, "neuron", "tanh", 0.1)


def tokens(count: int, *shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.randint(count, shape).to(dtype)


integers = st.sampled_from([torch.int32, torch.int64])


@st.composite
def embeddings(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(seeds))
    count, out = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    padding = draw(st.none() | st.integers(-count, count - 1))
    x = tokens(count, *draw(st.lists(st.integers(1, 5), max_size=3)), dtype=draw(integers))
    sparse = x.ndim > 0 and draw(st.booleans())  # torch has no sparse gradient of a single token
    layer = randomised(nn.Embedding(count, out, padding_idx=padding, sparse=sparse))
    real = torch.ones(x.numel(), dtype=torch.bool) if padding is None else x.flatten() != padding % count
    assume(bool(real.any()))
    return Case(layer, (x,), lambda output: last(output)[real])


@st.composite
def bags(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(seeds))
    count, out = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    mode = draw(st.sampled_from(["sum", "mean"]))
    flat_input, with_end = draw(st.booleans()), draw(st.booleans())
    layer = randomised(
        nn.EmbeddingBag(
            count,
            out,
            mode=mode,
            sparse=draw(st.booleans()),
            padding_idx=draw(st.none() | st.integers(-count, count - 1)),
            include_last_offset=with_end,
        )
    )
    dtype = draw(integers)
    if flat_input:
        length = draw(st.integers(1, 8))
        starts = sorted(draw(st.lists(st.integers(0, length), max_size=3)))
        x = tokens(count, length, dtype=dtype)
        offsets = torch.tensor([0, *starts, *([length] if with_end else [])], dtype=dtype)
    else:
        x, offsets = tokens(count, draw(st.integers(1, 3)), draw(st.integers(1, 4)), dtype=dtype), None
    weights = normal(*x.shape) if mode == "sum" and draw(st.booleans()) else None
    real = torch.ones_like(x) if layer.padding_idx is None else x != layer.padding_idx
    assume(bool(real.any()))
    if draw(st.booleans()):
        return Case(layer, (x, offsets, weights), last, looped=True)
    return Case(layer, (), last, {"per_sample_weights": weights, "offsets": offsets, "input": x}, looped=True)


@exact("Embedding")
@of_tokens
@given(case=embeddings(), activation=activations, damping=dampings)
def test_embeddings(case: Case, structure: str, activation: str, damping: float) -> None:
    check(case, structure, activation, damping)


@exact("EmbeddingBag")
@of_tokens
@given(case=bags(), damping=dampings)
def test_bags_of_embeddings(case: Case, structure: str, damping: float) -> None:
    check(case, structure, "linear", damping)


@st.composite
def normalisations(draw: st.DrawFn) -> Case:
    torch.manual_seed(draw(seeds))
    kind = draw(st.sampled_from(["layer", "rms", "group", "batch", "instance"]))
    if kind in ("layer", "rms"):
        axes = draw(st.lists(st.integers(2, 3), min_size=1, max_size=2))
        x = normal(*draw(st.lists(st.integers(1, 4), max_size=2)), *axes)
        layer = nn.LayerNorm(axes, bias=draw(st.booleans())) if kind == "layer" else nn.RMSNorm(axes)
        return Case(randomised(layer), (x,), lambda output: output.reshape(-1, math.prod(axes)))
    dimensions = draw(st.integers(0 if kind in ("group", "batch") else 1, 3))
    size = [draw(st.integers(2, 3)) for _ in range(dimensions)]
    batch, channels = draw(st.integers(2, 3)), draw(st.integers(1, 3))
    x = normal(batch, channels, *size)
    if kind == "group":
        groups = draw(st.integers(1, 2))
        x = normal(batch, 2 * groups, *size)
        return Case(randomised(nn.GroupNorm(groups, 2 * groups)), (x,), second)
    running = draw(st.booleans())
    if kind == "batch":
        made = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions]
        layer = made(channels, track_running_stats=running)
    else:
        made = [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dimensions - 1]
        layer = made(channels, affine=True, track_running_stats=running)
    randomised(layer)
    if running:
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    layer.train(draw(st.booleans()))
    if kind == "instance" and draw(st.booleans()):
        return Case(layer, (x[0],), lambda output: second(output.unsqueeze(0)))
    return Case(layer, (x,), second)


@exact(
    "LayerNorm",
    "RMSNorm",
    "GroupNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
)
@affine
@given(case=normalisations(), activation=activations, damping=dampings)
def test_normalisations(case: Case, structure: str, activation: str, damping: float) -> None:
    check(case, structure, activation, damping)


@exact("PReLU")
@affine
@given(
    slopes=st.sampled_from([1, 3]), leading=st.integers(1, 4), size=st.lists(st.integers(1, 3), max_size=2), seed=seeds
)
def test_slopes(structure: str, slopes: int, leading: int, size: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    x = normal(leading, 3, *size)
    rows = second if slopes == 3 else lambda output: output.reshape(-1, 1)
    assume(bool((x < -1e-3).any()))
    check(Case(randomised(nn.PReLU(slopes)), (x,), rows), structure, "linear", 0.1)


@dataclass
class Attention:
    """An attention layer, its inputs batch first, and options of the call."""

    layer: nn.MultiheadAttention
    inputs: tuple[Tensor, Tensor, Tensor]
    kwargs: dict[str, Any]
    seed: int

    @property
    def args(self) -> tuple[Tensor, ...]:
        """The inputs as the layer wants them."""
        return self.inputs if self.layer.batch_first else tuple(each.transpose(0, 1) for each in self.inputs)

    def weights(self) -> list[Tensor]:
        """The weights of queries, keys and values."""
        if self.layer.in_proj_weight is not None:
            return list(self.layer.in_proj_weight.detach().chunk(3))
        layer = self.layer
        return [weight.detach() for weight in (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)]

    def biases(self) -> list[Tensor]:
        """Their biases, or zeros."""
        bias = self.layer.in_proj_bias
        return list(
            (self.layer.out_proj.weight.new_zeros(3 * self.layer.embed_dim) if bias is None else bias.detach()).chunk(3)
        )

    def attended(self) -> Tensor:
        """What the heads attended to, [batch, length, width], with the random numbers of the seed."""
        layer, heads = self.layer, self.layer.num_heads
        projected = [
            functional.linear(x, weight, bias).unflatten(-1, (heads, -1)).transpose(1, 2)
            for x, weight, bias in zip(self.inputs, self.weights(), self.biases(), strict=True)
        ]
        q, k, v = projected  # [batch, heads, length, width / heads]
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        for name in ("attn_mask", "key_padding_mask"):
            mask = self.kwargs.get(name)
            if mask is not None:
                out = mask if name == "attn_mask" else mask[:, None, None, :]
                scores = scores.masked_fill(out, -torch.inf)
        share = torch.softmax(scores, -1)
        if layer.training and layer.dropout:
            torch.manual_seed(self.seed)
            share = share * functional.dropout(torch.ones_like(share.flatten(0, 1)), layer.dropout).view_as(share)
        return (share @ v).transpose(1, 2).flatten(2)


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    seed = draw(seeds)
    torch.manual_seed(seed)
    heads = draw(st.integers(1, 2))
    width = 2 * heads
    separate, myself = draw(st.booleans()), draw(st.booleans())
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    sources = length if myself else draw(st.integers(1, 4))
    key, value = (draw(st.integers(2, 5)), draw(st.integers(2, 5))) if separate else (width, width)
    layer = nn.MultiheadAttention(
        width,
        heads,
        dropout=draw(st.sampled_from([0.0, 0.4])),
        bias=draw(st.booleans()),
        kdim=key,
        vdim=value,
        batch_first=draw(st.booleans()),
    )
    randomised(layer).train(draw(st.booleans()))
    kwargs: dict[str, Any] = {"need_weights": draw(st.booleans())}
    if draw(st.booleans()):
        kwargs["attn_mask"] = torch.ones(length, sources, dtype=torch.bool).triu(1)
    if draw(st.booleans()):
        kwargs["key_padding_mask"] = torch.arange(sources).expand(batch, -1) >= torch.randint(
            1, sources + 1, (batch, 1)
        )
    x = normal(batch, length, width)
    if myself and not separate:
        return Attention(layer, (x, x, x), kwargs, seed)
    return Attention(layer, (x, normal(batch, sources, key), normal(batch, sources, value)), kwargs, seed)


def projection(x: Tensor, weight: Tensor, bias: Tensor | None) -> Moments:
    """Return the moments of a linear map in its own parameters."""
    theta = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
    return moments(lambda named: functional.linear(last(x), named["weight"], named.get("bias")), theta)


def of_roles(case: Attention) -> list[Moments]:
    """Return the moments of queries, keys and values, each in its own parameters."""
    biased = case.layer.in_proj_bias is not None
    biases = case.biases() if biased else [None] * 3
    return [projection(*each) for each in zip(case.inputs, case.weights(), biases, strict=True)]


def joined(tensors: list[Tensor], widths: list[list[int]]) -> list[Tensor]:
    """Return what belongs to the parameters of several roles, one vector a role, as one vector a parameter."""
    pieces = [tensor.split(width) for tensor, width in zip(tensors, widths, strict=True)]
    return [torch.cat(each) for each in zip(*pieces, strict=True)]


@exact("MultiheadAttention")
@every
@given(case=attentions(), activation=activations, damping=dampings)
def test_attention(case: Attention, structure: str, activation: str, damping: float) -> None:
    layer = case.layer
    roles = of_roles(case)
    attended = case.attended()
    out_bias = None if layer.out_proj.bias is None else layer.out_proj.bias
    outputs = projection(attended, layer.out_proj.weight, out_bias)
    if not speaks(outputs, activation):
        reject()
    packed, biased = layer.in_proj_weight is not None, out_bias is not None
    torch.manual_seed(case.seed)
    gradients, moves = stepped(Model(layer, activation), damping, structure, *case.args, **case.kwargs)
    gradients, moves = (
        {name.removeprefix("layer."): each for name, each in named.items()} for named in (gradients, moves)
    )

    names = ["out_proj.weight", *["out_proj.bias"] * biased]
    found, gradient = (torch.cat([named[name].flatten() for name in names]) for named in (moves, gradients))
    assert_close(found, solved(outputs, structure, activation, damping, gradient), 1e-8)

    def role(named: Mapping[str, Tensor], place: int) -> Tensor:
        own = named["in_proj_weight"].chunk(3)[place] if packed else named[f"{'qkv'[place]}_proj_weight"]
        return torch.cat([own.flatten(), *([named["in_proj_bias"].chunk(3)[place]] if biased else [])])

    expected = of_separate(roles, structure, damping, [role(gradients, place) for place in range(3)], packed)
    for place in range(3):
        assert_close(role(moves, place), expected[place], 1e-8)


def of_separate(
    roles: list[Moments], structure: str, damping: float, gradients: list[Tensor], packed: bool
) -> list[Tensor]:
    """Return the solves of linear roles; those that are packed share one damping, from the mean of their traces."""
    if not packed:
        return [
            solved(role, structure, "linear", damping, gradient)
            for role, gradient in zip(roles, gradients, strict=True)
        ]  # fmt: skip
    metrics = [role.metric(torch.ones_like(role.z)) for role in roles]
    whole = torch.block_diag(*metrics)
    if structure == "diagonal":
        whole = torch.diag(whole.diagonal())
    elif structure == "kronecker":  # outputs have the identity, for a linear response
        whole = damped(whole, math.sqrt(damping)) * (1 + math.sqrt(damping))
        return list(torch.linalg.solve(whole, torch.cat(gradients)).chunk(3))
    return list(torch.linalg.solve(damped(whole, damping), torch.cat(gradients)).chunk(3))
