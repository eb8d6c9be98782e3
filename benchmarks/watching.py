"""Measure what the hooks and modes that watch a model cost, beside the same passes of a model without an optimizer.

    python benchmarks/watching.py [--out results/watching]

Four small models with the weights of a trained optimizer. Each pass takes turns with that of a copy without hooks, and
the ratio is the median over the turns; processor time, one thread. In brackets stand the Python functions that a pass
calls more than the copy's, which do not depend on the machine. The passes are: with gradients, forward and backward,
on a step that collects nothing; forward, on a step that collects statistics of all layers, with and without taking
them; and forward in evaluation, in `inference_mode`, with a batch of one. The last column is the forward pass of the
copy inside of a mode of torch that does nothing.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from tables import tell
from torch import nn
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from relfisher import RNGD
from relfisher.studies.report import markdown

sys.path.insert(0, str(Path(__file__).parent / "programs"))
import llama
import vit

TURNS, SECONDS, STEPS = 41, 0.02, 40


def perceptron():
    """Return a network of three linear layers."""
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def convolutions():
    """Return a network of three convolutions with batch norms."""
    widths = [(3, 16, 1), (16, 32, 2), (32, 64, 2)]
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b, stride in widths
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


# The model, inputs for a number of samples, and the batch. The last two have norms, heads and tokens as functions.
MODELS = {
    "perceptron 16-32-32-4": (perceptron, lambda n: torch.randn(n, 16), 64),
    "3 convolutions of 32 x 32 pixels": (convolutions, lambda n: torch.randn(n, 3, 32, 32), 32),
    "llama of the programs": (llama.Network, lambda n: torch.randint(128, (n, llama.LENGTH)), llama.BATCH),
    "vision transformer of the programs": (vit.Network, lambda n: torch.randn(n, 28 * 28), 32),
}


class Idle(TorchFunctionMode):
    """Does nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Call the function."""
        return func(*args, **(kwargs or {}))


def loss_of(output):
    """Return a loss of logits [*, classes]."""
    rows = output.flatten(0, -2)
    return cross_entropy(rows, torch.arange(len(rows)) % rows.shape[1])


def trained(make, draw, batch):
    """Return a model that is watched, its observer, and a copy without an optimizer."""
    torch.manual_seed(0)
    model = make()
    optimizer = RNGD(model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model(draw(batch))).backward()
        optimizer.step()
    bare = make()
    bare.load_state_dict(model.state_dict())
    return optimizer, model, bare


def seconds(run, times):
    """Return the processor time of a pass, as a mean."""
    start = time.process_time()
    for _ in range(times):
        run()
    return (time.process_time() - start) / times


def calls(run):
    """Return how many Python functions a pass calls."""
    found = 0

    def count(_, event, __):
        nonlocal found
        found += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found


def compared(watched, bare):
    """Return the median ratio of two passes that take turns, and the Python calls that one has more."""
    watched(), bare()
    more = calls(watched) - calls(bare)
    times = max(1, round(SECONDS / seconds(bare, 3)))
    ratios = [seconds(watched, times) / seconds(bare, times) for _ in range(TURNS)]
    return statistics.median(ratios), more


def measured(make, draw, batch):
    """Return the ratios of a model's passes."""
    optimizer, model, bare = trained(make, draw, batch)
    observer = optimizer._curvature.observer
    x, one = draw(batch), draw(1)

    def both(net):
        loss_of(net(x)).backward()

    def forward(net):
        net(x)
        observer.drop()

    def alone(net):
        with torch.inference_mode():
            net(one)

    def pair(run):
        return compared(lambda: run(model), lambda: run(bare))

    observer.due = set()
    rows = [pair(both)]
    observer.due = {layer.module for layer in observer.roles}
    rows.append(pair(forward))
    observer._observe = observer._operations._see = lambda *_: None  # watch, and take nothing
    rows.insert(1, pair(forward))
    model.eval(), bare.eval()
    rows.append(pair(alone))
    bare.train()

    def idle():
        with Idle():
            bare(x)

    return [*rows, compared(idle, lambda: bare(x))]


def main() -> None:
    """Measure, and print a table."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    header = ["", "collects nothing", "collects, but takes nothing", "collects", "evaluation, batch 1", "an idle mode"]
    rows = [[name, *(f"{ratio:.2f} (+{more})" for ratio, more in measured(*given))] for name, given in MODELS.items()]
    tell(markdown(header, rows), out)


if __name__ == "__main__":
    main()
