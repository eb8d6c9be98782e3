"""What "auto" takes for the layers of a model while it trains, and how it learns what it needs for that."""

import pytest
import torch
from builders import average, batch, classified, mlp, step, structures
from reference import augment
from torch import nn
from torch.nn import functional

from relfisher import RNGD, MetricOptions
from relfisher.responses import Categorical


def squared(model, given):
    z = model(given[0])
    return functional.mse_loss(z, functional.one_hot(given[1], 3).to(z))


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU])
@pytest.mark.parametrize(("loss", "head"), [(classified, "kronecker"), (squared, "shared")])
def test_hidden_layers_have_two_layer_factors_and_a_softmax_head_its_own(activation, loss, head):
    model = mlp(activation)
    optimizer = RNGD(model, fit="plain")
    step(model, optimizer, batch(), loss)
    assert structures(optimizer) == {"0": "kronecker", "2": "kronecker", "4": head}


def test_a_layer_whose_gradient_the_metric_leaves_as_it_is_keeps_the_diagonal_alone():
    """By default those that read the raw input; of a metric that others ask for, all."""
    expected = {
        "diagonal": [{}, {"metric": MetricOptions(power={"first": 0.0})}],
        "kronecker": [{"fit": "plain"}, {"damping": {"first": 0.3}}, {"metric": MetricOptions(power={"first": 0.1})}],
        "shared": [{"metric": MetricOptions(structure={"0": "shared"})}],
    }
    for first, several in expected.items():
        for options in several:
            model = mlp()
            optimizer = RNGD(model, **options)
            step(model, optimizer, batch(), classified)
            assert structures(optimizer) == {"0": first, "2": "kronecker", "4": "kronecker"}


@pytest.mark.parametrize("structure", ["auto", "kronecker"])
def test_the_factors_are_those_of_equations_25_and_26(structure):
    """Of the hidden layers that of the next one, and of the head that of the categorical response that is seen."""
    model = mlp()
    optimizer = RNGD(model, fit="plain", metric=MetricOptions(structure=structure))
    x, y = batch()
    hidden = torch.tanh(model[0](x)).detach()
    last = torch.tanh(model[2](hidden)).detach()
    z = model[4](last).detach()
    weights = [model[2].weight.detach().clone(), model[4].weight.detach().clone()]
    step(model, optimizer, (x, y), classified)
    for place, units, weight in ((0, hidden, weights[0]), (2, last, weights[1])):
        slopes = torch.diag_embed(1 - units**2)
        expected = (slopes @ (weight.T @ weight) @ slopes).mean(0)
        torch.testing.assert_close(average(optimizer, model[place], "output"), expected)
    p = z.softmax(-1)
    softmax = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    torch.testing.assert_close(average(optimizer, model[4], "output"), softmax.mean(0))
    augmented = augment(last)
    torch.testing.assert_close(average(optimizer, model[4]), augmented.T @ augmented / len(x))


def test_the_response_of_a_seen_head_is_categorical():
    """Its own, and not that of a squared error, by which each unit says as much."""
    for loss, structure in ((classified, "auto"), (squared, "kronecker")):
        model = mlp()
        optimizer = RNGD(model, metric=MetricOptions(structure=structure))
        z = model(batch()[0]).detach()
        step(model, optimizer, batch(), loss)
        found = average(optimizer, model[4], "output")
        if loss is classified:
            torch.testing.assert_close(found, Categorical().operator(z).dense().mean(0))
        else:
            torch.testing.assert_close(found, torch.eye(3, dtype=torch.float64))


class WithLoss(nn.Module):
    """Scores its own outputs, as Hugging Face's models do."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x, y):
        logits = self.body(x).float()
        return {"loss": functional.cross_entropy(logits.view(-1, 3), y), "logits": logits}


def test_a_softmax_inside_the_model_is_seen():
    model = WithLoss()
    optimizer = RNGD(model, fit="plain")
    model(*batch())["loss"].backward()
    optimizer.step()
    assert set(structures(optimizer).values()) == {"kronecker"}


def test_a_head_is_trained_from_the_first_step_on_while_another_loss_waits():
    """Of two heads only one has a loss; the other is told once it has."""
    body, heads = nn.Linear(6, 4).double(), nn.ModuleList([nn.Linear(4, 3).double(), nn.Linear(4, 3).double()])
    model = nn.ModuleDict({"body": body, "heads": heads})
    model.forward = lambda x: [head(body(x)) for head in heads]
    optimizer = RNGD(model)
    x, y = batch()
    functional.cross_entropy(model(x)[0], y).backward()
    optimizer.step()
    assert structures(optimizer) == {"body": "shared", "heads.0": "kronecker"}
    optimizer.zero_grad()
    functional.mse_loss(model(x)[1], torch.ones(16, 3, dtype=x.dtype)).backward()
    before = heads[1].weight.detach().clone()
    optimizer.step()
    assert structures(optimizer)["heads.1"] == "shared"
    assert not torch.equal(heads[1].weight, before)


def test_a_next_layer_of_zeros_says_nothing_yet():
    model = mlp()
    with torch.no_grad():
        model[4].weight.zero_()
    optimizer = RNGD(model, metric=MetricOptions(refresh_interval=1, stats_interval=1))
    for seed in range(4):
        step(model, optimizer, batch(seed), classified)
    assert optimizer.health.failed_refreshes == 0
    assert not torch.equal(optimizer.state[model[2].weight]["output_root"], torch.eye(4, dtype=torch.float64))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
