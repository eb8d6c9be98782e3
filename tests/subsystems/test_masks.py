"""Which positions count: masks leave padding out exactly, limits keep an even selection."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from relfisher import RNGD, Preconditioner
from relfisher.subsystems import MaskWarning, Rows, Sampling
from relfisher.subsystems.samples import Held, Reservoir

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


FIRST = {
    "LSTM": lambda: nn.LSTM(4, 3).double(),
    "GRU": lambda: nn.GRU(4, 3, bidirectional=True).double(),
    "MultiheadAttention": lambda: nn.MultiheadAttention(4, 2).double(),
}


@pytest.mark.supports(
    "[batch, length] masks of sequence-first inputs leave padding out", "LSTM", "GRU", "MultiheadAttention"
)
@pytest.mark.parametrize("kind", FIRST)
@pytest.mark.parametrize("length", [5, 3])
@pytest.mark.parametrize("turned", [False, True])
def test_masks_of_sequence_first_layers(kind, length, turned):
    """As many sequences as positions or not; a mask that could be either is [batch, length]."""
    layer = FIRST[kind]()
    optimizer = RNGD(layer, decay=0.0, structure="shared")
    mask = torch.arange(length) < torch.tensor([3, 2, 1])[:, None]
    x = torch.randn(length, 3, 4, dtype=torch.float64)
    x.transpose(0, 1)[~mask] = 1e3
    with optimizer.masked(mask.T if turned and length != 3 else mask):
        output = (layer(x, x, x, key_padding_mask=~mask) if kind == "MultiheadAttention" else layer(x))[0]
        output.transpose(0, 1)[mask].sum().backward()
    optimizer.step()
    side = [metric for name, metric in states(optimizer).items() if not name.endswith("_reverse")]
    assert all(float(metric.abs().max()) < 1e2 for metric in side)


@pytest.mark.supports("padding left out by `masked`", "Conv1d")
@pytest.mark.parametrize("limit", [None, 256, 2])
def test_masked_positions_of_convolutions_are_no_samples(limit):
    model = nn.Sequential(nn.Conv1d(2, 3, 1)).double()
    optimizer = RNGD(model, decay=0.0, structure="shared", stats_samples=limit)
    mask = torch.arange(4) < torch.tensor([2, 3])[:, None]
    x = torch.ones(2, 2, 4, dtype=torch.float64)
    x.transpose(1, 2)[~mask] = 1e3
    with optimizer.masked(mask):
        model(x).transpose(1, 2)[mask].sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model[0].weight]["metric"], torch.ones(3, 3, dtype=torch.float64))


def test_a_mask_that_does_not_fit_is_named_once():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(12, 2))
    optimizer = RNGD(model, stats_interval=1)
    mask = torch.ones(2, 5, dtype=torch.bool)
    named = r"the mask \[2, 5\] was not applied to 0, whose samples are \[2, 3\]"
    with pytest.warns(MaskWarning, match=named), optimizer.masked(mask):
        model(torch.randn(2, 4, 5)).sum().backward()
    optimizer.step()
    with optimizer.masked(mask):
        model(torch.randn(2, 4, 5)).sum().backward()  # warnings are errors here


def test_masks_that_do_not_concern_a_layer_are_no_matter():
    """One of pooled sequences, and one of positions that all sequences share."""
    places = nn.Embedding(5, 4)
    model = nn.ModuleList([nn.Linear(4, 4), places, nn.Linear(4, 2)])
    model.forward = lambda x: model[2](torch.tanh(model[0](x) + places(torch.arange(5)[None])).mean(1))
    optimizer = RNGD(model)
    with optimizer.masked(torch.ones(2, 5, dtype=torch.bool)):
        model(torch.randn(2, 5, 4)).sum().backward()
    optimizer.step()


def test_flattened_positions_are_named():
    model = nn.Sequential(nn.Linear(4, 2))
    optimizer = RNGD(model)
    with pytest.warns(MaskWarning, match="was not applied to 0"), optimizer.masked(torch.ones(2, 5, dtype=torch.bool)):
        model(torch.randn(10, 4)).sum().backward()


def test_a_mask_that_fits_no_layer_is_told_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = RNGD(model, stats_interval=1)
    mask = torch.ones(7, 9, dtype=torch.bool)
    with pytest.warns(MaskWarning, match=r"the mask \[7, 9\] was applied to no layer"), optimizer.masked(mask):
        model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    with optimizer.masked(mask):
        model(torch.randn(3, 4)).sum().backward()  # warnings are errors here
    with optimizer.masked(torch.ones(3, dtype=torch.bool)):
        model(torch.randn(3, 4)).sum().backward()


def test_masks_must_be_boolean():
    model = nn.Sequential(nn.Linear(3, 2))
    for watcher in (RNGD(model), Preconditioner(model)):
        with pytest.raises(TypeError, match="mask must be boolean"), watcher.masked(torch.ones(2)):
            pass


@given(n=st.integers(0, 3000), limit=st.integers(1, 300))
def test_a_limit_keeps_about_so_many(n, limit):
    (rows,) = Sampling(limit).rows(torch.arange(n).unsqueeze(1))
    if n <= limit:
        assert torch.equal(rows.flatten(), torch.arange(n))
    else:
        assert abs(len(rows) - limit) <= 3
        assert torch.equal(rows.unique(), rows.flatten())


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6), limit=st.integers(1, 200))
def test_pieces_leave_the_sample_of_the_whole(sizes, limit):
    """Calls one after another, each thinned when it is made, and all thinned at the end."""
    numbers = torch.arange(sum(sizes), dtype=torch.float64).unsqueeze(1)
    reservoir, start = Reservoir(limit), 0
    for size in sizes:
        sampling = Sampling(limit, start=start)
        (x,) = sampling.rows(numbers[start : start + size])
        start += size
        reservoir.add(Held(Rows(x, x), start - size, size, min(1.0, limit / start)))
    (whole,) = Sampling(limit).rows(numbers)
    assert torch.equal(reservoir.rows().x, whole)


def test_calls_that_never_flow_back_leave_no_bias():
    """A call that was thinned next to them thins the others as much."""
    reservoir, ones = Reservoir(100), torch.ones(1000, 1)
    for start, count in ((0, 400), (1400, 400)):  # 1000 between them were lost
        sampling = Sampling(100, start=start)
        (x,) = sampling.rows(ones[:count] * start)
        reservoir.add(Held(Rows(x, x), start, count, min(1.0, 100 / (start + count))))
    kept = reservoir.rows().x
    assert abs(int((kept == 0).sum()) - int((kept > 0).sum())) <= 3
    assert reservoir.seen == 800


def data(samples, width=8):
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.2, 3, samples, dtype=torch.float64)[:, None]
    return x, x[:, :3].argmax(1)


SEQUENCES = {
    "Linear": lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)),
    "Conv1d": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    ),
    "LSTM": lambda: Recurrent(batch_first=True),
    "LSTM, sequence first": lambda: Recurrent(batch_first=False),
    "MultiheadAttention": lambda: Attention(batch_first=True),
    "MultiheadAttention, sequence first": lambda: Attention(batch_first=False),
}


class Recurrent(nn.Module):
    def __init__(self, *, batch_first):
        super().__init__()
        self.layer = nn.LSTM(2, 3, batch_first=batch_first)

    def forward(self, x):
        x = x.unflatten(1, (4, 2))
        return self.layer(x)[0][:, -1] if self.layer.batch_first else self.layer(x.transpose(0, 1))[0][-1]


class Attention(nn.Module):
    """Fewer keys than queries."""

    def __init__(self, *, batch_first):
        super().__init__()
        self.layer = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = x.unflatten(1, (2, 4))
        queries, keys = torch.cat([x, x.tanh()], dim=1)[:, :3], x
        if self.layer.batch_first:
            return self.head(self.layer(queries, keys, keys)[0].mean(1))
        queries, keys = queries.transpose(0, 1), keys.transpose(0, 1)
        return self.head(self.layer(queries, keys, keys)[0].mean(0))


@pytest.mark.supports(
    "accumulated gradients above `stats_samples` equal the large batch",
    "Linear",
    "Conv1d",
    "LSTM",
    "MultiheadAttention",
    "Linear",
    "Conv1d",
    "LSTM",
    "MultiheadAttention",
)
@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize(("samples", "sizes"), [(300, [100, 100, 100]), (1024, [256] * 4), (600, [40, 501, 1, 58])])
def test_pieces_of_a_batch_are_the_batch(kind, samples, sizes):
    """With the defaults, whether there are more samples than are kept in all or in a piece."""
    found = []
    x, y = data(samples)
    for pieces in ([samples], sizes):
        torch.manual_seed(0)
        model = SEQUENCES[kind]().double()
        optimizer = RNGD(model)
        for _ in range(3):
            optimizer.zero_grad()
            for part, labels in zip(x.split(pieces), y.split(pieces), strict=True):
                loss = nn.functional.cross_entropy(model(part), labels, reduction="sum")
                (loss / samples).backward()
            optimizer.step()
        found.append([parameter.detach() for parameter in model.parameters()])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("first", "second"), [(256, 256), (257, 256), (4096, 64), (64, 4096), (100, 50)])
@pytest.mark.parametrize("apart", [False, True])
def test_each_row_of_each_call_counts_the_same(first, second, apart):
    """A layer is called with ones, then with zeros, and each call flows back at once or both together."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False)).double()
    optimizer = RNGD(model, lr=1e-12, decay=0.0, structure="shared")
    optimizer.zero_grad()
    losses = []
    for value, count in ((1.0, first), (0.0, second)):
        losses.append(model(torch.full((count, 1), value, dtype=torch.float64)).sum())
        if apart:
            losses.pop().backward()
    if losses:
        sum(losses).backward()
    optimizer.step()
    metric = float(optimizer.state[model[0].weight]["metric"])
    assert metric == pytest.approx(first / (first + second), abs=0.01)


def test_many_calls_hold_few_rows():
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = RNGD(model, stats_samples=20)
    for _ in range(100):
        model(torch.randn(20, 2)).sum().backward()
    reservoir = optimizer._curvature.capture._reservoirs[next(iter(optimizer._place))]
    assert sum(held.rows.x.shape[0] for held in reservoir._held) <= 60
    assert abs(reservoir.rows().x.shape[0] - 20) <= 3


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
