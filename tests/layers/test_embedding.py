"""Embeddings and bags of them: steps against the dense solve."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from layer_oracle import Case, activations, check, dampings, exact, last, normal, of_tokens, randomised, seeds
from torch import Tensor, nn


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
