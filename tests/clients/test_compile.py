"""Compiled models: trained as eager ones, and compiled no more once the loop is warm."""

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
