"""Compare validation accuracies: tuned peers, RNGD with its defaults, and RNGD without each of its parts.

    python benchmarks/validation.py --out results/validation mlp-digits mlp-fashion resnet vit cnn

trains every network for the same epochs with the same initial weights and batches, and writes for each workload
`NAME.md`: the best validation accuracy of a run, the last one, and that after two epochs, as means over seeds, and the
seconds of training with one thread. Peers have a cosine schedule and decay, and the table has all of their
configurations. RNGD has its own decay and no schedule, unless its name says so. Fashion-MNIST is cut to 12,000 training
images. The committed tables have processor seconds.
"""

import argparse
import math
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

import relfisher
from relfisher import RNGD, MetricOptions
from relfisher.files import write_atomically
from relfisher.optim.rules import polar_factor
from relfisher.studies.training import Length, train
from relfisher.studies.workloads import WORKLOADS, Samples, samples

CUT = 12_000
EARLY = 2


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for all matrices but the head's, convolutions flattened; AdamW for the rest."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, rest_lr: float = 2e-3) -> None:
        layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        matrices = [layer.weight for layer in layers[:-1]]
        rest = [p for p in model.parameters() if not any(p is each for each in matrices)]
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})
        self.adamw = torch.optim.AdamW(rest, lr=rest_lr, weight_decay=weight_decay)
        self.add_param_group({"params": rest, "lr": rest_lr})

    @torch.no_grad()
    def step(self) -> None:
        """Step on the matrices, then on the rest."""
        matrices, rest = self.param_groups
        for weight in matrices["params"]:
            momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
            momentum.lerp_(weight.grad, 0.05)
            direction = polar_factor(weight.grad.lerp(momentum, 0.95).flatten(1))
            scale = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
            weight.mul_(1 - matrices["lr"] * matrices["weight_decay"])
            weight.add_(direction.view_as(weight), alpha=-matrices["lr"] * scale)
        self.adamw.param_groups[0]["lr"] = rest["lr"]
        self.adamw.step()


@dataclass(frozen=True)
class Method:
    """An optimizer, and whether a cosine lowers its learning rates to 0."""

    make: Callable[[nn.Module], torch.optim.Optimizer]
    cosine: bool = False


def adamw(lr: float, weight_decay: float) -> Method:
    """Return AdamW with a schedule."""
    return Method(lambda model: torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay), cosine=True)


def muon(lr: float, weight_decay: float) -> Method:
    """Return Muon with a schedule."""
    return Method(lambda model: Muon(model, lr, weight_decay), cosine=True)


def rngd(*, cosine: bool = False, **options: object) -> Method:
    """Return RNGD."""
    return Method(lambda model: RNGD(model, **options), cosine=cosine)


PEERS = {
    **{f"AdamW, lr {lr:g}, decay {wd:g}": adamw(lr, wd) for lr in (1e-3, 2e-3, 4e-3, 8e-3) for wd in (0.1, 0.5)},
    **{f"Muon, lr {lr:g}, decay {wd:g}": muon(lr, wd) for lr in (5e-3, 1e-2, 2e-2, 4e-2) for wd in (0.05, 0.2)},
}
OURS = {
    "RNGD": rngd(),
    "RNGD, cosine": rngd(cosine=True),
    "RNGD, lr 2e-2": rngd(lr=2e-2),
    "no metric": rngd(metric=MetricOptions(power=0.0)),
    "metric of raw inputs, too": rngd(metric=MetricOptions(power=1.0)),
    "no average": rngd(averaging=0.0),
    "no average, cosine": rngd(averaging=0.0, cosine=True),
    "no decay": rngd(weight_decay=0.0),
    "no momentum": rngd(momentum=0.0),
    "normalized rule": rngd(step_rule="normalized"),
}


@dataclass(frozen=True)
class Case:
    """A workload, its data, the number of epochs and of seeds."""

    workload: str
    source: str
    epochs: int
    seeds: int


CASES = {
    "mlp-digits": Case("mlp", "mnist5k", 20, 3),
    "mlp-fashion": Case("mlp", "fashion-mnist", 12, 2),
    "tanh-digits": Case("mlp-tanh", "mnist5k", 20, 3),
    "resnet": Case("resnet", "fashion-mnist", 8, 1),
    "vit": Case("vit", "fashion-mnist", 8, 1),
    "cnn": Case("cnn", "fashion-mnist", 5, 1),
}


def run(case: Case, data: Samples, method: Method, seed: int) -> tuple[list[float], float]:
    """Train once; return the validation accuracy after each epoch in percent, and the seconds of training."""
    workload = WORKLOADS[case.workload]
    total = case.epochs * (len(data.inputs) // workload.batch_size)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = method.make(model)
        if method.cosine:
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1 + math.cos(math.pi * t / total)) / 2)
            optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return optimizer

    record = train(
        workload,
        data,
        lambda: workload.build(seed),
        make,
        torch.Generator().manual_seed(seed),
        Length(case.epochs, iterations=total),
        lambda *_: None,
        scored=1,
    )
    return [100 * accuracy for accuracy in record.validation], float(record.seconds[-1])


def table(case: Case) -> str:
    """Return the table of a workload."""
    data = samples("classes", case.source)
    data = replace(data, inputs=data.inputs[:CUT], targets=data.targets[:CUT])
    lines = [
        f"{WORKLOADS[case.workload].title}; {data.name}, {len(data.inputs):,} training and {len(data.held_inputs):,} "
        f"validation images, {case.epochs} epochs, {case.seeds} seeds",
        "",
        f"| optimizer | best | last | after {EARLY} epochs | spread of the best | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for name, method in {**PEERS, **OURS}.items():
        runs = [run(case, data, method, seed) for seed in range(case.seeds)]
        accuracies = np.array([found for found, _ in runs])
        best = accuracies.max(1)
        lines.append(
            f"| {name} | {best.mean():.2f} | {accuracies[:, -1].mean():.2f} | {accuracies[:, EARLY - 1].mean():.2f} | "
            f"{best.max() - best.min():.2f} | {np.mean([seconds for _, seconds in runs]):.1f} |"
        )
        print(lines[-1], flush=True)
    machine = f"relfisher {relfisher.__version__}, torch {torch.__version__}, {platform.machine()}, one thread"
    return "\n".join([*lines, "", machine, ""])


def main() -> None:
    """Write a table for each workload that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases:
        write_atomically(arguments.out / f"{name}.md", table(CASES[name]).encode())


if __name__ == "__main__":
    main()
