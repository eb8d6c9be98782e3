"""Compare structures on the paper's network under the trust region, with all other options at their defaults.

    python benchmarks/structures.py --data mnist5k --epochs 10

prints a Markdown table for docs/decisions/structures.md; `--workloads` and `--without` omit rows. Every run has the
same initial weights and batches.
"""

import argparse
import itertools

import torch
from defaults import WORKLOADS, train
from torch import nn

from relfisher import RNGD, MetricOptions
from relfisher.responses import Categorical
from relfisher.structures import KroneckerFactors
from relfisher.studies.data import load


def softmax_head(model):
    """Return the default for all layers but the head, which uses the information of a softmax."""
    return {last(model): KroneckerFactors(Categorical())}


def two_layers(model):
    """Return Kronecker factors through the next layer."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    pairs = itertools.pairwise(names)
    return {one: KroneckerFactors(through=model.get_submodule(two)) for one, two in pairs}


def last(model):
    """Return the name of the last linear layer."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


BATCH_50 = ("ReLU, batch 50", "tanh, batch 50", "sigmoid, batch 50")
STRUCTURES = {
    "auto": lambda _: "auto",
    "shared": lambda _: "shared",
    "neuron": lambda _: "neuron",
    "diagonal": lambda _: "diagonal",
    "kronecker, units' own response": lambda _: KroneckerFactors(),
    "auto, softmax head as Kronecker factors": softmax_head,
    "two-layer Kronecker factors": two_layers,
    "two-layer Kronecker factors, softmax head": lambda model: two_layers(model) | softmax_head(model),
    "first layer alone": lambda model: dict(list(two_layers(model).items())[:1]),
}


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(BATCH_50))
    parser.add_argument("--without", nargs="+", choices=STRUCTURES, default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.data)
    print("| workload | structure | cost of all training images | best validation accuracy | s/epoch |")
    print("|---|---|---|---|---|", flush=True)
    for workload in options.workloads:
        activation, batch = WORKLOADS[workload]
        for name in [name for name in STRUCTURES if name not in options.without]:
            structure = STRUCTURES[name]
            cost, accuracy, seconds = train(
                lambda model, choose=structure: RNGD(
                    model, step_rule="trust-region", metric=MetricOptions(structure=choose(model))
                ),
                data, activation, batch, options.epochs,
            )  # fmt: skip
            print(f"| {workload} | {name} | {cost:.2g} | {accuracy:.1%} | {seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
