"""Count what a step dispatches, and how often the host reads a number, on transformers of 12 and 48 layers.

    python benchmarks/operations.py [--out results/operations]

Each dispatched operation is a launch on a GPU, and each read waits for it; those of torch's Adam are of numbers that
are on the host. The models have the layers of GPT-2 and are 32 wide: the counts do not depend on the width. Counted is
the step with the fewest operations, without statistics and refreshes of a metric.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from tables import tell
from torch.nn.functional import cross_entropy

from relfisher import RNGD, MetricOptions
from relfisher.studies.networks import Transformer
from relfisher.studies.operations import fewest
from relfisher.studies.peers import with_adamw
from relfisher.studies.report import markdown

DEPTHS = (12, 48)
WARM_UP = 5
RARELY = MetricOptions(stats_interval=10**6, refresh_interval=10**6)


def muon(model):
    """Return Muon for the weights of the blocks, and AdamW for the rest."""
    weights = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    return with_adamw(torch.optim.Muon(weights), model, 1e-3)


OPTIMIZERS = {
    "Adam": lambda model: torch.optim.Adam(model.parameters()),
    "Adam, for-each": lambda model: torch.optim.Adam(model.parameters(), foreach=True),
    "Adam, fused": lambda model: torch.optim.Adam(model.parameters(), fused=True),
    "Muon": muon,
    "RNGD": partial(RNGD, metric=RARELY),
    "RNGD, normalized": partial(RNGD, step_rule="normalized", metric=RARELY),
    "RNGD, trust region": partial(RNGD, step_rule="trust-region", metric=RARELY),
}


def counted(make, depth):
    """Return the operations and the reads of a step."""
    torch.manual_seed(0)
    model = Transformer(128, 32, 32, depth, tied=True)
    optimizer = make(model)

    def run():
        rows = torch.randint(128, (2, 33))
        optimizer.zero_grad()
        cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()).backward()
        optimizer.step()

    for _ in range(WARM_UP):
        run()
    return fewest(optimizer, run, 2)


def main() -> None:
    """Count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    rows = []
    for name, make in OPTIMIZERS.items():
        counts = [counted(make, depth) for depth in DEPTHS]
        rows.append([name, *(f"{number:,}" for pair in counts for number in pair)])
    header = ["", *(f"{what}, {depth} layers" for depth in DEPTHS for what in ("operations", "reads"))]
    tell(markdown(header, rows), out)


if __name__ == "__main__":
    main()
