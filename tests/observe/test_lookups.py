"""A matrix of which a module of any class looks up rows has the metric of an embedding."""

import copy
from dataclasses import replace

import pytest
import torch
from builders import assert_same_weights, predicted, resumed, sentences, step
from torch import nn
from torch.autograd.functional import jacobian
from torch.nn import functional
from torch.testing import assert_close

from relfisher import RNGD, MetricOptions, coverage, plan
from relfisher.layers import discover
from relfisher.observe import TiedWarning, UncoveredWarning, metric_of, observe
from relfisher.responses import LinearGaussian, TanhBernoulli

SOON = MetricOptions(stats_interval=2, refresh_interval=4, stagger=False)
TOKENS, UNITS, LENGTH = 9, 4, 5


class Raw(nn.Module):
    """A model of sentences with a bare table, of which a function looks up rows."""

    def __init__(self, look_up, activation=torch.tanh):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Parameter(torch.randn(TOKENS, UNITS, generator=generator))
        self.hidden = nn.Linear(UNITS, TOKENS)
        nn.init.trunc_normal_(self.hidden.weight, generator=generator)
        nn.init.zeros_(self.hidden.bias)
        self.look_up, self.activation = look_up, activation
        self.double()

    def forward(self, tokens):
        return self.hidden(self.activation(self.look_up(tokens, self.table)))


class Embedded(Raw):
    """The same with an embedding."""

    def __init__(self, **options):
        super().__init__(None)
        table = self.table
        del self.table
        hidden = self.hidden
        del self.hidden
        self.embed, self.hidden = nn.Embedding(TOKENS, UNITS, **options), hidden
        self.embed.weight = table

    def forward(self, tokens):
        return self.hidden(torch.tanh(self.embed(tokens)))


LOOKUPS = {
    "embedding": lambda tokens, table: functional.embedding(tokens, table),
    "embedding with padding": lambda tokens, table: functional.embedding(tokens, weight=table, padding_idx=-7),
    "an index": lambda tokens, table: table[tokens],
    "an index from the end": lambda tokens, table: table[tokens - TOKENS],
    "an index of 32 bits": lambda tokens, table: table[tokens.int()],
    "index_select": lambda tokens, table: table.index_select(0, tokens.flatten()).view(*tokens.shape, UNITS),
    "rows that are looked at": lambda tokens, table: table[tokens].view(len(tokens), table[tokens].size(1), -1),
}


def predicting(model, steps=range(12), optimizer=None, **options):
    optimizer = optimizer or RNGD(model, **{"metric": SOON, **options})
    for seed in steps:
        step(model, optimizer, sentences(seed, n=4, count=TOKENS), predicted)
    return optimizer


def by_adamw(optimizer, parameter):
    return optimizer.state[parameter].keys() >= {"exp_avg", "exp_avg_sq"}


def embedding_like(way):
    return Embedded(padding_idx=TOKENS - 7 if "padding" in way else None)


@pytest.mark.supports("rows that a module of any class looks up in a matrix: `F.embedding`, an index", "Embedding")
@pytest.mark.parametrize("way", LOOKUPS)
def test_a_table_takes_the_steps_of_an_embedding(way):
    model, other = Raw(LOOKUPS[way]), embedding_like(way)
    optimizer, its = predicting(model), predicting(other)
    assert_close(model.table, other.embed.weight, rtol=0, atol=1e-12)
    assert_close(model.hidden.weight, other.hidden.weight, rtol=0, atol=1e-12)
    assert [(each.name, each.role) for each in optimizer.layers] == [
        (name, each.role) for name, each in zip(("table", "hidden"), its.layers, strict=True)
    ]
    assert_close(optimizer.metric("table").to_dense(), its.metric("embed").to_dense(), rtol=0, atol=1e-12)


def test_another_order_of_arguments_is_another_function():
    with pytest.warns(UncoveredWarning, match="does not look up its rows"):
        predicting(Raw(lambda tokens, table: torch.embedding(weight=table, indices=tokens)), range(2))


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it itself
def test_a_compiled_model_takes_the_same_steps():
    model, other = Raw(LOOKUPS["an index"]), Embedded()
    model.compile(backend="eager")
    predicting(model), predicting(other)
    assert_close(model.table, other.embed.weight, rtol=0, atol=1e-12)


def test_transforms_of_torch_func_pass_by():
    model = Raw(LOOKUPS["an index"])
    optimizer = RNGD(model)
    tokens = sentences(n=4, count=TOKENS)
    assert torch.func.vmap(model)(tokens).shape == (4, LENGTH, TOKENS)
    values = {name: each.detach() for name, each in model.named_parameters()}
    slopes = torch.func.jacrev(lambda given: torch.func.functional_call(model, given, (tokens,)))(values)
    assert slopes["table"].shape == (4, LENGTH, TOKENS, TOKENS, UNITS)
    predicting(model, range(3), optimizer)
    assert not by_adamw(optimizer, model.table)


@pytest.mark.parametrize("structure", ["auto", "neuron", "shared of its own"])
@pytest.mark.parametrize("samples", [7, None])
def test_it_has_the_structures_of_an_embedding(structure, samples):
    model, other = Raw(LOOKUPS["an index"]), Embedded()
    for each, name in ((model, "table"), (other, "embed")):
        rules = {name: "shared"} if structure == "shared of its own" else structure
        predicting(each, metric=replace(SOON, structure=rules, stats_samples=samples))
    assert_close(model.table, other.embed.weight, rtol=0, atol=1e-12)


@pytest.mark.parametrize("response", [LinearGaussian(), TanhBernoulli()], ids=["linear", "tanh"])
@pytest.mark.parametrize("way", ["embedding", "an index", "index_select"])
def test_the_metric_is_that_of_the_rows(way, response):
    model = Raw(LOOKUPS[way], torch.tanh if response == TanhBernoulli() else nn.Identity())
    tokens = sentences(n=4, count=TOKENS)
    optimizer = RNGD(model, metric=SOON)
    table = model.table.detach().clone()
    z = table[tokens].flatten()
    slopes = jacobian(lambda w: LOOKUPS[way](tokens, w), table).reshape(len(z), TOKENS, UNITS).mT.flatten(1)
    step(model, optimizer, tokens, predicted)
    assert optimizer.layers[0].role.response == response
    of_linear_units = slopes.T @ slopes / tokens.numel()
    assert_close(optimizer.metric("table").to_dense(), of_linear_units, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        model.table.copy_(table)
    weights = torch.ones_like(z) if response == LinearGaussian() else 1 - torch.tanh(z).square()
    expected = slopes.T @ (weights.unsqueeze(1) * slopes) / tokens.numel()
    layer = next(each for each in discover(model).layers if each.name == "table")
    found = metric_of(layer, observe(model, {"table": layer}, tokens)["table"])
    assert_close(found.to_dense(), expected, rtol=1e-12, atol=1e-12)


def test_it_is_covered_and_planned_as_it_is_trained():
    model, tokens = Raw(LOOKUPS["an index"]), sentences(n=4, count=TOKENS)
    assert {each.by for each in coverage(model, tokens, metric=SOON)} == {"metric"}
    mine, other = (plan(each, tokens, metric=SOON) for each in (model, Embedded()))
    assert [(each.name, each.samples) for each in mine] == [("table", 20), ("hidden", 20)]
    assert [replace(each, name="") for each in mine] == [replace(each, name="") for each in other]


@pytest.mark.parametrize("steps", [0, 5])
def test_a_run_with_it_resumes_bitwise(steps):
    model = Raw(LOOKUPS["an index"])
    optimizer = predicting(model, range(steps))
    copied, again = copy.deepcopy((model, optimizer)), resumed(model, optimizer, metric=SOON)
    for each, its in ((model, optimizer), copied, again):
        predicting(each, range(steps, 12), its)
    assert_same_weights(model, copied[0], again[0])
    assert not by_adamw(optimizer, model.table)


def test_a_mask_keeps_positions_out_of_it():
    model, other = Raw(LOOKUPS["an index"]), Embedded()
    mask = torch.arange(LENGTH).expand(4, -1) < torch.tensor([[5], [3], [4], [1]])
    metrics = []
    for each in (model, other):
        optimizer = RNGD(each, metric=SOON)
        tokens = sentences(n=4, count=TOKENS)
        with optimizer.masked(mask):
            step(each, optimizer, tokens, predicted)
        metrics.append(optimizer.metric(optimizer.layers[0].name).to_dense())
    assert_close(*metrics, rtol=0, atol=1e-12)


class Sum(nn.Module):
    """Rows of a table in a sum, a product, or beside data; with an embedding or without."""

    def __init__(self, function, *, raw, width=UNITS):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(UNITS, UNITS), nn.Linear(width, TOKENS)
        self.positions = nn.Parameter(torch.randn(LENGTH, UNITS))
        self.embed = nn.Embedding(TOKENS, UNITS)
        if raw:
            table = self.embed.weight
            del self.embed
            self.embed = table
        self.raw, self.function = raw, function
        self.double()

    def forward(self, tokens):
        x = functional.one_hot(tokens % UNITS, UNITS).double()

        def rows():
            return self.embed[tokens] if self.raw else self.embed(tokens)

        return self.head(torch.tanh(self.function(rows, lambda: self.body(x), self.positions)))


SUMS = {
    "with positions": lambda rows, _, positions: rows() + positions,
    "with rows of positions": lambda rows, _, positions: rows() + positions[torch.arange(LENGTH)],
    "with rows of positions, in place": lambda rows, _, positions: rows().add_(positions[torch.arange(LENGTH)]),
    "with data": lambda rows, x, positions: x() + rows() + positions,
    "a product with data": lambda rows, x, positions: x() * rows() + positions,
    "scaled": lambda rows, _, positions: 2 * rows() + positions,
    "several uses": lambda rows, _, positions: rows() + positions + rows().flip(0),
}


@pytest.mark.parametrize("way", SUMS)
@pytest.mark.filterwarnings("ignore:no part in the first step:UserWarning", "ignore:linear response:UserWarning")
def test_rows_in_the_shape_of_data_are_those_of_an_embedding(way):
    model, other = (Sum(SUMS[way], raw=raw) for raw in (True, False))
    optimizer, its = predicting(model), predicting(other)
    assert_close(model.embed, other.embed.weight, rtol=0, atol=1e-12)
    assert_close(model.positions, other.positions, rtol=0, atol=1e-12)
    assert not by_adamw(optimizer, model.embed)
    assert_close(*(each.metric("positions").to_dense() for each in (optimizer, its)), rtol=0, atol=1e-12)
    assert optimizer.metric("positions").parameter_shape == (LENGTH * UNITS, 1, 1)
    assert {each.name: each.role for each in optimizer.layers} == {each.name: each.role for each in its.layers}


def test_rows_beside_data_are_those_of_an_embedding():
    def beside(rows, x, positions):
        return torch.cat([rows(), x() + positions], -1)

    model, other = (Sum(beside, raw=raw, width=2 * UNITS) for raw in (True, False))
    predicting(model), predicting(other)
    assert_close(model.embed, other.embed.weight, rtol=0, atol=1e-12)


class Returned(nn.Module):
    """A table with nothing behind it in its own module."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, tokens):
        return self.table[tokens]


def test_rows_that_a_module_returns_are_those_of_an_embedding():
    other = Embedded()
    model = nn.Sequential(Returned(copy.deepcopy(other.embed.weight)), nn.Tanh(), copy.deepcopy(other.hidden))
    optimizer, its = predicting(model), predicting(other)
    assert_close(model[0].table, other.embed.weight, rtol=0, atol=1e-12)
    assert [each.role for each in optimizer.layers] == [each.role for each in its.layers]


class Scores(nn.Module):
    """A head that is given the table."""

    def forward(self, h, table):
        return h @ table.T


class Tied(nn.Module):
    """A table that is also a head, by a function: of its own module, or of one that takes what its module has made."""

    def __init__(self, *, apart):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden = Returned(nn.Parameter(torch.randn(TOKENS, UNITS))), nn.Linear(UNITS, UNITS)
        self.apart, self.scores = apart, Scores()
        if not apart:
            table = self.embed.table
            del self.embed
            self.table = table
        self.double()

    def forward(self, tokens):
        if self.apart:
            return self.scores(torch.tanh(self.hidden(self.embed(tokens))), self.embed.table)
        return self.scores(torch.tanh(self.hidden(self.table[tokens])), self.table)


@pytest.mark.parametrize("apart", [False, True])
def test_a_table_that_is_a_head_as_well_is_left_to_adamw_which_says_what_to_write(apart):
    model = Tied(apart=apart)
    warning, said = (
        (TiedWarning, r"embed\.table, tied: .* outside its own calls: use nn.Embedding")
        if apart
        else (UncoveredWarning, "table, its module does not only look up its rows: use nn.Embedding")
    )
    with pytest.warns(warning, match=said) as caught:
        optimizer = predicting(model)
    assert len(caught) == 1
    assert by_adamw(optimizer, model.embed.table if apart else model.table)
    rows = {each.name: each for each in coverage(model, sentences(count=TOKENS))}
    row = rows["embed.table" if apart else "table"]
    assert row.by == "adamw"
    assert "use nn.Embedding" in row.reason


@pytest.mark.parametrize(
    "look_up",
    [
        lambda tokens, table: functional.embedding(tokens, table, max_norm=1.0),
        lambda tokens, table: functional.embedding(tokens, table, scale_grad_by_freq=True),
        lambda tokens, table: functional.embedding(tokens, 2 * table),
        lambda tokens, table: table[tokens, :],
        lambda tokens, table: functional.embedding_bag(tokens, table).unsqueeze(1).expand(-1, LENGTH, -1),
    ],
    ids=["max_norm", "scale_grad_by_freq", "computed", "several indices", "bags"],
)
def test_other_lookups_are_left_to_adamw(look_up):
    model = Raw(look_up)
    with pytest.warns(UncoveredWarning, match="does not look up its rows, multiply inputs by it or add it to them"):
        optimizer = predicting(model, range(2))
    assert by_adamw(optimizer, model.table)
