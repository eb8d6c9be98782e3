"""The running metric of an optimizer, as the operator that the geometer has."""

import pytest
import torch
from builders import inputs, mlp, normed_mlp, squares, step, train
from torch import nn

from relfisher import RNGD, MetricOptions, Preconditioner, module_metric
from relfisher.responses import TanhBernoulli
from relfisher.structures import SharedBlock
from relfisher.testing import check_metric

KEPT = {"neuron": "exact", "shared": "exact for linear units", "diagonal": "", "kronecker": ""}


def one_batch(model, structure, x):
    """Return an optimizer whose metrics are those of one batch, taken before its step."""
    options = MetricOptions(structure=structure, stats_interval=1, stats_samples=None)
    optimizer = RNGD(model, lr=1e-12, metric=options)
    step(model, optimizer, x)
    return optimizer


@pytest.mark.parametrize("structure", KEPT)
def test_the_metric_of_one_batch_is_the_layers_own(structure):
    """Exact blocks equal the metric that `module_metric` finds by itself; the others are what they keep of it."""
    model, x = mlp(nn.Tanh, sizes=(6, 5, 3)), inputs()
    expected = module_metric(model, "0", x, TanhBernoulli() if structure == "neuron" else None)
    if structure == "neuron":
        expected = expected.to_dense()
    else:
        moments = module_metric(nn.Sequential(model[0]), "0", x).to_dense()  # I (x) mean x~ x~', linear units
        expected = torch.diag(moments.diagonal()) if structure == "diagonal" else moments
    start, weight = model[0](x).detach(), model[2].weight.detach().clone()
    metric = one_batch(model, structure, x).metric("0")
    check_metric(metric, None if structure == "kronecker" else expected)
    if structure == "kronecker":
        slope, after = 1 - start.tanh() ** 2, weight.T @ weight  # through the next layer, equation (26)
        expected = torch.kron(after * (slope.T @ slope) / len(x), moments[:7, :7])
        torch.testing.assert_close(metric.to_dense(), expected)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), torch.randn(3, 4, 5, 5, dtype=torch.float64)),
        (nn.LayerNorm(4), torch.randn(7, 4, dtype=torch.float64)),
        (nn.Linear(4, 2), torch.randn(5, 3, 4, dtype=torch.float64)),
    ],
    ids=["grouped convolution", "layer norm", "sequence"],
)
def test_groups_and_positions(layer, x):
    model = nn.Sequential(layer).double()
    expected = module_metric(model, "0", x).to_dense()
    check_metric(one_batch(model, "shared" if isinstance(layer, nn.Linear) else "auto", x).metric("0"), expected)


def test_it_measures_the_last_step_and_solves():
    model = mlp()
    optimizer = RNGD(model, metric=MetricOptions(structure="neuron"))
    train(model, optimizer, 5)
    before = torch.cat([model[0].weight, model[0].bias.unsqueeze(1)], 1).detach().clone()
    step(model, optimizer, inputs(9))
    moved = torch.cat([model[0].weight, model[0].bias.unsqueeze(1)], 1).detach() - before
    metric = optimizer.metric("0")
    dense = metric.to_dense()
    torch.testing.assert_close(metric.norm(moved), (moved.reshape(-1) @ dense @ moved.reshape(-1)).sqrt())
    damped = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
    torch.testing.assert_close(metric.solve(moved, 0.1).reshape(-1), torch.linalg.solve(damped, moved.reshape(-1)))
    assert metric.eigvalsh(2).shape == (2,)


def test_layers_say_what_is_known_of_them():
    model = normed_mlp()
    optimizer = RNGD(model)
    names = [layer.name for layer in optimizer.layers]
    assert names == ["0", "2", "3"]
    assert all(layer.role is None and layer.structure is None for layer in optimizer.layers)
    step(model, optimizer, inputs())
    first, norm, last = optimizer.layers
    assert first.role.response == TanhBernoulli()
    assert first.role.reads_input
    assert not norm.role.reads_input
    assert last.role.is_head is False
    assert {layer.group for layer in optimizer.layers} == {0}
    assert all(layer.structure is not None for layer in optimizer.layers)


def test_a_preconditioner_has_the_same_metric():
    one, two = mlp(), mlp()
    optimizer = RNGD(one, lr=1e-12, metric=MetricOptions(structure=SharedBlock()))
    preconditioner = Preconditioner(two, metric=MetricOptions(structure=SharedBlock()))
    step(one, optimizer, inputs())
    squares(two, inputs()).backward()
    preconditioner.step()
    torch.testing.assert_close(optimizer.metric("2").to_dense(), preconditioner.metric("2").to_dense())


def test_names_and_empty_metrics_are_named():
    model = mlp()
    optimizer = RNGD(model)
    with pytest.raises(ValueError, match="name must be a layer with a metric, such as '0', '2', '4'; got 'first'"):
        optimizer.metric("first")
    with pytest.raises(ValueError, match="the layer '0' has no statistics yet"):
        optimizer.metric("0")
