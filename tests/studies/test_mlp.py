import math

import numpy as np
import pytest
import torch
from torch import nn

from relfisher.studies import mlp
from relfisher.studies.data import Dataset
from relfisher.studies.mlp import METHODS, MlpOptions, MlpRun, carry_out_run
from relfisher.studies.networks import paper_network


@pytest.fixture(autouse=True)
def data(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(260, 784, generator=generator)
    labels = (images[:, :10]).argmax(dim=1)
    noise = Dataset("noise", images[:230], labels[:230], images[230:], labels[230:])
    monkeypatch.setattr(mlp, "load", lambda _: noise)
    return noise


def run(method, learning_rate, epochs=2, seed=0):
    return MlpRun("mlp", method, learning_rate, seed, MlpOptions("noise", "none", epochs))


def train(run, report):
    return carry_out_run("noise", run, report)


def silent(fraction, cost):
    pass


def test_all_variants_start_with_the_same_weights_and_go_on_with_the_same_order():
    generators = [torch.Generator().manual_seed(3) for _ in range(3)]
    variants = [
        paper_network(normalization, generator)
        for normalization, generator in zip(("none", "after", "before"), generators, strict=True)
    ]
    linears = [[layer for layer in variant if isinstance(layer, nn.Linear)] for variant in variants]
    for plain, after, before in zip(*linears, strict=True):
        assert torch.equal(plain.weight, after.weight)
        assert torch.equal(plain.bias, before.bias)
    orders = [torch.randperm(10, generator=generator) for generator in generators]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


def test_the_network_is_the_papers():
    generator = torch.Generator().manual_seed(0)
    shapes = [tuple(layer.weight.shape) for layer in paper_network("none", generator) if isinstance(layer, nn.Linear)]
    assert shapes == [(64, 784), (64, 64), (64, 64), (10, 64)]
    before, after = (paper_network(place, generator) for place in ("before", "after"))
    assert [type(layer).__name__ for layer in before[:3]] == ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(layer).__name__ for layer in after[:3]] == ["Linear", "ReLU", "BatchNorm1d"]
    assert before[1].eps == after[2].eps == 1e-3
    assert after[2].affine
    first = before[0]
    for drawn in (first.weight, first.bias):
        assert drawn.abs().max() <= 0.2
    # A normal variable cut at two standard deviations keeps 0.88 of its own.
    assert float(first.weight.detach().std()) == pytest.approx(0.088, rel=0.02)


def test_a_run_keeps_the_name_that_it_had_before():
    options = MlpOptions("mnist5k", "d5e5551dad158c3b", epochs=2, relfisher="0.1.0")
    assert MlpRun("mlp", "PLAIN+SGD", 0.1, 0, options).key == "mlp-PLAIN+SGD-lr0.1-seed0-50621fe45b77"


def test_every_method_has_as_many_learning_rates():
    assert list(METHODS) == [
        "PLAIN+SGD",
        "PLAIN+ADAM",
        "BNA+SGD",
        "BNA+ADAM",
        "BNB+SGD",
        "BNB+ADAM",
        "PLAIN+RNGD",
        "PLAIN+RNGD-DEFAULT",
    ]
    for method in METHODS.values():
        assert len(method.grid["lr"]) == 4
        assert list(method.grid["lr"]) == sorted(set(method.grid["lr"]))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_records_every_iteration_and_epoch(method):
    record = train(run(method, METHODS[method].grid["lr"][0]), silent)
    assert len(record.cost) == len(record.seconds) == 2 * 4
    assert len(record.validation) == 2
    assert np.isfinite(record.cost).all()
    assert (np.diff(record.seconds) > 0).all()
    assert not record.diverged


def test_sgd_is_the_textbook_loop(data):
    record = train(run("PLAIN+SGD", 0.1), silent)
    generator = torch.Generator().manual_seed(0)
    model = paper_network("none", generator)
    expected = []
    for _ in range(2):
        order = torch.randperm(230, generator=generator)
        for start in range(0, 200, 50):
            batch = order[start : start + 50]
            cost = nn.functional.cross_entropy(model(data.train_images[batch]), data.train_labels[batch])
            model.zero_grad()
            cost.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
            expected.append(cost.item())
    np.testing.assert_allclose(record.cost, expected, rtol=1e-5)
    full = nn.functional.cross_entropy(model(data.train_images), data.train_labels)
    assert record.full_cost == pytest.approx(full.item(), rel=1e-5)


def test_a_diverged_run_is_recorded_and_ends():
    reports = []
    record = train(run("PLAIN+SGD", 1e20, epochs=60), lambda fraction, cost: reports.append((fraction, cost)))
    assert record.diverged
    assert len(record.cost) < 60 * 4
    assert not math.isfinite(record.cost[-1])
    assert not math.isfinite(reports[-1][1])


def test_a_run_reports_how_far_it_is():
    reports = []
    record = train(run("PLAIN+SGD", 0.1, epochs=30), lambda *report: reports.append(report))
    assert [fraction for fraction, _ in reports] == pytest.approx([math.ceil(1.2 * k) / 120 for k in range(1, 101)])
    assert reports[-1][1] == pytest.approx(record.cost[-100:].mean(), rel=1e-5)


def test_warnings_are_kept_with_the_run(monkeypatch):
    class Loud(torch.optim.SGD):
        def step(self, closure=None):
            import warnings

            warnings.warn("the metric is singular", stacklevel=1)
            return super().step(closure)

    def loud(model, lr):
        return Loud(model.parameters(), lr=lr)

    monkeypatch.setitem(METHODS, "PLAIN+SGD", mlp.Peer(loud, {"lr": (0.1,)}))
    assert train(run("PLAIN+SGD", 0.1), silent).warnings == ("the metric is singular",)
