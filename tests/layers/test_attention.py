"""Attention: steps of all its projections against dense solves, with masks, dropout and packed weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from builders import Following
from cases import assert_close
from hypothesis import given, reject
from hypothesis import strategies as st
from layer_oracle import (
    ACTIVATIONS,
    Moments,
    activations,
    damped,
    dampings,
    every,
    exact,
    last,
    moments,
    normal,
    randomised,
    seeds,
    solved,
    speaks,
    stepped,
)
from torch import Tensor, nn
from torch.nn import functional


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
    gradients, moves = stepped(
        Following(layer, ACTIVATIONS[activation][0]), damping, structure, *case.args, **case.kwargs
    )
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
