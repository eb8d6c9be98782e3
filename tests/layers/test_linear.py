"""Linear layers, plain and bilinear: steps against the dense solve."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from layer_oracle import Case, activations, check, dampings, every, exact, last, normal, randomised, seeds
from torch import nn
from transformers.pytorch_utils import Conv1D


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
