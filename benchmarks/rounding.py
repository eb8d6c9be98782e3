"""Compare a state in bfloat16 with one in single precision: validation on the 500 held out of the digits that ship.

    python benchmarks/rounding.py [--seeds 3] [--out results/rounding]

`RNGD(model)` trains the paper's network for 12 epochs and the vision transformer for 5, with and without
`state_dtype=torch.bfloat16`. It needs the extra `experiments`.
"""

import argparse
import warnings
from pathlib import Path

import torch
from tables import tell

from relfisher import RNGD
from relfisher.evaluation import evaluation_mode
from relfisher.studies.training import iterate
from relfisher.studies.workloads import WORKLOADS, batches, samples

EPOCHS = {"mlp": 12, "vit": 5}


def accuracies(name: str, seed: int, dtype: torch.dtype | None) -> list[float]:
    """Return the validation accuracy after each epoch."""
    workload = WORKLOADS[name]
    data = samples(workload.kind, "mnist5k")
    model = workload.build(seed)
    optimizer = RNGD(model, state_dtype=dtype)
    drawn, found = batches(data, workload.batch_size, torch.Generator().manual_seed(seed)), []
    for _ in range(EPOCHS[name]):
        for _ in range(len(data.inputs) // workload.batch_size):
            iterate(optimizer, workload.loss, model, *next(drawn))
        with torch.no_grad(), evaluation_mode(model):
            found.append(workload.validate(model, data.held_inputs, data.held_targets))
    return found


def main() -> None:
    """Train and print a row for each model and seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = ["| model | seed | single precision: best, last | bfloat16: best, last |", "|---|---:|---:|---:|"]
    for name in EPOCHS:
        ends = {None: [], torch.bfloat16: []}
        for seed in range(options.seeds):
            for dtype, own in ends.items():
                found = accuracies(name, seed, dtype)
                own.append((max(found), found[-1]))
            rows.append(f"| {name} | {seed} | {' | '.join(map(told, (own[-1] for own in ends.values())))} |")
        means = (torch.tensor(own).mean(0).tolist() for own in ends.values())
        rows.append(f"| {name} | mean | {' | '.join(map(told, means))} |")
    tell("\n".join(rows) + "\n", options.out)


def told(pair: list[float] | tuple[float, float]) -> str:
    """Return a best and a last accuracy in percent."""
    return ", ".join(f"{100 * each:.1f}" for each in pair)


if __name__ == "__main__":
    main()
