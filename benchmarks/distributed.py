"""Measure what several processes that train a small transformer keep, send and take time for.

    python benchmarks/distributed.py [--out results/distributed] [--steps 200]

The processes have one thread each and are joined by gloo. `AdamW` and `RNGD` are in `DistributedDataParallel`, where
RNGD replicates or shares out its work, and after `fully_shard`. They take turns of ten steps, so that other load slows
all of them alike. Bytes are what a process sends on average if messages go around in rings: 2 (N - 1) / N of a sum that
all get, and (N - 1) / N of one that one gets or that is cut into parts, and of what is gathered from all.
"""

import argparse
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, median

import torch
from torch.distributed import barrier, get_rank
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from relfisher import RNGD, MetricOptions, plan
from relfisher.studies.networks import Transformer
from relfisher.studies.report import markdown

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from processes import counting, run_together
from shapes import MODELS

ALPHABET, CONTEXT, WIDTH, LAYERS, ROWS = 96, 64, 128, 4, 16
WARM_UP, BLOCK = 20, 10
WORLDS, MANY = (2, 3, 4), (8, 64, 256, 1024)
EARLY = MetricOptions(warmup_refreshes=(0, 1, 2, 4, 8))  # what follows is as in the middle of a run
ALL = MetricOptions(stats_samples=None, stats_interval=5, refresh_interval=10)


def model(width=WIDTH, layers=LAYERS):
    """Return a language model, which is the same in all processes."""
    torch.manual_seed(0)
    return Transformer(ALPHABET, CONTEXT, width, layers)


def batch(step, part, rows=ROWS):
    """Return characters of one process in one step: arithmetic sequences with noise."""
    generator = torch.Generator().manual_seed(1000 * step + part)
    start, slope = torch.randint(ALPHABET, (2, rows, 1), generator=generator)
    noise = torch.randint(2, (rows, CONTEXT + 1), generator=generator)
    return (start + slope * torch.arange(CONTEXT + 1) + noise) % ALPHABET


def loss(net, characters):
    """Return the loss of predicting each character."""
    return cross_entropy(net(characters[:, :-1]).flatten(0, 1), characters[:, 1:].flatten())


class Lane:
    """A model and its optimizer, with the bytes and the seconds of each step.

    Args:
        make: returns the optimizer of a model.
        parts: whether processes hold parts of the model.
    """

    def __init__(self, make, *, parts):
        whole = model()
        if parts:
            for block in whole.blocks:
                fully_shard(block)
            self.net = fully_shard(whole)
        else:
            self.net = DistributedDataParallel(whole)
            self.net.register_comm_hook(None, allreduce_hook)  # what is sent anyway, but so that it is counted
        self.model, self.optimizer = whole, make(self.net)
        self.seconds, self.sent, self.steps = [], [], 0

    def run(self, count):
        """Take steps."""
        for _ in range(count):
            characters = batch(self.steps, get_rank())
            barrier()
            with counting() as messages:
                start = time.perf_counter()
                self.optimizer.zero_grad()
                loss(self.net, characters).backward()
                self.optimizer.step()
                self.seconds.append(time.perf_counter() - start)
            self.sent.append(sum(messages))
            self.steps += 1

    def kept(self, *, beside):
        """Return the bytes of the state in this process, with or without the average and AdamW's moments."""
        others = ("lead", "exp_avg", "exp_avg_sq")
        pairs = [pair for state in self.optimizer.state.values() for pair in state.items() if torch.is_tensor(pair[1])]
        return sum(local(value).nbytes for key, value in pairs if beside or key not in others)


def local(tensor):
    """Return what a process has of a tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def adamw(net):
    """Return AdamW."""
    return torch.optim.AdamW(net.parameters(), 3e-3)


LANES = {
    "AdamW, DDP": (adamw, False),
    "RNGD, DDP, replicated": (partial(RNGD, metric=EARLY, replicate=True), False),
    "RNGD, DDP, shared out": (partial(RNGD, metric=EARLY, replicate=False), False),
    "AdamW, fully_shard": (adamw, True),
    "RNGD, fully_shard, replicated": (partial(RNGD, metric=EARLY, replicate=True), True),
    "RNGD, fully_shard, shared out": (partial(RNGD, metric=EARLY, replicate=False), True),
}
WRAPPED, IN_PARTS = "RNGD, DDP, shared out", "RNGD, fully_shard, shared out"


def timed(steps):
    """Return, for each lane, the seconds and the bytes of its steps, and the bytes that it keeps."""
    warnings.simplefilter("ignore")
    lanes = {name: Lane(make, parts=parts) for name, (make, parts) in LANES.items()}
    for lane in lanes.values():
        lane.run(WARM_UP)
    for _ in range(steps // BLOCK):
        for lane in lanes.values():
            lane.run(BLOCK)
    return {
        name: (lane.seconds[WARM_UP:], lane.sent[WARM_UP:], lane.kept(beside=False), lane.kept(beside=True))
        for name, lane in lanes.items()
    }


def trained(parts, *, replicate=None):
    """Return the weights of a small model after 60 steps in float64, by one process or by several."""
    warnings.simplefilter("ignore")
    net = whole = model(16, 2).double()
    if replicate is not None:
        net = DistributedDataParallel(whole)
    optimizer = RNGD(net, metric=ALL, replicate=replicate)
    for step in range(60):
        optimizer.zero_grad()
        for part in [get_rank()] if parts is None else parts:
            (loss(net, batch(step, part, 4)) / (1 if parts is None else len(parts))).backward()
        optimizer.step()
    return whole.state_dict()


def difference(world):
    """Return the largest difference to one process of some that share out the work."""
    one = trained(range(world))
    several = run_together(world, partial(trained, None, replicate=False))
    return max(float((each[name] - one[name]).abs().max()) for each in several for name in one)


def lanes_table(found):
    """Return the rows of what was measured in some processes, for each lane."""
    rows = []
    for name in LANES:
        base = found[0]["AdamW, DDP" if "DDP" in name else "AdamW, fully_shard"]
        seconds, sent, metrics, everything = zip(*(each[name] for each in found), strict=True)
        slow = median(blocks(seconds[0])) / median(blocks(base[0]))
        rows.append(
            [
                str(len(found)), name, f"{1e3 * median(blocks(seconds[0])):.1f}", f"{slow:.2f}",
                f"{min(sent[0]) / 1e6:.3f}", f"{min(sent[0]) / min(base[1]):.2f}",
                f"{mean(sent[0]) / min(sent[0]) - 1:.1%}",
                f"{max(metrics) / 1e6:.2f}", f"{max(metrics) / mean(metrics):.2f}",
                f"{max(everything) / 1e6:.2f}", f"{max(everything) / mean(everything):.2f}",
            ]
        )  # fmt: skip
    return rows


def blocks(seconds):
    """Return the mean of each block of steps, so that rare work counts."""
    return [mean(seconds[start : start + BLOCK]) for start in range(0, len(seconds), BLOCK)]


def planned():
    """Return the rows of what `plan` says of large models, which have no memory, for many processes."""
    rows = []
    for name, (make, inputs) in MODELS.items():
        with torch.device("meta"):
            net, x = make(), inputs()
        for world in MANY:
            shares = plan(net, x, world_size=world).shares
            rows.append(
                [
                    name, f"{world:,}", f"{shares.metric_bytes / 2**20:,.0f}",
                    f"{shares.metric_bytes / shares.mean_bytes:.2f}", f"{shares.refresh / shares.mean_refresh:.2f}",
                    f"{1 + shares.steps_sent / shares.gradients_sent:.2f}",
                    f"{shares.statistics_sent / 20 / shares.gradients_sent:.1%}",
                ]
            )  # fmt: skip
    return rows


PLANNED = (
    "model", "processes", "metrics and momentum of the busiest, MiB", "to the mean", "its refreshes to the mean",
    "bytes sent to AdamW, DDP", "statistics add",
)  # fmt: skip
HEADER = (
    "processes", "optimizer", "ms a step", "to AdamW", "MB sent", "to AdamW", "statistics add",
    "metrics and momentum, MB", "to the mean", "all state, MB", "to the mean",
)  # fmt: skip


def main():
    """Measure, and write the tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("results/distributed"))
    options.add_argument("--steps", type=int, default=100)
    given = options.parse_args()
    torch.set_num_threads(1)
    apart = {world: difference(world) for world in WORLDS}
    found = {world: run_together(world, timed, given.steps if world == 2 else BLOCK) for world in (2, 4)}
    rows = [row for world in (2, 4) for row in lanes_table(found[world])]
    of_two, of_four = found[2], found[4]
    base = of_two[0]["AdamW, DDP"]
    plain = min(of_two[0][WRAPPED][1])
    state = {name: [each[name][place] for each in of_four] for name, place in ((WRAPPED, 2), (IN_PARTS, 3))}
    goals = [
        ["difference to one process after 60 steps in float64, 2, 3 and 4 processes", "1e-9",
         ", ".join(f"{each:.0e}" for each in apart.values())],
        ["metrics and momentum of the busiest of 4 processes over total / 4, DDP", "1.15",
         f"{max(state[WRAPPED]) / mean(state[WRAPPED]):.2f}"],
        ["all state of the busiest of 4 processes over total / 4, fully_shard", "1.15",
         f"{max(state[IN_PARTS]) / mean(state[IN_PARTS]):.2f}"],
        ["bytes sent in a step without statistics over those of AdamW, DDP", "2.0", f"{plain / min(base[1]):.2f}"],
        ["what statistics add to these on average", "5 %", f"{mean(of_two[0][WRAPPED][1]) / plain - 1:.1%}"],
        ["step time of 2 processes over that of AdamW, DDP", "1.25",
         f"{median(blocks(of_two[0][WRAPPED][0])) / median(blocks(base[0])):.2f}"],
    ]  # fmt: skip
    numbers = sum(parameter.numel() for parameter in model().parameters())
    text = (
        f"# Several processes\n\nA transformer of {LAYERS} layers, {WIDTH} wide, with {numbers:,} parameters; {ROWS} "
        f"rows of {CONTEXT} characters in each process, of one thread. `python benchmarks/distributed.py --steps "
        f"{given.steps}`.\n\n{markdown(('what', 'at most', 'measured'), goals)}\n"
        f"{markdown(HEADER, rows, 2)}\nStatistics are due every 20th step for a layer, and refreshes every 200th. All "
        f"processes ran on {len(os.sched_getaffinity(0))} of the cores together.\n\n"
        f"What `plan(model, inputs, world_size=N)` says of models that do not run here:\n\n"
        f"{markdown(PLANNED, planned(), 2)}\nA layer is never divided, so that the busiest process of many has the "
        "largest layer.\n"
    )
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
