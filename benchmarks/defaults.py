"""Change one option of the trust region at a time, and compare training cost, validation accuracy and time.

    python benchmarks/defaults.py --data fashion-mnist --epochs 5

prints a Markdown table for docs/decisions/defaults.md. Every run has the same initial weights and batches. For
comparison, one row shows Adam at the best of three learning rates.
"""

import argparse
import time
from dataclasses import fields

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from relfisher import RNGD, MetricOptions, TrustRegion
from relfisher.studies.data import load
from relfisher.studies.networks import paper_network
from relfisher.studies.training import iterate

WORKLOADS = {
    "ReLU, batch 50": (nn.ReLU, 50),
    "ReLU, batch 500": (nn.ReLU, 500),
    "tanh, batch 50": (nn.Tanh, 50),
    "sigmoid, batch 50": (nn.Sigmoid, 50),
}
VARIATIONS = [
    {},
    *({"lr": value} for value in (0.1, 1.0)),
    *({"step_rule": TrustRegion(value)} for value in (5e-4, 1e-3, 5e-3)),
    *({"damping": value} for value in (1e-3, 1e-2, 3e-2, 0.3)),
    *({"momentum": value} for value in (0.5, 0.9)),
    *({"metric": MetricOptions(decay=value)} for value in (0.98, 0.999)),
    *({"metric": MetricOptions(stats_interval=value)} for value in (1, 10)),
    *({"metric": MetricOptions(refresh_interval=value)} for value in (50, 100)),
    {"metric": MetricOptions(warmup_refreshes=())},
    {"metric": MetricOptions(bias_correction=False, stagger=False)},
    *({"metric": MetricOptions(structure=value)} for value in ("shared", "published")),
]


def label(options):
    """Describe the options that differ from the defaults."""
    shown = dict(options)
    if "step_rule" in shown:
        shown["trust_region"] = shown.pop("step_rule").bound
    if "metric" in shown:
        given, default = shown.pop("metric"), MetricOptions()
        each = {field.name: getattr(given, field.name) for field in fields(MetricOptions)}
        shown |= {name: value for name, value in each.items() if value != getattr(default, name)}
    return ", ".join(f"{key} {value}" for key, value in shown.items()) or "**defaults**"


def train(make, data, activation, batch, epochs):
    """Return the full training cost, the best validation accuracy and the seconds per epoch of one run."""
    generator = torch.Generator().manual_seed(0)
    model = paper_network("none", generator, activation)
    optimizer = make(model)
    accuracy, seconds = [], 0.0

    def loss(rows):
        return cross_entropy(model(data.train_images[rows]), data.train_labels[rows])

    for _ in range(epochs):
        order = torch.randperm(len(data.train_labels), generator=generator)
        start = time.perf_counter()
        for rows in order.split(batch):
            iterate(optimizer, loss, rows)
        seconds += time.perf_counter() - start
        with torch.no_grad():
            predicted = model(data.validation_images).argmax(1)
            accuracy.append(float((predicted == data.validation_labels).float().mean()))
    with torch.no_grad():
        cost = float(cross_entropy(model(data.train_images), data.train_labels))
    return cost, max(accuracy), seconds / epochs


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workloads", default=",".join(WORKLOADS).replace(", batch", " batch"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load(options.data)
    chosen = [name for name in WORKLOADS if name.replace(", batch", " batch") in options.workloads.split(",")]
    adam = [(f"Adam {lr:g}", lambda m, lr=lr: torch.optim.Adam(m.parameters(), lr)) for lr in (3e-4, 1e-3, 3e-3)]
    rngd = [
        (
            label(options),
            lambda m, o=options: RNGD(m, **{"step_rule": "trust-region", **o}),
        )
        for options in VARIATIONS
    ]
    print(f"Full training cost after {options.epochs} epochs / best validation accuracy / seconds per epoch\n")
    print(f"| {' | '.join(['', *chosen])} |\n|---|{'---|' * len(chosen)}")
    for label, make in adam + rngd:
        cells = []
        for name in chosen:
            cost, accuracy, seconds = train(make, data, *WORKLOADS[name], options.epochs)
            cells.append(f"{cost:.4f} / {accuracy:.1%} / {seconds:.1f}")
        print(f"| {' | '.join([label, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
