"""Normalisations and learned slopes: steps against the dense solve."""

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from layer_oracle import (
    Case,
    activations,
    affine,
    check,
    dampings,
    exact,
    normal,
    randomised,
    second,
    seeds,
)
from torch import nn


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
