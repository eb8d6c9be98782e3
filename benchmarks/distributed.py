"""Measure what several processes that train a small transformer keep, send and take time for.

    python benchmarks/distributed.py [--out results/distributed] [--steps 200]
    python benchmarks/distributed.py --picture

The processes have one thread each and are joined by gloo. `AdamW` and `RNGD` are in `DistributedDataParallel`, where
RNGD replicates or shares out its work, and after `fully_shard`. They take turns of ten steps, so that other load slows
all of them alike. Bytes are what a process sends on average if messages go around in rings: 2 (N - 1) / N of a sum that
all get, and (N - 1) / N of one that one gets or that is cut into parts, and of what is gathered from all.

`--picture` measures nothing. It draws what a process of up to 1,024 keeps, and how long a step takes by a model, where
all processes hold the whole network: of RNGD by its plan, of the others by the formulas of `shapes.py`. AdamW is
replicated; Muon and Shampoo share out matrices, momentum included, and gather their steps, as RNGD does. Each process
has 8,192 tokens, with 6 operations a parameter and token; a message takes its bytes over those of a link, and a latency
for each doubling of the processes; a step is gathered in a message from each owner; and nothing overlaps. Products of
optimizers are in float32, also Muon's; what works on each number alone takes no time. Shampoo's factors take a product
each for statistics and step, and one in 200 steps 9 m^3 operations for the eigenvectors of a factor, and 2 m^3.
"""

import argparse
import math
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, median

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch.distributed import barrier, get_rank
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from relfisher import RNGD, MetricOptions, plan
from relfisher.optim.sharing import Load, assigned
from relfisher.studies.figures import STYLE, Look, encode, frame, label_ends
from relfisher.studies.networks import Transformer
from relfisher.studies.report import markdown

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from processes import counting, run_together
from shapes import INTERVAL, MODELS, layer_work, matrices, polar

ALPHABET, CONTEXT, WIDTH, LAYERS, ROWS = 96, 64, 128, 4, 16
WARM_UP, BLOCK = 20, 10
WORLDS, MANY = (2, 3, 4), (8, 64, 256, 1024)
EARLY = MetricOptions(warmup_refreshes=(0, 1, 2, 4, 8))  # what follows is as in the middle of a run
PICTURED, WORLD_POWERS = ("GPT-2 124M", "Llama 7B"), 11
TOKENS = 8192
PASSES, PRODUCTS, FACTORIZATIONS = 200e12, 50e12, 5e12  # operations a second
LINK, LATENCY = 50e9, 5e-6  # bytes a second and seconds
UPDATES = 20  # steps between two statistics of a layer
LOOKS = {
    "RNGD": Look("#d1345b", width=2.6),
    "AdamW": Look("#4d4d4d", ":"),
    "Muon": Look("#56b4e9"),
    "Shampoo": Look("#7b3294"),
    "RNGD, averaging=0": Look("#d1345b", "--"),
}
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


def gathered(world, carried, beside, sent=None, everywhere=0):
    """Return the bytes that the busiest process keeps, and the seconds that a step adds to passes and gradients.

    Args:
        world: the number of processes.
        carried: what each owns, with the operations of a step, in those of products.
        beside: the bytes that each keeps beside it.
        sent: the bytes that each sends, if this is planned.
        everywhere: operations of each process, whatever it owns.
    """
    sent = (1 - 1 / world) * sum(load.sent for load in carried) if sent is None else sent
    owners = sum(load.sent > 0 for load in carried)
    seconds = (max(load.refresh for load in carried) + everywhere) / PRODUCTS
    return max(load.bytes for load in carried) + beside, seconds + sent / LINK + owners * math.log2(world) * LATENCY


def peers(net, world):
    """Return what Muon and Shampoo keep, and the seconds that their steps add."""
    found, slower = matrices(net), PRODUCTS / FACTORIZATIONS
    inner = {each: Load(4 * each.muon, polar(each.m, each.n), 4 * each.numbers) for each in found if each.is_inner}
    factored = {
        each: Load(
            4 * each.shampoo,
            sum(4 * side * each.numbers + int(11 * slower * side**3 / INTERVAL) for side in each.sides),
            4 * each.numbers,
        )
        for each in found
    }
    empty = [Load()] * world
    return {
        "Muon": gathered(world, assigned(inner, empty)[1], sum(4 * each.muon for each in found if each not in inner)),
        "Shampoo": gathered(world, assigned(factored, empty)[1], 0),
    }


def ours(net, world):
    """Return what RNGD keeps, with and without its average, and the seconds that its steps add."""
    planned = plan(net, torch.zeros(1, 1024, dtype=torch.long, device="meta"), world_size=world)
    shares, carried = planned.shares, [Load()] * world
    for layer in planned:
        owner, size = 0 if shares is None else shares.owners[layer.name], 4 * math.prod(layer.shape)
        work = layer_work(layer) + int(layer.chosen.refresh * PRODUCTS / FACTORIZATIONS / INTERVAL)
        carried[owner] = carried[owner].plus(Load(layer.chosen.bytes + size, work, size))
    sent = 0 if shares is None else shares.steps_sent + shares.statistics_sent / UPDATES
    statistics = sum(layer.chosen.statistics for layer in planned) / UPDATES
    kept, seconds = gathered(world, carried, planned.averaging_bytes + planned.fallback_bytes, sent, statistics)
    return {"RNGD": (kept, seconds), "RNGD, averaging=0": (kept - planned.averaging_bytes, seconds)}


def modelled(net, world):
    """Return the bytes that the busiest process keeps and the seconds of a step, for each optimizer."""
    numbers = sum(each.numbers for each in matrices(net))
    sums = 2 * (1 - 1 / world) * 4 * numbers / LINK + 2 * math.log2(world) * LATENCY
    both = 6 * numbers * TOKENS / PASSES + sums
    found = {"AdamW": (8 * numbers, 0.0)} | peers(net, world) | ours(net, world)
    return {name: (kept, both + added) for name, (kept, added) in found.items()}


def picture():
    """Return the figure of state and time against the number of processes."""
    worlds = [2**power for power in range(WORLD_POWERS)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 8.4), dpi=150)
        for name, (left, right) in zip(PICTURED, figure.subplots(2, 2), strict=True):
            with torch.device("meta"):
                net = MODELS[name][0]()
            found = [modelled(net, world) for world in worlds]
            for axes, place, unit, shown in ((left, 0, 2**30, [*LOOKS]), (right, 1, 1, [*LOOKS][:-1])):
                curves = {method: [each[method][place] / unit for each in found] for method in shown}
                for method, curve in curves.items():
                    look = LOOKS[method]
                    axes.plot(worlds, curve, color=look.color, linestyle=look.dashes, linewidth=look.width)
                axes.set_xscale("log", base=2)
                axes.set_xticks(worlds[::2], [f"{world:,}" for world in worlds[::2]])
                axes.margins(x=0)
                axes.set_ylim(bottom=0)
                label_ends(axes, {method: LOOKS[method] for method in shown}, {m: c[-1] for m, c in curves.items()})
            left.set(xlabel="processes", ylabel="state of the busiest process (GiB)", title=name)
            right.set(xlabel="processes", ylabel="seconds a step, by a model", title=name)
        caption = (
            f"A model, not a measurement: {TOKENS:,} tokens a process; {PASSES / 1e12:.0f} TFLOP/s for passes, "
            f"{PRODUCTS / 1e12:.0f} for an optimizer's products, {FACTORIZATIONS / 1e12:.0f} for factorizations; links "
            f"of {LINK / 1e9:.0f} GB/s and {1e6 * LATENCY:.0f} microseconds; nothing overlaps."
        )
        frame(figure, "Processes that each hold the whole model", caption, left=0.07, right=0.9)
        figure.subplots_adjust(bottom=0.12, wspace=0.7, hspace=0.45)
    return figure


def main():
    """Measure, and write the tables."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path, default=Path("results/distributed"))
    options.add_argument("--steps", type=int, default=100)
    options.add_argument("--picture", action="store_true")
    given = options.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    if given.picture:
        (given.out / "against.png").write_bytes(encode(picture())["png"])
        return
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
    (given.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
