"""Train a transformer of the shape of GPT-2 124M on a GPU: the price of a step, and the loss at equal seconds.

    python benchmarks/gpt2.py [--seconds 30] [--out results/gpt2]

Weights are in single precision and passes in bfloat16. The tokens are the characters of Python's standard library, so
that 128 of the 50,304 tokens occur. Each optimizer trains the same model on the same batches for equally many seconds,
evaluations not counted. `--small` takes a narrow model, to try the program on a CPU.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from relfisher import RNGD
from relfisher.studies import text
from relfisher.studies.networks import Transformer
from relfisher.studies.operations import Counted
from relfisher.studies.peers import with_adamw
from relfisher.studies.training import state_bytes

SHAPES = {False: (50_304, 1024, 768, 12, 8), True: (128, 64, 32, 2, 2)}
HELD_OUT = 64 * 1024
EVALUATIONS = 10


def muon(model):
    """Return Muon for the weights of the blocks, and AdamW for the rest."""
    weights = [parameter for parameter in model.blocks.parameters() if parameter.ndim == 2]
    return with_adamw(torch.optim.Muon(weights, lr=0.02, weight_decay=0.05), model, 6e-4, 0.05)


OPTIMIZERS = {
    "AdamW, fused": lambda model: torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    ),
    "Muon": muon,
    "RNGD": RNGD,
    "RNGD, normalized": partial(RNGD, step_rule="normalized"),
}


def train(make, device, shape, seconds):
    """Train for some seconds, and return what was measured."""
    tokens, context, width, layers, batch = shape
    torch.manual_seed(0)
    model = Transformer(tokens, context, width, layers, tied=True).to(device)
    optimizer = make(model)
    characters = text.characters().to(device)
    held_out, characters = characters[-HELD_OUT:].view(-1, context), characters[:-HELD_OUT]
    generator = torch.Generator().manual_seed(0)
    steps, passes, curve, counts, spent = [], [], [], [], 0.0

    def loss(rows, targets):
        with torch.autocast(device.type, torch.bfloat16):
            return cross_entropy(model(rows).flatten(0, 1).float(), targets.flatten())

    def drawn():
        starts = torch.randint(len(characters) - context - 1, (batch, 1), generator=generator)
        windows = characters[(starts + torch.arange(context + 1)).to(device)]
        return windows[:, :-1], windows[:, 1:]

    def evaluate():
        model.eval()
        with torch.no_grad():
            losses = [loss(part[:, :-1], part[:, 1:]).item() for part in held_out.split(batch)]
        model.train()
        curve.append((len(steps), spent, statistics.mean(losses)))

    while spent < seconds:
        rows = drawn()
        wait(device)
        start = time.perf_counter()
        optimizer.zero_grad()
        loss(*rows).backward()
        wait(device)
        middle = time.perf_counter()
        if len(steps) % 50 == 30:
            with Counted() as counted:
                optimizer.step()
            counts.append((counted.operations, counted.reads))
        else:
            optimizer.step()
        wait(device)
        end = time.perf_counter()
        steps.append(end - middle)
        passes.append(middle - start)
        before, spent = spent, spent + end - start
        if int(before / seconds * EVALUATIONS) < int(spent / seconds * EVALUATIONS):
            evaluate()
    late = len(steps) // 4
    return {
        "steps": len(steps),
        "forward and backward, ms": 1e3 * statistics.median(passes),
        "step, ms": 1e3 * statistics.median(steps[late:]),
        "mean step, ms": 1e3 * statistics.mean(steps[late:]),
        "longest step, ms": 1e3 * max(steps[late:]),
        "longest early step, ms": 1e3 * max(steps[:late]),
        "operations": counts[-1][0] if counts else None,
        "reads": counts[-1][1] if counts else None,
        "state, GB": state_bytes(optimizer) / 1e9,
        "peak, GB": torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        "validation": curve[-1][2],
        "curve": curve,
    }


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure all optimizers, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor()
    results = {}
    for method, make in OPTIMIZERS.items():
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        results[method] = train(make, device, SHAPES[arguments.small], arguments.seconds)
        gc.collect()
        print(method, {key: value for key, value in results[method].items() if key != "curve"}, flush=True)
    columns = [key for key in results["RNGD"] if key != "curve"]
    lines = [f"| {name}, torch {torch.__version__} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method, result in results.items():
        cells = ("" if result[key] is None else f"{result[key]:.4g}" for key in columns)
        lines.append(f"| {method} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / "table.md").write_text("\n".join(lines) + "\n")
        (arguments.out / "curves.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
