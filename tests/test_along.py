"""The metric along training: every quantity against plain algebra, and training that does not notice."""

import copy
import csv
import math

import pytest
import torch
from builders import batch, classified, inputs, mlp, step, weights
from torch import Tensor, nn

from relfisher import RNGD, MetricRecorder
from relfisher.responses import Categorical

QUANTITIES = ["largest", "trace", "rank", "effective_dimension", "length", "divergence", "drift", "variation"]


def affine(model: nn.Sequential, place: int) -> Tensor:
    return torch.cat([model[place].weight, model[place].bias.unsqueeze(1)], 1).detach().clone()


def by_hand(model: nn.Sequential, x: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Return the dense metric, the inputs and the pre-activations of each layer of a tanh network with a softmax."""
    found, h = {}, x
    for place in range(0, len(model), 2):
        augmented = torch.cat([h, h.new_ones(len(h), 1)], 1)
        z = augmented @ affine(model, place).T
        if place == len(model) - 1:
            eta = torch.softmax(z, 1)
            information = torch.diag_embed(eta) - eta.unsqueeze(2) * eta.unsqueeze(1)
        else:
            information = torch.diag_embed(1 - torch.tanh(z).square())
        outer = augmented.unsqueeze(2) * augmented.unsqueeze(1)
        dense = torch.einsum("nij,nkl->ikjl", information, outer) / len(x)
        size = z.shape[1] * augmented.shape[1]
        found[str(place)] = dense.reshape(size, size), augmented, z
        h = torch.tanh(z)
    return found


def divergence(z: Tensor, after: Tensor, *, softmax: bool) -> float:
    if softmax:
        one, two = torch.log_softmax(z, 1), torch.log_softmax(after, 1)
        return float((one.exp() * (one - two)).sum() / len(z))
    # A tanh unit is +1 with probability (1 + tanh z) / 2 and -1 otherwise.
    total = z.new_zeros(())
    for sign in (-1, 1):
        p, q = torch.sigmoid(2 * sign * z), torch.sigmoid(2 * sign * after)
        total = total + (p * (p / q).log()).sum()
    return float(total / len(z))


@pytest.mark.parametrize("n", [5, 40])  # fewer and more samples than inputs
@pytest.mark.parametrize("kind", ["rngd", "adam"])
def test_every_quantity_is_that_of_the_definition(kind, n):
    model = mlp()
    x = inputs(9, n)
    adam = torch.optim.Adam
    optimizer = RNGD(model, averaging=0.0) if kind == "rngd" else adam(model.parameters(), 1e-2)
    recorder = MetricRecorder(model, optimizer, x, Categorical(), every=1, damping=0.3)
    last, variation = {}, dict.fromkeys(("0", "2", "4"), 0.0)
    for seed in range(3):
        before = by_hand(model, x)
        place = {name: affine(model, int(name)) for name in before}
        step(model, optimizer, batch(seed), classified)
        for name, (dense, augmented, z) in before.items():
            record = next(each for each in recorder.of(name) if each.step == seed)
            move = (affine(model, int(name)) - place[name]).reshape(-1)
            values = torch.linalg.eigvalsh(dense)
            damping = 0.3 * dense.trace() / len(dense)
            after = z + augmented @ move.reshape(z.shape[1], -1).T
            expected = {
                "largest": values[-1],
                "trace": dense.trace(),
                "rank": torch.linalg.matrix_rank(dense, hermitian=True),
                "effective_dimension": torch.linalg.solve(dense + damping * torch.eye(len(dense)), dense).trace(),
                "length": move @ dense @ move,
                "divergence": divergence(z, after, softmax=name == "4"),
            }
            for key, value in expected.items():
                assert getattr(record, key) == pytest.approx(float(value), rel=1e-7), (name, key)
            if seed:
                drift = float((dense - last[name]).norm() / last[name].norm())
                variation[name] += drift
                assert record.drift == pytest.approx(drift, rel=1e-5)
                assert record.variation == pytest.approx(variation[name], rel=1e-5)
            else:
                assert math.isnan(record.drift)
            last[name] = dense
    assert recorder.of("2")[-1].divergence == pytest.approx(recorder.of("2")[-1].length / 2, rel=0.2)


class Noisy(nn.Module):
    """A model with batch norm, dropout, and random numbers and a counter in every pass."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return self.body(x + 0.01 * torch.randn_like(x))


@pytest.mark.parametrize("kind", ["rngd", "adam"])
def test_training_does_not_notice(kind):
    torch.manual_seed(0)
    plain = Noisy().double()
    watched = copy.deepcopy(plain)
    runs = []
    for model in (plain, watched):
        make = {"rngd": lambda m: RNGD(m), "adam": lambda m: torch.optim.Adam(m.parameters())}[kind]
        optimizer = make(model)
        if model is watched:
            recorder = MetricRecorder(model, optimizer, inputs(3), Categorical(), every=2)
        torch.manual_seed(1)
        runs.append([step(model, optimizer, batch(seed), classified) for seed in range(9)])
    assert runs[0] == runs[1]
    for (name, one), two in zip(plain.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert watched.training
    assert watched.body[1].training
    assert {record.step for record in recorder.records} == {0, 2, 4, 6, 8}
    assert {record.layer for record in recorder.records} == {"body.0", "body.1", "body.4"}
    recorder.close()
    step(watched, optimizer, batch(9), classified)
    assert len(recorder.of("body.0")) == 5


def test_the_step_is_that_of_the_iterate():
    model = mlp()
    optimizer = RNGD(model, lr=1e-2)
    with MetricRecorder(model, optimizer, inputs(5), every=1) as recorder:
        for seed in range(4):
            step(model, optimizer, batch(seed), classified)
        model(inputs())  # a training pass puts the iterate into the model
        before, dense = affine(model, 2), by_hand(model, inputs(5))["2"][0]
        step(model, optimizer, batch(4), classified)
        model(inputs())
        move = (affine(model, 2) - before).reshape(-1)
    assert recorder.of("2")[-1].length == pytest.approx(float(move @ dense @ move), rel=1e-7)


def test_layers_that_are_frozen_or_not_reached_and_steps_that_are_not_finite():
    model = nn.ModuleDict({"body": mlp(), "idle": nn.Linear(2, 2).double()})
    model.forward = model["body"].forward
    model["body"][0].requires_grad_(False)
    optimizer = torch.optim.SGD(model["body"].parameters(), lr=0.1)
    recorder = MetricRecorder(model, optimizer, inputs(), every=1)
    step(model, optimizer, batch(), classified)
    assert recorder.of("body.0")[0].length == recorder.of("body.0")[0].divergence == 0
    assert {record.layer for record in recorder.records} == {"body.0", "body.2", "body.4"}
    with torch.no_grad():
        model["body"][2].weight.fill_(math.nan)
    optimizer.step()
    last = recorder.of("body.2")[-1]
    assert math.isnan(last.trace)
    assert math.isnan(last.divergence)
    assert weights(model)["body.0.weight"].isfinite().all()


def test_records_are_data_scalars_and_a_picture(tmp_path):
    model = mlp()
    optimizer = RNGD(model)
    recorder = MetricRecorder(model, optimizer, inputs(), every=2, layers=["0", "4"])
    for seed in range(5):
        step(model, optimizer, batch(seed), classified)
    recorder.save(tmp_path / "metric.csv")
    rows = list(csv.DictReader((tmp_path / "metric.csv").read_text().splitlines()))
    assert [(row["step"], row["layer"]) for row in rows] == [(str(s), layer) for s in (0, 2, 4) for layer in ("0", "4")]
    assert float(rows[-1]["trace"]) == recorder.records[-1].trace

    class Writer:
        def __init__(self):
            self.scalars = {}

        def add_scalar(self, tag, scalar_value, global_step):
            self.scalars[tag, global_step] = scalar_value

    writer = Writer()
    recorder.write_scalars(writer)
    assert writer.scalars["0/trace", 2] == recorder.of("0")[1].trace
    assert {tag for tag, _ in writer.scalars} == {f"{layer}/{name}" for layer in "04" for name in QUANTITIES}
    pytest.importorskip("matplotlib")
    figure = recorder.figure()
    assert [axes.get_title() for axes in figure.axes] == [name.replace("_", " ") for name in QUANTITIES]
    assert list(figure.axes[1].lines[0].get_ydata()) == [record.trace for record in recorder.of("0")]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be a whole number >= 1, got 0"),
        ({"damping": -1.0}, r"damping must lie in \[0, inf\), got -1"),
        ({"layers": ["9"]}, "layers must be among '0', '2', '4', got '9'"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        MetricRecorder(model, RNGD(model), inputs(), **options)
    with pytest.raises(ValueError, match=r"layer must be one that was recorded \(none yet\), got '0'"):
        MetricRecorder(model, RNGD(model), inputs()).of("0")
