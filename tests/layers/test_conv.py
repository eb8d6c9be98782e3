"""Convolutions and transposed ones, of all dimensions: steps against the dense solve."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from layer_oracle import Case, activations, check, dampings, every, exact, normal, randomised, second, seeds
from torch import Tensor, nn

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
