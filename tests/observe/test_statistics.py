"""What a step adds to the running metrics: all samples of all calls, or an even selection of them."""

import gc

import pytest
import torch
from builders import assert_close_weights, average, mlp, normed_mlp, step
from torch import nn

from relfisher import RNGD, MetricOptions, module_metric

MODELS = {
    "linear": (mlp, ("0", "2", "4"), (16, 6)),
    "relu": (lambda: mlp(nn.ReLU), ("0", "2", "4"), (16, 6)),
    "norm": (normed_mlp, ("0", "2", "3"), (16, 6)),
    "sequence": (normed_mlp, ("0", "2", "3"), (4, 5, 6)),
    "conv": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.Tanh(), nn.Conv1d(4, 3, 2), nn.GELU()).double(),
        ("0", "2"),
        (5, 2, 7),
    ),
}


@pytest.mark.parametrize(("make", "layers", "shape"), MODELS.values(), ids=MODELS)
def test_one_batch_has_the_metrics_that_the_layers_have_by_themselves(make, layers, shape):
    """The metric of `module_metric`, block by block."""
    model, x = make(), torch.randn(shape, dtype=torch.float64)
    expected = {name: module_metric(model, name, x).blocks() for name in layers}
    optimizer = RNGD(model, metric=MetricOptions(structure="neuron", decay=0.0, stats_samples=None))
    step(model, optimizer, x)
    for name, blocks in expected.items():
        found = average(optimizer, model.get_submodule(name))
        torch.testing.assert_close(found.reshape(blocks.shape), blocks)


def data(samples, width=8):
    generator = torch.Generator().manual_seed(samples)
    x = torch.randn(samples, width, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.2, 3, samples, dtype=torch.float64)[:, None]
    return x, x[:, :3].argmax(1)


SEQUENCES = {
    "Linear": lambda: mlp(sizes=(8, 16, 3)),
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
        found.append(model)
    assert_close_weights(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("first", "second"), [(256, 256), (257, 256), (4096, 64), (64, 4096), (100, 50)])
@pytest.mark.parametrize("apart", [False, True])
def test_each_row_of_each_call_counts_the_same(first, second, apart):
    """A layer is called with ones, then with zeros, and each call flows back at once or both together."""
    model = mlp(sizes=(1, 2), bias=False)
    optimizer = RNGD(model, lr=1e-12, metric=MetricOptions(decay=0.0, structure="shared"))
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
    """Each call has inputs of its own, so that the metric says how many rows of which calls it has seen."""
    model = mlp(sizes=(101, 2), bias=False, dtype=torch.float32)
    optimizer = RNGD(model, metric=MetricOptions(stats_samples=20, decay=0.0, structure="diagonal"))
    for call in range(100):
        model(torch.eye(101)[call].repeat(20, 1)).sum().backward()
    gc.collect()
    held = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor) and each.shape[1:] == (101,)]
    assert sum(len(rows) for rows in held if rows is not model[0].weight and rows is not model[0].weight.grad) <= 60
    optimizer.step()
    shares = average(optimizer, model[0])
    assert float(shares.sum()) == pytest.approx(1)
    assert abs(1 / float(shares[shares > 0].min()) - 20) <= 3


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
        optimizer = RNGD(model, lr=1e-9, step_rule="trust-region", metric=MetricOptions(stats_samples=limit))
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        found.append(optimizer.state[layer.weight]["inverse"])
    assert not torch.equal(*found)
    torch.testing.assert_close(*found, rtol=0.2, atol=0.1)
