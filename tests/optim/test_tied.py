"""Weights that are used outside their own module: heads tied to embeddings, in modules and in functions."""

import copy
import math

import pytest
import torch
from builders import assert_close_weights, assert_same_weights, inputs, learn, resumed, step, structures, train
from torch import nn

from relfisher import RNGD, MetricOptions, Preconditioner, TrustRegion, coverage, plan
from relfisher.observe import TiedWarning

TIES = {
    "linear": lambda model, h: nn.functional.linear(h, model.embed.weight),
    "transposed": lambda model, h: h @ model.embed.weight.t(),
    "property": lambda model, h: h @ model.embed.weight.T,
    "scaled": lambda model, h: nn.functional.linear(h, model.embed.weight * 0.5),
    "einsum": lambda model, h: torch.einsum("...i,oi->...o", h, model.embed.weight),
}


class Tied(nn.Module):
    """A language model whose head is the weight of its embedding, in a function."""

    def __init__(self, head):
        super().__init__()
        self.embed, self.hidden, self._head = nn.Embedding(9, 4), nn.Linear(4, 4), head

    def forward(self, tokens):
        return self._head(self, torch.tanh(self.hidden(self.embed(tokens))))


def tied(tie):
    torch.manual_seed(0)
    return Tied(TIES[tie])


@pytest.mark.parametrize("tie", TIES)
def test_weights_tied_in_functions_are_left_to_adamw(tie):
    model = tied(tie)
    tokens = torch.randint(9, (4, 5))
    twin = copy.deepcopy(model)
    optimizer, other = RNGD(model), RNGD(twin, metric=MetricOptions(structure={"embed": "fallback"}))
    with pytest.warns(TiedWarning, match="no metric for some layers: embed, tied: .* outside its own calls") as caught:
        learn(model, optimizer, tokens)
    assert len(caught) == 1
    learn(twin, other, tokens)
    assert_close_weights(model, twin)
    assert sorted(optimizer.state[model.embed.weight]) == ["exp_avg", "exp_avg_sq", "lead", "step"]
    rows = {row.name: row for row in coverage(model, tokens)}
    assert rows["embed.weight"].by == "adamw"
    assert rows["embed.weight"].reason.startswith("tied: ")
    assert rows["hidden.weight"].by == "metric"
    assert [row.name for row in plan(model, tokens)] == ["hidden"]


class Head(nn.Module):
    """A language model whose head is a module that has the weight of its embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.units(tokens))

    def units(self, tokens):
        return torch.tanh(self.hidden(self.embed(tokens)))


class Names(Head):
    """The same with a bias that the model names once more, as BERT does."""

    def __init__(self):
        super().__init__()
        self.bias = self.head.bias


class LooksUp(Head):
    """The same with a function in the embedding's place."""

    def __init__(self):
        super().__init__()
        del self.embed

    def units(self, tokens):
        return torch.tanh(self.hidden(nn.functional.embedding(tokens, self.head.weight)))


@pytest.mark.parametrize("model_class", [Head, Names, LooksUp])
def test_a_tied_head_moves_its_whole_gradient_along_the_metric_of_its_inputs(model_class):
    model, tokens = model_class().double(), torch.randint(9, (4, 5))
    weight, bias = model.head.weight, model.head.bias
    with torch.no_grad():
        x = torch.nn.functional.pad(model.units(tokens).flatten(0, 1), (0, 1), value=1.0)
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    gradient = torch.cat([each.reshape(9, -1) for each in torch.autograd.grad(loss, (weight, bias))], 1)
    metric = x.T @ x / len(x)
    damped = metric + 0.1 * metric.diagonal().mean() * torch.eye(5, dtype=torch.float64)
    expected = torch.cat([weight, bias.unsqueeze(1)], 1).detach() - 0.3 * gradient @ torch.linalg.inv(damped)
    learn(
        model,
        RNGD(model, lr=0.3, step_rule=TrustRegion(None), metric=MetricOptions(structure="shared")),
        tokens,
        steps=1,
    )
    torch.testing.assert_close(torch.cat([weight, bias.unsqueeze(1)], 1).detach(), expected)


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}])
def test_a_weight_is_left_to_adamw_where_looking_up_changes_it_or_its_gradient(options):
    class Changes(LooksUp):
        def units(self, tokens):
            return torch.tanh(self.hidden(nn.functional.embedding(tokens, self.head.weight, **options)))

    model, tokens = Changes(), torch.randint(9, (4, 5))
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning, match="head, tied: embedding uses its parameters outside its own calls"):
        learn(model, optimizer, tokens)
    assert sorted(optimizer.state[model.head.weight]) == ["exp_avg", "exp_avg_sq", "lead", "step"]


def test_a_bias_that_is_named_once_more_and_used_is_left_to_adamw():
    class Adds(Names):
        def forward(self, tokens):
            return super().forward(tokens) + self.bias

    model, tokens = Adds(), torch.randint(9, (4, 5))
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning, match="head, tied: add uses its parameters outside its own calls"):
        learn(model, optimizer, tokens)
    assert sorted(optimizer.state[model.bias]) == ["exp_avg", "exp_avg_sq", "lead", "step"]


def test_a_tied_head_is_covered_under_the_name_of_its_parameter():
    model, tokens = Head(), torch.randint(9, (4, 5))
    (row,) = (row for row in coverage(model, tokens) if row.name == "embed.weight")
    assert (row.by, row.subsystem) == ("metric", "head")
    assert all(each.by == "metric" for each in coverage(model, tokens))
    assert [each.name for each in plan(model, tokens)] == ["hidden", "head"]


@pytest.mark.parametrize("freeze", ["embed", "hidden"])
def test_a_run_with_a_tied_head_resumes(freeze):
    model, tokens = Head(), torch.randint(9, (4, 5))
    getattr(model, freeze).weight.requires_grad_(False)
    optimizer = RNGD(model)
    learn(model, optimizer, tokens)
    copied, again = copy.deepcopy((model, optimizer)), resumed(model, optimizer)
    for each, its in ((model, optimizer), copied, again):
        learn(each, its, tokens)
    assert_same_weights(model, copied[0], again[0])


def test_a_run_with_a_tied_weight_resumes():
    tokens = torch.randint(9, (4, 5))
    model = tied("linear")
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning):
        learn(model, optimizer, tokens)
    twin, other = resumed(model, optimizer)
    learn(model, optimizer, tokens)
    with pytest.warns(TiedWarning):
        learn(twin, other, tokens)
    assert_same_weights(model, twin)


def test_a_copy_of_a_model_with_a_tied_weight_learns_alike():
    model, tokens = tied("linear"), torch.randint(9, (4, 5))
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning):
        learn(model, optimizer, tokens)
    twin, other = copy.deepcopy((model, optimizer))
    learn(model, optimizer, tokens)
    learn(twin, other, tokens)
    assert_same_weights(model, twin)


def test_a_preconditioner_leaves_the_gradient_of_a_tied_weight():
    model = tied("linear")
    preconditioner = Preconditioner(model)
    with pytest.warns(TiedWarning):
        model(torch.randint(9, (4, 5))).square().mean().backward()
    before = [model.embed.weight.grad.clone(), model.hidden.weight.grad.clone()]
    preconditioner.step()
    assert torch.equal(model.embed.weight.grad, before[0])
    assert not torch.equal(model.hidden.weight.grad, before[1])


def test_looking_at_a_weight_ties_nothing():
    """Penalties, copies, casts and detached uses in the model's own code are no samples of the weight."""

    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x):
            weight = self.first.weight
            h = torch.tanh(self.first(x.to(weight.dtype)))
            frozen = nn.functional.linear(x, weight.detach()).mean()
            flat = torch.cat([weight.flatten(), self.second.weight.t().reshape(-1)])
            with torch.no_grad():
                weight.clamp_(-10, 10)
            return self.second(h) + 1e-3 * (weight.pow(2).sum() + flat.abs().sum() + frozen + weight.norm(dim=0).max())

    model = Penalised().double()
    optimizer = RNGD(model)
    step(model, optimizer, inputs())
    assert structures(optimizer).keys() == {"first", "second"}


def test_a_layer_whose_module_is_never_called_is_trained_all_the_same():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return self.second(torch.tanh(nn.functional.linear(x, self.first.weight, self.first.bias)))

    model = Functional().double()
    before = model.first.weight.detach().clone()
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning, match="first, tied: linear uses its parameters outside its own calls"):
        train(model, optimizer, 1)
    assert not torch.equal(model.first.weight, before)
    assert math.isfinite(train(model, optimizer, 5)[-1])
