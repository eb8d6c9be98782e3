"""What "auto" takes for the layers of a model while it trains, and how it learns what it needs for that."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from relfisher import RNGD, information
from relfisher.responses import Categorical


def mlp(activation=nn.Tanh, seed=0, **options):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 5, **options), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 3)
    ).double()


def batch(seed=0, n=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, dtype=torch.float64, generator=generator)
    return x, torch.randint(3, (n,), generator=generator)


def step(model, optimizer, seed=0, loss=functional.cross_entropy):
    optimizer.zero_grad()
    x, y = batch(seed)
    loss(model(x), y).backward()
    optimizer.step()


def squared(z, y):
    return functional.mse_loss(z, functional.one_hot(y, 3).to(z))


def structures(optimizer):
    return {layer.name: layer.structure and layer.structure.name for layer in optimizer._place}


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU])
@pytest.mark.parametrize(("loss", "head"), [(functional.cross_entropy, "kronecker"), (squared, "shared")])
def test_hidden_layers_have_two_layer_factors_and_a_softmax_head_its_own(activation, loss, head):
    model = mlp(activation)
    optimizer = RNGD(model)
    step(model, optimizer, loss=loss)
    assert structures(optimizer) == {"0": "kronecker", "2": "kronecker", "4": head}


def test_the_factors_are_those_of_equations_25_and_26():
    model = mlp()
    optimizer = RNGD(model)
    x, y = batch()
    hidden = torch.tanh(model[0](x)).detach()
    last = torch.tanh(model[2](hidden)).detach()
    z = model[4](last).detach()
    weights = [model[2].weight.detach().clone(), model[4].weight.detach().clone()]
    functional.cross_entropy(model(x), y).backward()
    optimizer.step()

    def kept(place, name):
        state = optimizer.state[model[place].weight]
        return state[name] / state["mass"]

    for place, units, weight in ((0, hidden, weights[0]), (2, last, weights[1])):
        slopes = torch.diag_embed(1 - units**2)
        expected = (slopes @ (weight.T @ weight) @ slopes).mean(0)
        torch.testing.assert_close(kept(place, "output"), expected)
    p = z.softmax(-1)
    torch.testing.assert_close(kept(4, "output"), (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0))
    augmented = torch.cat([last, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    torch.testing.assert_close(kept(4, "metric"), augmented.T @ augmented / len(x))


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
    optimizer = RNGD(model)
    model(*batch())["loss"].backward()
    optimizer.step()
    assert set(structures(optimizer).values()) == {"kronecker"}


def test_gradients_that_are_not_finite_tell_nothing_yet():
    model = mlp()
    optimizer = RNGD(model)
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step(model, optimizer, loss=lambda z, y: functional.cross_entropy(z, y) * torch.inf)
    assert structures(optimizer)["4"] is None
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    step(model, optimizer)
    assert structures(optimizer)["4"] == "kronecker"


def test_two_forward_passes_before_the_gradients_flow():
    model, twin = mlp(), mlp()
    optimizer, other = RNGD(model), RNGD(twin)
    x, y = batch()
    halves = [functional.cross_entropy(model(rows), classes) for rows, classes in ((x[:4], y[:4]), (x[4:], y[4:]))]
    (sum(halves) / 2).backward()
    optimizer.step()
    step(twin, other)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_head_is_trained_from_the_first_step_on_while_another_loss_waits():
    """Of two heads only one has a loss; the other is told once it has."""
    body, heads = nn.Linear(6, 4).double(), nn.ModuleList([nn.Linear(4, 3).double(), nn.Linear(4, 3).double()])
    model = nn.ModuleDict({"body": body, "heads": heads})
    model.forward = lambda x: [head(body(x)) for head in heads]
    optimizer = RNGD(model)
    x, y = batch()
    functional.cross_entropy(model(x)[0], y).backward()
    optimizer.step()
    assert structures(optimizer) == {"body": "shared", "heads.0": "kronecker", "heads.1": None}
    optimizer.zero_grad()
    functional.mse_loss(model(x)[1], torch.ones(8, 3, dtype=x.dtype)).backward()
    before = heads[1].weight.detach().clone()
    optimizer.step()
    assert structures(optimizer)["heads.1"] == "shared"
    assert not torch.equal(heads[1].weight, before)


def test_a_next_layer_of_zeros_says_nothing_yet():
    model = mlp()
    with torch.no_grad():
        model[4].weight.zero_()
    optimizer = RNGD(model, refresh_interval=1, stats_interval=1)
    for seed in range(4):
        step(model, optimizer, seed)
    assert optimizer.health.failed_refreshes == 0
    assert not torch.equal(optimizer.state[model[2].weight]["output_inverse"], torch.eye(4, dtype=torch.float64))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_copy_reads_its_own_next_layer():
    model = mlp()
    optimizer = RNGD(model)
    step(model, optimizer)
    twin, other = copy.deepcopy((model, optimizer))
    for seed in range(1, 12):
        step(model, optimizer, seed)
        step(twin, other, seed)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_head_whose_gradients_have_become_rounding_resumes_as_a_softmax():
    model = mlp(nn.ReLU).float()
    optimizer = RNGD(model)
    x, y = (each.float() if each.is_floating_point() else each for each in batch())

    def go(net, by):
        by.zero_grad()
        functional.cross_entropy(net(x), y).backward()
        by.step()

    go(model, optimizer)
    twin = copy.deepcopy(model)
    with torch.no_grad():  # now certain of what is right
        for net in (model, twin):
            net[4].weight.zero_()
            net[4].bias.copy_(torch.tensor([0.0, -17.0, -17.0]))
    y.zero_()
    other = RNGD(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        go(model, optimizer)
        go(twin, other)
    assert structures(other)["4"] == "kronecker"
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_response_of_a_seen_head_is_categorical():
    model = mlp()
    optimizer = RNGD(model, structure="kronecker")
    step(model, optimizer)
    head = next(layer for layer in optimizer._place if layer.name == "4")
    z = torch.randn(2, 3, dtype=torch.float64)
    found = head.structure._information(z, head.response)
    assert isinstance(found, information.Information)
    torch.testing.assert_close(found.dense(), Categorical().operator(z).dense())
