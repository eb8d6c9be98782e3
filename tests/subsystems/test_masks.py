"""Which positions count: masks leave padding out exactly, limits keep an even selection."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relfisher import RNGD, Preconditioner
from relfisher.subsystems import Sampling

LAYERS = {
    "Linear": lambda: nn.Linear(4, 3),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "LSTM": lambda: nn.LSTM(4, 3, batch_first=True),
}


class Model(nn.Module):
    """One layer, and a loss that padding has no part in."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.double()

    def forward(self, x):
        output = self.layer(x)
        return torch.tanh(output[0] if isinstance(output, tuple) else output)


def states(optimizer):
    return {layer.name: optimizer.state[layer.weight]["metric"] for layer in optimizer._place}


@pytest.mark.supports("padding left out by `masked`", "Linear", "LayerNorm", "RMSNorm", "LSTM")
@pytest.mark.parametrize("kind", LAYERS)
def test_masked_positions_are_no_samples(kind):
    """A padded batch has the metric of its sequences one by one, whatever stands in the padding."""
    torch.manual_seed(0)
    model = Model(LAYERS[kind]())
    lengths = [5, 2, 3]
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    x[~mask] = 1e3
    padded, plain = RNGD(model, stats_interval=1, decay=0.0), RNGD(model, stats_interval=1, decay=0.0)
    for optimizer in (padded, plain):
        optimizer.zero_grad()
    with padded.masked(mask):
        model(x)[mask].sum().backward()
    plain.zero_grad()
    padded.step()
    plain._curvature.capture.drop()
    for length, sequence in zip(lengths, x, strict=True):
        model(sequence[None, :length]).sum().backward()
    plain.step()
    for name, metric in states(padded).items():
        torch.testing.assert_close(metric, states(plain)[name])


@pytest.mark.supports("padding left out by `masked` or by `padding_idx`", "Embedding")
@pytest.mark.parametrize("by", ["mask", "padding_idx"])
def test_masked_tokens_are_no_samples(by):
    model = nn.Sequential(nn.Embedding(5, 3, padding_idx=0 if by == "padding_idx" else None)).double()
    optimizer = RNGD(model)
    tokens = torch.tensor([[1, 2, 2], [3, 0, 0]])
    with optimizer.masked(tokens != 0 if by == "mask" else torch.ones(2, 3, dtype=torch.bool)):
        model(tokens).sum().backward()
    optimizer.step()
    state = optimizer.state[model[0].weight]
    frequencies = state["metric"] / float(state["mass"])
    torch.testing.assert_close(frequencies, torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0], dtype=torch.float64))


@pytest.mark.supports("padding left out by `masked`", "MultiheadAttention")
def test_masked_positions_of_attention_are_no_samples():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    model = Model(attention)
    model.forward = lambda x, mask: attention(x, x, x, key_padding_mask=~mask)[0]
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 2])[:, None]
    optimizer, plain = RNGD(model, stats_interval=1, decay=0.0), RNGD(model, stats_interval=1, decay=0.0)
    with optimizer.masked(mask):
        model(x, mask)[mask].sum().backward()
    plain.zero_grad()
    optimizer.step()
    for length, sequence in zip((4, 2), x, strict=True):
        model(sequence[None, :length], mask[:1, :length]).sum().backward()
    plain.step()
    for name, metric in states(optimizer).items():
        torch.testing.assert_close(metric, states(plain)[name])


def test_masks_must_be_boolean():
    model = nn.Sequential(nn.Linear(3, 2))
    for watcher in (RNGD(model), Preconditioner(model)):
        with pytest.raises(TypeError, match="mask must be boolean"), watcher.masked(torch.ones(2)):
            pass


@given(n=st.integers(0, 60), limit=st.integers(1, 20))
def test_a_limit_keeps_one_of_each_run(n, limit):
    (rows,) = Sampling(limit).rows(torch.arange(n).unsqueeze(1))
    run = max(1, math.ceil(n / limit))
    assert len(rows) <= limit
    assert len(rows) >= n // run
    assert torch.equal(rows.flatten() // run, torch.arange(len(rows)))


@pytest.mark.supports("`stats_samples` limits the samples of a call", "Linear", "Conv2d")
@pytest.mark.parametrize("layer", [nn.Linear(4, 3), nn.Conv2d(4, 3, 2)])
def test_statistics_of_some_samples_are_near_those_of_all(layer):
    torch.manual_seed(0)
    model = nn.Sequential(layer.double())
    x = torch.randn(4000, 4, dtype=torch.float64) if isinstance(layer, nn.Linear) else torch.randn(
        200, 4, 6, 6, dtype=torch.float64
    )  # fmt: skip
    found = []
    for limit in (None, 1000):
        optimizer = RNGD(model, lr=1e-9, stats_samples=limit)
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        found.append(optimizer.state[layer.weight]["inverse"])
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.2, atol=0.1)
