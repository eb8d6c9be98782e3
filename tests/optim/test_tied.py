"""Weights that are used outside their own module: heads tied to embeddings, in modules and in functions."""

import copy
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from builders import (
    assert_close_weights,
    assert_same_weights,
    by_name,
    inputs,
    learn,
    predicted,
    resumed,
    sentences,
    step,
    structures,
    train,
)
from torch import nn

from relfisher import RNGD, MetricOptions, Preconditioner, TrustRegion, coverage, plan
from relfisher.observe import TiedWarning


class Tied(nn.Module):
    """A language model whose head is the weight of its embedding, in a function."""

    def __init__(self, head):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self._head = nn.Embedding(9, 4), nn.Linear(4, 4), head

    def forward(self, tokens):
        return self._head(torch.tanh(self.hidden(self.embed(tokens))), self.embed.weight)


class Module(Tied):
    """The same with a module that has the weight of the embedding."""

    def __init__(self, times=1):
        super().__init__(None)
        self.head, self._times = nn.Linear(4, 9, bias=False), times
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = torch.tanh(self.hidden(self.embed(tokens)))
        return self.head(h) if self._times == 1 else torch.cat([self.head(part) for part in h.chunk(self._times)])


class Inside(Tied):
    """The function in a module of its own, which is given the weight."""

    class Scores(nn.Module):
        def __init__(self, head):
            super().__init__()
            self._head = head

        def forward(self, h, weight):
            return self._head(h, weight)

    def __init__(self, head):
        super().__init__(None)
        self.scores = self.Scores(head)

    def forward(self, tokens):
        return self.scores(torch.tanh(self.hidden(self.embed(tokens))), self.embed.weight)


HEADS = {
    "linear": nn.functional.linear,
    "transposed": lambda h, weight: h @ weight.t(),
    "property": lambda h, weight: h @ weight.T,
    "einsum": lambda h, weight: torch.einsum("...i,oi->...o", h, weight),
    "twice": lambda h, weight: torch.cat([part @ weight.T for part in h.chunk(2)]),
}
# What else a model may do with the table, so that it has no metric.
OTHERS = {
    "scaled": lambda h, weight: nn.functional.linear(h, weight * 0.5),
    "normalized": lambda h, weight: h @ nn.functional.normalize(weight, dim=-1).T,
    "distances": lambda h, weight: -torch.cdist(h, weight.expand(len(h), -1, -1)),
    "mixed": lambda h, weight: torch.softmax(h @ weight.T, -1) @ weight @ weight.T,
    "squared": lambda h, weight: h @ (weight.T @ weight) @ weight.T,
    "both": lambda h, weight: h @ weight.T + weight.sum(-1),
    "parts": lambda h, weight: torch.cat([h @ weight[:5].T, h @ weight[5:].T], -1),
}
SOON = MetricOptions(stats_interval=2, refresh_interval=4, stagger=False)


def tied(head, model_class=Tied):
    return model_class((HEADS | OTHERS)[head]).double()


def predicting(model, steps=range(12), optimizer=None, loss=predicted, **options):
    optimizer = optimizer or RNGD(model, **{"metric": SOON, **options})
    for seed in steps:
        step(model, optimizer, sentences(seed, n=4, count=9), loss)
    return optimizer


def by_adamw(optimizer, parameter):
    return sorted(optimizer.state[parameter]) == ["exp_avg", "exp_avg_sq", "lead", "step"]


@pytest.mark.supports("a head that multiplies by the weight of an embedding in a function", "Linear")
@pytest.mark.parametrize("model_class", [Tied, Inside])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_that_is_a_function_takes_the_steps_of_a_module(head, model_class):
    model, other = tied(head, model_class), Module(1 + (head == "twice")).double()
    optimizer, its = predicting(model), predicting(other)
    assert_close_weights(model, other, rtol=0, atol=1e-12)
    mine, module = ({each.name: each for each in optimizer.layers} for optimizer in (optimizer, its))
    role = module["head"].role
    assert mine["embed"].role == replace(role, following=None)
    assert role.is_head
    assert type(mine["embed"].structure) is type(module["head"].structure)
    torch.testing.assert_close(optimizer.metric("embed").to_dense(), its.metric("head").to_dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("structure", ["shared", "kronecker", "neuron", "diagonal"])
@pytest.mark.parametrize("options", [{}, {"stats_samples": 7}, {"stats_samples": None}])
def test_it_has_the_structures_of_a_module(structure, options):
    metric = MetricOptions(structure=structure, **options)
    model, other = tied("linear"), Module().double()
    predicting(model, metric=metric), predicting(other, metric=metric)
    assert_close_weights(model, other, rtol=0, atol=1e-12)


def test_it_is_covered_and_planned_as_it_is_trained():
    model, tokens = tied("linear"), sentences(n=4, count=9)

    def loss(z):
        return nn.functional.cross_entropy(z.flatten(0, 1), tokens.flatten())

    assert {each.by for each in coverage(model, tokens, metric=SOON, loss=loss)} == {"metric"}
    mine, other = (plan(each, tokens, metric=SOON, loss=loss) for each in (model, Module().double()))
    assert [(each.name, each.samples) for each in mine] == [("hidden", 20), ("embed", 20)]
    assert [replace(each, name="") for each in mine] == [replace(each, name="") for each in other]
    optimizer = predicting(model)
    held = {
        each.name: each.structure.label(shape) for each, shape in zip(optimizer.layers, [(9, 4), (4, 5)], strict=True)
    }
    assert held == {each.name: each.chosen.structure for each in mine}


@pytest.mark.parametrize("steps", [0, 5])
def test_a_run_with_it_resumes_bitwise(steps):
    model = tied("property")
    optimizer = predicting(model, range(steps))
    copied, again = copy.deepcopy((model, optimizer)), resumed(model, optimizer, metric=SOON)
    for each, its in ((model, optimizer), copied, again):
        predicting(each, range(steps, 12), its)
    assert_same_weights(model, copied[0], again[0])
    loaded = resumed(model, optimizer, metric=SOON)[1]  # once more, before a pass
    assert all(
        torch.equal(value, optimizer.state[model.embed.weight][key])
        for key, value in by_name(loaded)["embed.weight"].items()
    )


def test_a_table_with_the_metric_of_an_embedding_alone_is_not_loaded_into_it():
    model = tied("linear")
    optimizer = RNGD(model, metric=SOON)
    model._head = lambda h, weight: h @ torch.ones_like(weight.detach()).T
    predicting(model, range(3), optimizer)
    twin, again = resumed(model, optimizer, metric=SOON)
    twin._head = HEADS["linear"]
    with pytest.raises(ValueError, match=r"the loaded metric of '(embed|hidden)' has the shapes"):
        predicting(twin, range(3, 5), again)


@pytest.mark.parametrize("head", OTHERS)
def test_other_uses_of_a_table_are_left_to_adamw(head):
    model = tied(head)
    twin = copy.deepcopy(model)
    with pytest.warns(TiedWarning, match="embed, tied: .* outside its own calls: make the head a Linear") as caught:
        optimizer = predicting(model)
    assert len(caught) == 1
    predicting(twin, metric=replace(SOON, structure={"embed": "fallback"}))
    assert_close_weights(model, twin)
    assert by_adamw(optimizer, model.embed.weight)
    rows = {row.name: row for row in coverage(model, sentences(count=9))}
    assert rows["embed.weight"].by == "adamw"
    assert rows["embed.weight"].reason.startswith("tied: ")
    assert rows["hidden.weight"].by == "metric"
    assert [row.name for row in plan(model, sentences(count=9))] == ["hidden"]
    again, other = resumed(model, optimizer, metric=SOON)
    predicting(model, range(3), optimizer)
    with pytest.warns(TiedWarning):
        predicting(again, range(3), other)
    assert_same_weights(model, again)


def test_a_mask_keeps_padding_out_of_it():
    model, other = tied("linear"), Module().double()
    mask = torch.arange(5).expand(4, 5) < torch.tensor([[5], [3], [4], [1]])
    for each in (model, other):
        optimizer = RNGD(each, metric=SOON)
        for seed in range(5):
            with optimizer.masked(mask):
                step(each, optimizer, sentences(seed, n=4, count=9), predicted)
    assert_close_weights(model, other, rtol=0, atol=1e-12)


def test_a_frozen_table_becomes_a_head_once_it_is_trained():
    model, other = tied("linear"), Module().double()
    for each in (model, other):
        each.embed.weight.requires_grad_(False)
        optimizer = predicting(each, range(4))
        each.embed.weight.requires_grad_(True)
        predicting(each, range(4, 12), optimizer)
    assert_close_weights(model, other, rtol=0, atol=1e-12)


def test_parts_that_are_called_by_themselves_have_it():
    class Decodes(nn.Module):
        def __init__(self, embed):
            super().__init__()
            self.embed, self.first = embed, nn.Linear(4, 4)

        def forward(self, h):
            return nn.functional.linear(torch.tanh(self.first(h)), self.embed.weight)

    class Encodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.encode, self.decode = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), Decodes(self.embed)

    model = Encodes()
    optimizer = RNGD(model, metric=SOON)
    for seed in range(5):
        step(
            model,
            optimizer,
            sentences(seed, n=4, count=9),
            lambda m, x: predicted(lambda t: m.decode(m.encode(m.embed(t))), x),
        )
    assert {each.name: each.role.is_head for each in optimizer.layers}["embed"]
    assert not any("exp_avg" in state for state in optimizer.state.values())


def test_nothing_watches_a_pass_that_needs_no_statistics():
    seen = []

    def head(h, weight):
        seen.append(len(torch.overrides._get_current_function_mode_stack()))
        return nn.functional.linear(h, weight)

    model = Tied(head)
    optimizer = predicting(model, range(7), metric=MetricOptions(stats_interval=4, stagger=False))
    due = [0, *(at for at in range(1, 7) if optimizer._curvature._schedule.statistics_due(at, 0, 1))]
    assert 1 < len(due) < 7
    assert seen == [2 if at == 0 else int(at in due) for at in range(7)]  # the first pass is traced, too
    optimizer._curvature.advance(4 * 7)
    model.eval()
    with torch.no_grad():
        model(sentences(count=9))
    assert seen[-1] == 0


def test_an_error_leaves_nothing_behind():
    def fails(*_):
        raise KeyboardInterrupt if model.interrupted else ValueError

    model, twin = tied("linear"), tied("linear")
    optimizers = RNGD(model, metric=SOON), RNGD(twin, metric=SOON)
    for seed in range(4):
        for model.interrupted in (True, False):
            model._head = fails
            with pytest.raises((ValueError, KeyboardInterrupt)):
                model(sentences(seed, n=4, count=9))
            model._head = HEADS["linear"]
            for each, optimizer in zip((model, twin), optimizers, strict=True):
                predicting(each, [seed], optimizer)
            assert not torch.overrides._get_current_function_mode_stack()
    assert_same_weights(model, twin)


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
    assert by_adamw(optimizer, model.head.weight)


def test_a_bias_that_is_named_once_more_and_used_is_left_to_adamw():
    class Adds(Names):
        def forward(self, tokens):
            return super().forward(tokens) + self.bias

    model, tokens = Adds(), torch.randint(9, (4, 5))
    optimizer = RNGD(model)
    with pytest.warns(TiedWarning, match="head, tied: add uses its parameters outside its own calls"):
        learn(model, optimizer, tokens)
    assert by_adamw(optimizer, model.bias)


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


@pytest.mark.parametrize("head", ["linear", "scaled"])
def test_a_preconditioner_changes_the_gradient_of_a_head_alone(head):
    model, other = tied(head), Module().double()
    tokens = sentences(n=4, count=9)
    mine, its = Preconditioner(model), Preconditioner(other)
    with nullcontext() if head == "linear" else pytest.warns(TiedWarning):
        predicted(model, tokens).backward()
    predicted(other, tokens).backward()
    before = model.embed.weight.grad.clone()
    mine.step(), its.step()
    if head == "linear":
        torch.testing.assert_close(model.embed.weight.grad, other.embed.weight.grad, rtol=0, atol=1e-12)
    assert torch.equal(model.embed.weight.grad, before) == (head == "scaled")


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
