"""Plan RNGD for models too large for this machine, beside other optimizers by their formulas; take one step of GPT-2.

    python benchmarks/shapes.py [--out results/shapes] [--step] [--launches]

The models have the shapes of GPT-2 124M, a Llama of 7 billion parameters, ResNet-50 and ViT-B/16, and no memory: they
are on the meta device. State is in numbers per parameter. Adam keeps 2; Muon keeps 1 for matrices of blocks, and 2 for
the rest; SOAP keeps 2, and for an m x n matrix 2 (m^2 + n^2); Shampoo 1, and 2 (m^2 + n^2); both leave sides wider than
10,000 out. Operations are those that multiply a matrix: of RNGD the products with inverses and five iterations for the
polar factor, of Muon the latter. Those of a refresh are per step, one in 200. `--step` takes steps of GPT-2 124M in
memory, and compares the state and the growth of the process with the plan. `--launches` plans nothing: it takes steps
of all models but the Llama, and counts what a step without statistics dispatches, with layers in batches as on a GPU,
where each operation is a launch.
"""

import argparse
import math
import resource
import time
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from operations import OPTIMIZERS, WARM_UP
from tables import tell
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

import relfisher
from relfisher.optim import batches
from relfisher.optim.batches import how_many
from relfisher.optim.rules.spectral import polar_operations
from relfisher.studies.networks import Transformer
from relfisher.studies.operations import fewest
from relfisher.studies.report import markdown

SMALL = {
    "GPT-2 124M": torch.zeros(1, 16, dtype=torch.long),
    "ResNet-50": torch.zeros(2, 3, 64, 64),
    "ViT-B/16": torch.zeros(1, 3, 64, 64),
}
WIDEST, INTERVAL = 10_000, 200
GPT2 = (50_304, 1024, 768, 12)


class Gated(nn.Module):
    """A block of a Llama: attention, then a gated network, both with inputs of unit root mean square."""

    def __init__(self, width, inner, heads):
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        """Add both to the stream."""
        h = self.first(x)
        query, key, value = (
            each(h).unflatten(-1, (self.heads, -1)).movedim(-2, 1) for each in (self.q, self.k, self.v)
        )
        x = x + self.o(scaled_dot_product_attention(query, key, value, is_causal=True).movedim(1, -2).flatten(-2))
        h = self.second(x)
        return x + self.down(silu(self.gate(h)) * self.up(h))


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    def __init__(self, inputs, width, stride):
        super().__init__()
        out = 4 * width
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.short = nn.Identity()
        if inputs != out:
            self.short = nn.Sequential(nn.Conv2d(inputs, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x):
        """Add the block to its input."""
        return torch.relu(self.layers(x) + self.short(x))


def llama():
    """Return a Llama of 7 billion parameters."""
    blocks = [Gated(4096, 11008, 32) for _ in range(32)]
    return nn.Sequential(nn.Embedding(32_000, 4096), *blocks, nn.RMSNorm(4096), nn.Linear(4096, 32_000, bias=False))


def resnet():
    """Return ResNet-50."""
    stages, inputs = [], 64
    for place, count in enumerate((3, 4, 6, 3)):
        for block in range(count):
            stages.append(Bottleneck(inputs, 64 << place, 2 if place and not block else 1))
            inputs = 256 << place
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Patches(nn.Module):
    """ViT-B/16: patches, twelve layers of torch's encoder, and a head on their mean."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 768, 16, 16)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)
        self.head = nn.Linear(768, 1000)

    def forward(self, images):
        """Return the logits."""
        return self.head(self.blocks(self.patch(images).flatten(2).mT).mean(1))


MODELS = {
    "GPT-2 124M": (lambda: Transformer(*GPT2, tied=True), lambda: torch.zeros(1, 1024, dtype=torch.long)),
    "Llama 7B": (llama, lambda: torch.zeros(1, 128, dtype=torch.long)),
    "ResNet-50": (resnet, lambda: torch.zeros(1, 3, 224, 224)),
    "ViT-B/16": (Patches, lambda: torch.zeros(1, 3, 224, 224)),
}


def polar(m, n):
    """Return the operations of the iterations for the polar factor of an m x n matrix, the way that takes fewer."""
    return min(polar_operations(*sorted((m, n))))


class Matrix(NamedTuple):
    """A parameter as an m x n matrix; n is 0 if it is a vector.

    Attributes:
        numbers: how many it has.
        is_inner: whether Muon trains it, rather than AdamW.
    """

    name: str
    numbers: int
    m: int
    n: int
    is_inner: bool

    @property
    def sides(self):
        """The sides that SOAP and Shampoo have factors of."""
        return [side for side in (self.m, self.n) if side <= WIDEST] if self.n else []

    @property
    def muon(self):
        """The numbers that Muon keeps."""
        return self.numbers * (1 if self.is_inner else 2)

    @property
    def shampoo(self):
        """The numbers that Shampoo keeps."""
        return self.numbers + 2 * sum(side**2 for side in self.sides)


def matrices(model):
    """Return the parameters of a model."""
    ends = {id(p) for p in (*next(model.children()).parameters(), *list(model.children())[-1].parameters())}
    found = []
    for name, p in model.named_parameters():
        m, n = (p.shape[0], p.numel() // p.shape[0]) if p.ndim > 1 else (1, 0)
        found.append(Matrix(name, p.numel(), m, n, bool(n) and id(p) not in ends))
    return found


def others(model):
    """Return the numbers per parameter that Muon, SOAP and Shampoo keep, and the operations of Muon's step."""
    found = matrices(model)
    total, muon, shampoo = (sum(getattr(each, kept) for each in found) for kept in ("numbers", "muon", "shampoo"))
    work = sum(polar(each.m, each.n) for each in found if each.is_inner)
    return [muon / total, shampoo / total + 1, shampoo / total], work


def layer_work(layer):
    """Return the operations of RNGD's step for a layer of a plan."""
    has_polar = layer.shape[-2] > 1 and "diagonal" not in layer.chosen.structure
    return layer.chosen.step + (math.prod(layer.shape[:-2]) * polar(*layer.shape[-2:]) if has_polar else 0)


def row(name):
    """Return the line of a model."""
    make, inputs = MODELS[name]
    with torch.device("meta"):
        model, x = make(), inputs()
    total = sum(parameter.numel() for parameter in model.parameters())
    planned = relfisher.plan(model, x)
    kept, muon = others(model)
    work = sum(layer_work(layer) for layer in planned)
    refresh = sum(layer.chosen.refresh for layer in planned) / INTERVAL
    kinds = {tuple(layer.shape): 0 for layer in planned}
    return [
        name, f"{total / 1e6:,.0f}", f"{planned.bytes / 4 / total:.2f}", "2.00", *(f"{each:.2f}" for each in kept),
        f"{work / 1e12:.3f}", f"{refresh / 1e12:.4f}", f"{muon / 1e12:.3f}", f"{len(planned.layers)}", f"{len(kinds)}",
    ]  # fmt: skip


HEADER = [
    "model", "million parameters", "RNGD", "Adam", "Muon", "SOAP", "Shampoo", "RNGD, TFLOP a step", "and for refreshes",
    "Muon, TFLOP a step", "layers", "of different shapes",
]  # fmt: skip


def measured():
    """Take steps of GPT-2 124M, and return what was measured in a sentence."""
    torch.manual_seed(0)
    model = Transformer(*GPT2, tied=True)
    x, y = torch.randint(GPT2[0], (2, 1, 256))
    planned = relfisher.plan(model, x)
    optimizer = relfisher.RNGD(model)
    seconds = []
    for _ in range(4):
        optimizer.zero_grad()
        start = time.perf_counter()
        cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        middle = time.perf_counter()
        optimizer.step()
        seconds.append((middle - start, time.perf_counter() - middle))
    state = sum(value.nbytes for each in optimizer.state.values() for value in each.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    forward, step = seconds[-1]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    threads = torch.get_num_threads()
    return (
        f"GPT-2 124M in memory, 256 tokens, threads of a CPU: {threads}; {forward:.1f} s for the passes, {step:.1f} s "
        f"for a step with statistics and refreshes of all layers; state of {state / 2**20:,.0f} MiB, planned "
        f"{planned.bytes / 2**20:,.0f} MiB ({state / planned.bytes - 1:+.1%}); the process took "
        f"{peak / 2**20:,.0f} MiB at most, its weights and gradients {2 * weights / 2**20:,.0f}."
    )


def as_launched(numbers, _):
    """Return how many layers are computed together where operations are launches."""
    return how_many(numbers, torch.device("cuda"))


def launches(name, x):
    """Return the line of a model: the operations of a step of each optimizer."""
    found = []
    for kind, optimizer_of in OPTIMIZERS.items():
        torch.manual_seed(0)
        model = MODELS[name][0]()
        if kind == "Muon" and name == "ResNet-50":  # torch's Muon takes no convolutions
            found.append("-")
            continue
        optimizer = optimizer_of(model)

        def run(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            logits = model(x).flatten(0, -2)
            cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)).backward()
            optimizer.step()

        for _ in range(WARM_UP):
            run()
        found.append(f"{fewest(optimizer, run, 2)[0]:,}")
    return [name, *found]


def main():
    """Plan, measure, and write the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--out", type=Path)
    options.add_argument("--step", action="store_true")
    options.add_argument("--launches", action="store_true")
    given = options.parse_args()
    if given.launches:
        with mock.patch.object(batches, "how_many", as_launched):
            rows = [launches(name, x) for name, x in SMALL.items()]
        tell(markdown(["operations of a step without statistics", *OPTIMIZERS], rows), given.out, "launches.md")
        return
    table = markdown(HEADER, [row(name) for name in MODELS])
    if given.step:
        table += "\n" + measured() + "\n"
    tell(table, given.out)


if __name__ == "__main__":
    main()
