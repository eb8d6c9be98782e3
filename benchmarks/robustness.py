"""Try extreme options and batches: do any runs end with non-finite weights, and how many learn?

    python benchmarks/robustness.py --out results/robustness/table.md

trains the paper's network with ReLU, tanh and sigmoid units and a small convolutional network on the embedded digits,
with every step rule, learning rates from 1e-3 to 10, damping from 1e-5 to 1, and batches from 8 to 1024, with and
without momentum. Each row of the table covers all runs of a rule on a network. The exit status is 1 if any weights
became non-finite.
"""

import argparse
import itertools
import multiprocessing
import sys
import warnings
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from relfisher import RNGD
from relfisher.studies.data import load
from relfisher.studies.networks import paper_network
from relfisher.studies.training import iterate

RATES = (1e-3, 1e-2, 0.1, 1.0, 10.0)
DAMPINGS = (1e-5, 1e-3, 0.1, 1.0)
BATCHES = (8, 64, 1024)
MOMENTUMS = (0.0, 0.9)
RULES = ("normalized", "trust-region", "spectral")
UNITS = {"ReLU units": nn.ReLU, "tanh units": nn.Tanh, "sigmoid units": nn.Sigmoid}


@lru_cache
def digits():
    """Return the embedded digits."""
    return load("mnist5k")


def convolutional():
    """Return a network of two convolutions and a linear head."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def build(name):
    """Return the network with the given name."""
    if name == "convolutions":
        torch.manual_seed(0)
        return convolutional()
    return paper_network("none", torch.Generator().manual_seed(0), UNITS[name])


def run(rule, name, iterations, options):
    """Return whether all weights are finite after a run, whether its loss fell, and the number of skipped steps."""
    rate, damping, batch, momentum = options
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = digits()
    model = build(name)
    optimizer = RNGD(model, rate, step_rule=rule, damping=damping, momentum=momentum)
    losses = []

    def loss(rows):
        return cross_entropy(model(data.train_images[rows]), data.train_labels[rows])

    for iteration in range(iterations):
        rows = torch.randint(len(data.train_labels), (batch,), generator=torch.Generator().manual_seed(iteration))
        losses.append(iterate(optimizer, loss, rows))
    finite = all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    late = losses[-10:]
    return finite, sum(late) / len(late) < losses[0], optimizer.health.skipped_steps


def main():
    """Run the grid and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=60)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    grid = list(itertools.product(RATES, DAMPINGS, BATCHES, MOMENTUMS))
    lines = ["| rule | network | runs | weights not finite | loss below the first | steps left out |", "|" + "---|" * 6]
    lost = 0
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for rule, name in itertools.product(RULES, (*UNITS, "convolutions")):
            found = pool.map(partial(run, rule, name, options.iterations), grid, chunksize=1)
            broken = sum(not finite for finite, _, _ in found)
            lost += broken
            learned, skipped = (sum(result[place] for result in found) for place in (1, 2))
            lines.append(f"| {rule} | {name} | {len(found)} | {broken} | {learned} | {skipped} |")
            print(lines[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text("\n".join(lines) + "\n")
    sys.exit(int(lost > 0))


if __name__ == "__main__":
    main()
