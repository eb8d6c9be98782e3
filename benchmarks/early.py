"""Compare refresh schedules for the first iterations: steps of the deep autoencoder to its target loss.

    python benchmarks/early.py --data fashion-mnist

prints, for each choice of `warmup_refreshes` and each seed, the steps until the mean of ten losses reaches 225, and
the losses after 10, 20 and 30 steps. The table is in docs/decisions/defaults.md. It needs the extra `experiments`.
"""

import argparse
import warnings

import torch

from relfisher import RNGD, MetricOptions
from relfisher.optim.schedule import WARMUP
from relfisher.studies.race import RACES
from relfisher.studies.training import iterate
from relfisher.studies.workloads import WORKLOADS, batches, samples

SCHEDULES = {
    "0, 5, 10, 20, 50, 100": (0, 5, 10, 20, 50, 100),
    "powers of 2": (0, *(1 << power for power in range(8))),
    "the default": WARMUP,
    "each of 40": tuple(range(41)),
}
LOSSES_AT = (10, 20, 30)


def main():
    """Train and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="mnist5k")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=150)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    race = RACES["autoencoder"]
    workload = WORKLOADS[race.workload]
    data = samples(workload.kind, options.data)
    print("| refreshed at | seed | steps | loss at 10 | at 20 | at 30 |\n|---|---|---|---|---|---|")
    for name, early in SCHEDULES.items():
        for seed in range(options.seeds):
            optimizer = RNGD(model := workload.build(seed), metric=MetricOptions(warmup_refreshes=early))
            drawn = batches(data, workload.batch_size, torch.Generator().manual_seed(seed))
            losses, steps = [], "-"
            while steps == "-" and len(losses) < options.iterations:
                losses.append(iterate(optimizer, workload.loss, model, *next(drawn)))
                if len(losses) >= race.window and sum(losses[-race.window :]) / race.window <= race.target:
                    steps = len(losses)
            shown = [f"{losses[place - 1]:.0f}" if place <= len(losses) else "" for place in LOSSES_AT]
            print(f"| {name} | {seed} | {steps} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
