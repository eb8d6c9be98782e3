"""A campaign of faults: what is tried, what is survived, and what is lost.

    python benchmarks/robustness.py --jobs 2 --out results/robustness/table.md

gives junk to every public option; kills a study at random moments, fills its disk, closes its output, tears its files
and runs it several times in one directory; puts values that are not finite into batches, losses, gradients and states
under each step rule; and trains four networks on the embedded digits with each rule, learning rates from 1e-3 to 10,
damping from 1e-5 to 1, and batches from 8 to 1024, with and without momentum. The first table has a row for each fault,
the second a row for each rule and network of the last one. What is lost is said on standard error, and the exit status
is 1 if anything is. `--quick` tries a few faults of each kind, in less than a minute; `--grid` has only the runs with
extreme options, as in results/robustness/grid.md.
"""

import argparse
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from faults import inputs, runs, torn, training
from faults.site import Site

import relfisher
from relfisher.files import write_atomically
from relfisher.studies.report import processor

SHOWN = 20
FULL = {
    "every": 1,
    "kills": 40,
    "disks": 40,
    "results": 80,
    "files": 5000,
    "together": 12,
    "epochs": 8,
    "rates": 6,
    "training": {},
}
QUICK = {
    "every": 61,
    "kills": 1,
    "disks": 1,
    "results": 1,
    "files": 50,
    "together": 1,
    "epochs": 1,
    "rates": 1,
    "training": {"structures": ("kronecker",), "moments": (5,), "values": (float("nan"),), "every": 8},
}


def campaign(root, seed, counts):
    """Yield the tally of each fault.

    Args:
        root: an empty directory.
        seed: of the random moments and places.
        counts: how often to try what, as in `FULL`.
    """
    yield inputs.library(counts["every"])
    yield inputs.command_line(root / "unused", counts["every"])
    site = Site(root / "site", seed, counts["epochs"], counts["rates"])
    yield runs.kills(site, counts["kills"])
    yield runs.full_disks(site, counts["disks"])
    yield runs.closed_outputs(site)
    yield runs.concurrent(site, counts["together"])
    yield torn.torn_results(site, counts["results"])
    yield torn.torn_runs(site, counts["files"])
    yield torn.torn_data(site, counts["files"])
    yield torn.torn_checkpoints(site, counts["files"])
    yield from training.not_finite(**counts["training"])


def tell(tally):
    """Print a tally; what was lost goes to standard error."""
    print(tally.row, flush=True)
    for loss in tally.lost[:SHOWN]:
        print(f"lost: {loss}", file=sys.stderr)


def markdown(tallies, grid, machine):
    """Return the tables and how they were made."""
    head = ["| fault, and what counts as survived | tried | survived | lost |", "|---|---:|---:|---:|"]
    names = ["| rule | network | runs | weights not finite | loss below the first | steps left out |", "|" + "---|" * 6]
    return (
        "\n".join([
            *head,
            *(tally.row for tally in tallies),
            "",
            "Extreme options in detail:",
            "",
            *names,
            *grid,
            "",
            machine,
        ])
        + "\n"
    )


def surroundings(seed):
    """Return the command, the machine and the versions in words."""
    command = shlex.join(["python", *sys.argv])
    return (
        f"`{command}` (seed {seed}) on {processor()}, {os.cpu_count()} cores, {platform.system()}; "
        f"relfisher {relfisher.__version__}, Python {platform.python_version()}, torch {torch.__version__}."
    )


def main():
    """Run the campaign and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few faults of each kind")
    parser.add_argument("--grid", action="store_true", help="only the runs with extreme options")
    parser.add_argument("--iterations", type=int, default=60, help="of each run with extreme options")
    parser.add_argument("--jobs", type=int, default=1, help="processes for the runs with extreme options")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments and places")
    parser.add_argument("--out", type=Path, help="the file of the tables")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    # Forks of a process with several threads may wait for those they lack.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        tallies = []
        counts = QUICK if options.quick else FULL
        for tally in () if options.grid else campaign(Path(root), options.seed, counts):
            tell(tally)
            tallies.append(tally)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        chosen = training.OPTIONS[::40] if options.quick else training.OPTIONS
        tally, grid = training.extreme(pool.map, options.iterations, chosen)
    tell(tally)
    tallies.append(tally)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(options.out, markdown(tallies, grid, surroundings(options.seed)).encode())
    sys.exit(int(any(each.lost for each in tallies)))


if __name__ == "__main__":
    main()
