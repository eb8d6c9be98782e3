"""Compiled models: trained as eager ones, and compiled no more once the loop is warm."""

import copy
import shutil

import pytest
import torch
from builders import normed_mlp, sentences
from torch import nn
from torch.nn.functional import cross_entropy, linear

from relfisher import RNGD, MetricOptions

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # dynamo looks at it itself

INDUCTOR = pytest.param(
    "inductor",
    marks=[
        pytest.mark.skipif(
            not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a C++ compiler"
        ),
        pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # its own
    ],
)


def network():
    return normed_mlp(16, torch.float32)


def losses(model, optimizer, steps):
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(32, 6, generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(model(x), x[:, :3].argmax(1))
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
@pytest.mark.parametrize("wrapped", [False, True], ids=["the model", "the compiled model"])
def test_nothing_is_compiled_again_after_warm_up(backend, wrapped):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    plain, model = network(), network()
    compiled = torch.compile(model, backend=counting)
    optimizer = RNGD(compiled if wrapped else model)
    fast, slow = losses(compiled, optimizer, 30), losses(plain, RNGD(plain), 30)
    found = [next(fast) for _ in range(7)]
    warm = len(graphs)
    found += fast
    assert 0 < warm == len(graphs)
    assert found == pytest.approx(list(slow), rel=1e-4)
    assert found[-1] < found[0] / 2


class Scored(nn.Module):
    """A model of words, with the weight of its embedding as its head in a function."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden = nn.Embedding(6, 5), nn.Linear(5, 5)

    def forward(self, words):
        return linear(torch.tanh(self.hidden(self.embed(words))), self.embed.weight).mT


def learned(model, optimizer, steps):
    for seed in range(steps):
        words = sentences(seed, 8, count=6)
        optimizer.zero_grad()
        loss = cross_entropy(model(words), words)
        loss.backward()
        optimizer.step()
        yield loss.item()


@pytest.mark.parametrize("wrapped", [False, True], ids=["the model", "the compiled model"])
def test_a_head_that_is_a_function_is_seen_in_a_compiled_model(wrapped):
    torch._dynamo.reset()
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph

    plain, model = Scored(), Scored()
    compiled = torch.compile(model, backend=counting)
    metric = MetricOptions(stats_interval=3)
    optimizer = RNGD(compiled if wrapped else model, metric=metric)
    fast, slow = learned(compiled, optimizer, 20), learned(plain, RNGD(plain, metric=metric), 20)
    found = [next(fast) for _ in range(9)]
    warm = len(graphs)
    assert found + list(fast) == pytest.approx(list(slow), rel=1e-4)
    assert 0 < warm == len(graphs)
    assert {each.name: each.role.is_head for each in optimizer.layers} == {"embed": True, "hidden": False}


def test_a_whole_graph_is_refused_by_dynamo():
    """The hooks that gather the metric break the graph; without the hooks there is nothing to break it."""
    torch._dynamo.reset()
    model = network()
    x = torch.randn(4, 6)
    with RNGD(model), pytest.raises(torch._dynamo.exc.Unsupported, match="Hook"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


class Kinds(nn.Module):
    """Layers of many kinds, one of which no pass reaches, and one that is frozen."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 10)
        self.attend = nn.TransformerEncoderLayer(2, 1, 4, 0.0, batch_first=True)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 4))
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.places = nn.Parameter(torch.zeros(5, 2))
        self.frozen, self.unused = nn.Linear(4, 4).requires_grad_(False), nn.Linear(3, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = self.attend(self.mix(x).view(-1, 5, 2) + self.places)
        h = torch.relu(self.norm(self.conv(self.normed(h).mT)))
        return self.head(self.frozen(h.mean(-1)))


def whole(model, backend="eager"):
    """Return a compiled model that must be one graph, and a list of an entry for each graph."""
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(len(graph.graph.nodes))
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return torch.compile(model, fullgraph=True, backend=counting), graphs


@pytest.mark.parametrize("backend", ["eager", "aot_eager", INDUCTOR])
def test_a_compiled_model_that_is_optimized_is_one_graph(backend):
    model = network()
    plain = copy.deepcopy(model)
    compiled, graphs = whole(model, backend)
    losses_of_both = losses(compiled, RNGD(compiled), 50), losses(plain, RNGD(plain), 50)
    assert list(losses_of_both[0]) == pytest.approx(list(losses_of_both[1]), rel=1e-4)
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:no part in the first step had unused")
@pytest.mark.parametrize("rule", ["spectral", "trust-region"])
def test_layers_of_all_kinds_are_observed_although_they_are_in_one_graph(rule):
    torch.manual_seed(0)
    model = Kinds().double()
    plain = copy.deepcopy(model)
    compiled, graphs = whole(model)
    one, two = RNGD(compiled, step_rule=rule), RNGD(plain, step_rule=rule)
    generator = torch.Generator().manual_seed(0)
    for _ in range(45):
        x = torch.randn(32, 6, generator=generator).double()
        for each, optimizer in ((compiled, one), (plain, two)):
            optimizer.zero_grad()
            cross_entropy(each(x), x[:, :3].argmax(1)).backward()
            optimizer.step()
    assert len(graphs) == 1
    assert [view.name for view in one.layers] == [view.name for view in two.layers]
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=1e-12, atol=1e-14)


def test_a_compiled_model_is_evaluated_at_the_average_and_trained_at_the_iterate():
    model = network()
    compiled, graphs = whole(model)
    optimizer = RNGD(compiled)
    list(losses(compiled, optimizer, 8))
    x = torch.randn(4, 6)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        compiled(x)
    assert all(torch.equal(average[name], value) for name, value in model.state_dict().items())
    for entered in (compiled, model):  # the model may be called as it is
        entered(x)
        assert optimizer.param_groups[0]["at_iterate"]
        with optimizer.average():
            torch.testing.assert_close(model[0].weight, average["0.weight"])
        optimizer._averaging.to_average()
    assert len(graphs) == 2


def test_a_pass_that_fails_leaves_the_compiler_as_it_was():
    model = network()
    compiled, graphs = whole(model)
    optimizer = RNGD(compiled)
    with pytest.raises(RuntimeError, match="shapes"):
        compiled(torch.randn(4, 5))
    other = torch.compile(nn.Linear(2, 2), backend=lambda graph, _: graphs.append(0) or graph.forward)
    other(torch.randn(1, 2))
    assert graphs == [0]
    list(losses(compiled, optimizer, 8))
    assert len(graphs) == 2
