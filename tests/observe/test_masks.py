"""Which positions count: masks leave padding out exactly."""

import contextlib
import warnings

import pytest
import torch
from builders import Following, average, metrics, mlp
from reference import augment
from torch import nn

from relfisher import RNGD, MetricOptions, Preconditioner
from relfisher.observe import MaskWarning

LAYERS = {
    "Linear": lambda: nn.Linear(4, 3),
    "LayerNorm": lambda: nn.LayerNorm(4),
    "RMSNorm": lambda: nn.RMSNorm(4),
    "LSTM": lambda: nn.LSTM(4, 3, batch_first=True),
}


@pytest.mark.supports("padding left out by `masked`", "Linear", "LayerNorm", "RMSNorm", "LSTM")
@pytest.mark.parametrize("kind", LAYERS)
def test_masked_positions_are_no_samples(kind):
    """A padded batch has the metric of its sequences one by one, whatever stands in the padding."""
    torch.manual_seed(0)
    model = Following(LAYERS[kind]().double())
    lengths = [5, 2, 3]
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    x[~mask] = 1e3
    padded, plain = (
        RNGD(model, metric=MetricOptions(stats_interval=1, decay=0.0)),
        RNGD(model, metric=MetricOptions(stats_interval=1, decay=0.0)),
    )
    for optimizer in (padded, plain):
        optimizer.zero_grad()
    with padded.masked(mask):
        model(x)[mask].sum().backward()
    plain.zero_grad()
    padded.step()
    for length, sequence in zip(lengths, x, strict=True):
        model(sequence[None, :length]).sum().backward()
    plain.step()
    for name, metric in metrics(padded).items():
        torch.testing.assert_close(metric, metrics(plain)[name])


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
    frequencies = state["metric"] / float(state["ema_weight"])
    torch.testing.assert_close(frequencies, torch.tensor([0.0, 0.25, 0.5, 0.25, 0.0], dtype=torch.float64))


@pytest.mark.supports("padding left out by `masked`", "MultiheadAttention")
def test_masked_positions_of_attention_are_no_samples():
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    model = Following(attention)
    model.forward = lambda x, mask: attention(x, x, x, key_padding_mask=~mask)[0]
    x = torch.randn(2, 4, 4, dtype=torch.float64)
    mask = torch.arange(4) < torch.tensor([4, 2])[:, None]
    optimizer, plain = (
        RNGD(model, metric=MetricOptions(stats_interval=1, decay=0.0)),
        RNGD(model, metric=MetricOptions(stats_interval=1, decay=0.0)),
    )
    with optimizer.masked(mask):
        model(x, mask)[mask].sum().backward()
    plain.zero_grad()
    optimizer.step()
    for length, sequence in zip((4, 2), x, strict=True):
        model(sequence[None, :length], mask[:1, :length]).sum().backward()
    plain.step()
    for name, metric in metrics(optimizer).items():
        torch.testing.assert_close(metric, metrics(plain)[name])


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
    optimizer = RNGD(layer, metric=MetricOptions(decay=0.0, structure="shared"))
    mask = torch.arange(length) < torch.tensor([3, 2, 1])[:, None]
    x = torch.randn(length, 3, 4, dtype=torch.float64)
    x.transpose(0, 1)[~mask] = 1e3
    with optimizer.masked(mask.T if turned and length != 3 else mask):
        output = (layer(x, x, x, key_padding_mask=~mask) if kind == "MultiheadAttention" else layer(x))[0]
        output.transpose(0, 1)[mask].sum().backward()
    optimizer.step()
    side = [metric for name, metric in metrics(optimizer).items() if not name.endswith("_reverse")]
    assert all(float(metric.abs().max()) < 1e2 for metric in side)


@pytest.mark.supports("padding left out by `masked`", "Conv1d")
@pytest.mark.parametrize("limit", [None, 256, 2])
def test_masked_positions_of_convolutions_are_no_samples(limit):
    model = nn.Sequential(nn.Conv1d(2, 3, 1)).double()
    optimizer = RNGD(model, metric=MetricOptions(decay=0.0, structure="shared", stats_samples=limit))
    mask = torch.arange(4) < torch.tensor([2, 3])[:, None]
    x = torch.ones(2, 2, 4, dtype=torch.float64)
    x.transpose(1, 2)[~mask] = 1e3
    with optimizer.masked(mask):
        model(x).transpose(1, 2)[mask].sum().backward()
    optimizer.step()
    torch.testing.assert_close(optimizer.state[model[0].weight]["metric"], torch.ones(3, 3, dtype=torch.float64))


def test_a_mask_that_does_not_fit_is_named_once():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten(), nn.Linear(12, 2))
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=1))
    mask = torch.ones(2, 5, dtype=torch.bool)
    named = r"the mask \[2, 5\] was not applied to 0, whose samples are \[2, 3\]"
    with pytest.warns(MaskWarning, match=named), optimizer.masked(mask):
        model(torch.randn(2, 4, 5)).sum().backward()
    optimizer.step()
    with optimizer.masked(mask):
        model(torch.randn(2, 4, 5)).sum().backward()  # warnings are errors here


def test_masks_that_do_not_concern_a_layer_are_no_matter():
    """One of pooled sequences, and one of positions that all sequences share, see what they see without a mask."""
    places = nn.Embedding(5, 4)
    model = nn.ModuleList([nn.Linear(4, 4), places, nn.Linear(4, 2)]).double()
    model.forward = lambda x: model[2](torch.tanh(model[0](x) + places(torch.arange(5)[None])).mean(1))
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 3])[:, None]
    with torch.no_grad():
        pooled = augment(torch.tanh(model[0](x) + places.weight).mean(1))
    optimizer = RNGD(model, metric=MetricOptions(structure={"Linear": "shared", "Embedding": "diagonal"}))
    with optimizer.masked(mask):
        model(x).sum().backward()
    optimizer.step()
    rows = augment(x[mask])
    torch.testing.assert_close(average(optimizer, model[0]), rows.T @ rows / 8)
    torch.testing.assert_close(average(optimizer, places), torch.full((5,), 0.2, dtype=torch.float64))
    torch.testing.assert_close(average(optimizer, model[2]), pooled.T @ pooled / 2)


def test_flattened_positions_are_named_and_all_count():
    model = mlp(sizes=(4, 2))
    optimizer = RNGD(model, metric=MetricOptions(structure="shared"))
    x, mask = torch.randn(10, 4, dtype=torch.float64), torch.arange(5) < torch.tensor([5, 3])[:, None]
    with pytest.warns(MaskWarning, match="was not applied to 0"), optimizer.masked(mask):
        model(x).sum().backward()
    optimizer.step()
    torch.testing.assert_close(average(optimizer, model[0]), augment(x).T @ augment(x) / 10)


def test_a_mask_that_fits_no_layer_is_told_once():
    model = mlp(sizes=(4, 4, 2), dtype=torch.float32)
    optimizer = RNGD(model, metric=MetricOptions(stats_interval=1))
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


@pytest.mark.parametrize("masking", [False, True])
@pytest.mark.parametrize("ignored", [0, 1, 8])
def test_positions_that_the_loss_leaves_out_are_said_unless_they_are_few_or_masked(ignored, masking):
    model = mlp(sizes=(4, 3)).float()
    optimizer = RNGD(model, metric=MetricOptions(stats_samples=None))
    x, targets = torch.randn(2, 10, 4), torch.zeros(2, 10, dtype=torch.long)
    targets.view(-1)[:ignored] = -100
    counts = targets != -100 if masking else torch.ones(2, 10, dtype=torch.bool)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MaskWarning)
        for _ in range(3):
            optimizer.zero_grad()
            with optimizer.masked(counts) if masking else contextlib.nullcontext():
                logits = model(x)
            nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100).backward()
            optimizer.step()
    told = [str(each.message) for each in caught if each.category is MaskWarning]
    if ignored == 8 and not masking:
        (message,) = told
        assert message.startswith("the loss leaves out 8 of 20 samples of 0, which count in the metrics: ")
    else:
        assert not told
