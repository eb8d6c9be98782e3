"""Record the metric along training, and judge what section 4 of the paper expects of it.

    python benchmarks/along.py --out results/along

trains the paper's network on the digits that ship, with several optimizers, and records every step on 100 held-out
digits. Section 4 expects the metric of a layer to vary less if the change of the response before it is bounded. Two
things are compared, for each layer after the first: within a run, the drift of its metric over a step with the
divergence of the response before it by the same step, as a rank correlation; and between runs, the means of both.
Writes `table.md`, `NAME.csv.gz` for each optimizer and the pictures of two.
"""

import argparse
import gzip
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import relfisher
from relfisher import RNGD, MetricRecorder, TrustRegion
from relfisher.files import write_atomically
from relfisher.responses import Categorical
from relfisher.studies.training import iterate
from relfisher.studies.workloads import WORKLOADS, batches, samples

STEPS = 150
PROBE = 100
LAYERS = ("0", "2", "4", "6")
DRAWN = ("adam", "rngd")

OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "adam": lambda model: torch.optim.Adam(model.parameters(), 1e-3),
    "rngd": RNGD,
    "published": RNGD.as_published,
    **{
        f"trust-region-{bound:g}": partial(RNGD, step_rule=TrustRegion(bound), averaging=0.0)
        for bound in (5e-4, 2e-3, 8e-3)
    },
}


def recorded(make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[MetricRecorder, float]:
    """Train once, and return the records and the mean loss of the last 50 mini-batches."""
    workload, data = WORKLOADS["mlp"], samples("classes", "mnist5k")
    model = workload.build(0)
    optimizer = make(model)
    recorder = MetricRecorder(model, optimizer, data.held_inputs[:PROBE], Categorical(), every=1)
    drawn = batches(data, workload.batch_size, torch.Generator().manual_seed(0))
    losses = [iterate(optimizer, workload.loss, model, *next(drawn)) for _ in range(STEPS)]
    return recorder, float(np.mean(losses[-50:]))


def column(recorder: MetricRecorder, layer: str, name: str) -> np.ndarray:
    """Return a quantity of a layer at every step."""
    return np.array([getattr(record, name) for record in recorder.of(layer)])


def correlation(one: np.ndarray, two: np.ndarray) -> float:
    """Return Spearman's rank correlation."""
    ranks = [values.argsort().argsort().astype(float) for values in (one, two)]
    return float(np.corrcoef(*ranks)[0, 1])


def row(name: str, recorder: MetricRecorder, loss: float) -> str:
    """Return the line of an optimizer."""
    before, after = LAYERS[:-1], LAYERS[1:]
    # The drift in a record is that over the step before it.
    changes = [column(recorder, layer, "divergence")[:-1] for layer in before]
    drifts = [column(recorder, layer, "drift")[1:] for layer in after]
    ratios = [column(recorder, layer, "divergence") / column(recorder, layer, "length") for layer in LAYERS]
    cells = [
        name,
        f"{loss:.3f}",
        *(f"{np.mean(each):.2g}" for each in changes),
        *(f"{np.mean(each):.2g}" for each in drifts),
        *(f"{correlation(*pair):.2f}" for pair in zip(changes, drifts, strict=True)),
        f"{np.nanmedian(np.concatenate(ratios)):.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Write the table, and the data and the picture of each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    names = ["optimizer", "loss"]
    names += [f"divergence, layer {place}" for place in (1, 2, 3)] + [f"drift, layer {place}" for place in (2, 3, 4)]
    names += [f"correlation {place}-{place + 1}" for place in (1, 2, 3)] + ["divergence / length"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for name, make in OPTIMIZERS.items():
        recorder, loss = recorded(make)
        lines.append(row(name, recorder, loss))
        print(lines[-1], flush=True)
        recorder.save(out / f"{name}.csv")
        write_atomically(out / f"{name}.csv.gz", gzip.compress((out / f"{name}.csv").read_bytes(), mtime=0))
        (out / f"{name}.csv").unlink()
        if name in DRAWN:
            recorder.figure().savefig(out / f"{name}.png", dpi=100)
    about = (
        f"{WORKLOADS['mlp'].title}, {STEPS} steps, {PROBE} digits as inputs of the metric. Means over the steps: the "
        "divergence of a layer's response by a step in nats, and the relative drift of the next layer's metric by the "
        "same step; their rank correlation; the median ratio of divergence and squared length, 1/2 to second order. "
        f"Loss: mean of the last 50 mini-batches.\n\nrelfisher {relfisher.__version__}, torch {torch.__version__}, "
        f"{platform.machine()}, one thread, one seed"
    )
    write_atomically(out / "table.md", "\n".join([*lines, "", about, ""]).encode())


if __name__ == "__main__":
    main()
