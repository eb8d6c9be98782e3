"""Compiled models: trained as eager ones, and compiled no more once the loop is warm."""

import shutil

import pytest
import torch
from builders import normed_mlp
from torch.nn.functional import cross_entropy

from relfisher import RNGD

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


def test_a_whole_graph_is_refused_by_dynamo():
    """The hooks that gather the metric break the graph; without the hooks there is nothing to break it."""
    torch._dynamo.reset()
    model = network()
    x = torch.randn(4, 6)
    with RNGD(model), pytest.raises(torch._dynamo.exc.Unsupported, match="Hook"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))
