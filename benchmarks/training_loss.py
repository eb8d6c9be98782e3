"""The training loss of the paper's network on Fashion-MNIST, of the weights that each optimizer leaves in the model.

    python benchmarks/training_loss.py [--seeds 2] [--steps 12000] [--out results/training-loss]

The loss is that of 10,000 training images, measured every 250 steps; measuring does not count as time. Adam and Muon
have the rates that a race to a loss chose for them from eight configurations, the others their defaults with a `fit`.
"""

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch

from relfisher import RNGD
from relfisher.studies.contestants import CONTESTANTS
from relfisher.studies.workloads import WORKLOADS, batches, samples

METHODS = {
    "Adam, lr 0.002": lambda model: torch.optim.Adam(model.parameters(), 2e-3),
    "Muon, lr 0.003": lambda model: CONTESTANTS["Muon"].make(model, lr=3e-3, weight_decay=0.0),
    "`RNGD(model)`": lambda model: RNGD(model),
    '`RNGD(model, fit="plain")`': lambda model: RNGD(model, fit="plain"),
    '`RNGD(model, fit="interpolate")`': lambda model: RNGD(model, fit="interpolate"),
    'the same, `step_rule="normalized"`, lr 0.01': lambda model: RNGD(
        model, 1e-2, step_rule="normalized", fit="interpolate"
    ),
    "the same, and `total_steps=6000`": lambda model: RNGD(
        model, 1e-2, step_rule="normalized", fit="interpolate", total_steps=6000
    ),
}
MEASURED, INTERVAL, TARGET = 10_000, 250, 0.1


def run(make, data, seed, steps):
    """Train once, and return the steps, seconds, losses and validation accuracies."""
    workload = WORKLOADS["mlp"]
    model = workload.build(seed)
    optimizer = make(model)
    drawn = batches(data, workload.batch_size, torch.Generator().manual_seed(seed))
    spent, curve = 0.0, []
    for count in range(1, steps + 1):
        inputs, targets = next(drawn)
        start = time.process_time()
        optimizer.zero_grad()
        workload.loss(model, inputs, targets).backward()
        optimizer.step()
        spent += time.process_time() - start
        if count % INTERVAL == 0:
            model.eval()
            with torch.no_grad():
                loss = float(workload.loss(model, data.inputs[:MEASURED], data.targets[:MEASURED]))
                accuracy = workload.validate(model, data.held_inputs, data.held_targets)
            model.train()
            curve.append((count, spent, loss, accuracy))
    return curve


def cells(name, curves):
    """Return the line of a method."""
    reached = [next(((step, spent) for step, spent, loss, _ in curve if loss <= TARGET), None) for curve in curves]
    soon = (
        "-" if None in reached else " / ".join(f"{statistics.mean(each):,.0f}" for each in zip(*reached, strict=True))
    )
    seconds = statistics.mean(curve[-1][1] for curve in curves)
    last = [statistics.mean(curve[-1][place] for curve in curves) for place in (2, 3)]
    best = statistics.mean(max(accuracy for *_, accuracy in curve) for curve in curves)
    return f"| {name} | {soon} | {last[0]:.3g} | {seconds:.0f} | {100 * best:.1f} | {100 * last[1]:.1f} |"


def main():
    """Run all methods, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--out", type=Path, default=Path("results/training-loss"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = samples("classes", "fashion-mnist")
    lines = [
        f"| method | steps / seconds to {TARGET:g} | loss after {arguments.steps:,} steps | seconds "
        "| best validation, % | validation at the end, % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, make in METHODS.items():
        lines.append(cells(name, [run(make, data, seed, arguments.steps) for seed in range(arguments.seeds)]))
        print(lines[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
