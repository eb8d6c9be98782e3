"""Train public programs with the optimizers of their authors, with tuned ones, and with RNGD at its defaults.

    python benchmarks/programs/run.py [NAME ...] [--seeds 3] [--out results/programs]

Runs that are finished are kept: an interrupted command goes on where it was. All run with one thread, on the
processor's time. The table compares the best validation errors, and the time and steps of RNGD to that of the program.
"""

import argparse
import importlib
import json
import statistics
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from relfisher import RNGD

HERE = Path(__file__).parent
NAMES = sorted(
    path.stem
    for path in HERE.glob("*.py")
    if path.stem not in {"digits", "cart_pole", "graph", "language", "names", "program", "run"}
)
EVALUATIONS = 20


def methods_of(program):
    """Return all optimizers of a program by name."""
    found = {"own": program.own, **program.tuned, "RNGD": RNGD}
    if program.recipe:
        found["RNGD, recipe"] = lambda model: RNGD(model, **program.recipe)
    return found


def train(program, make, seed):
    """Train once, and return the curve [step, seconds, error], and what else was measured."""
    torch.manual_seed(seed)
    task = program.make(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        turns = [(*turn, make(turn[0])) for turn in (task.rival, (task.model, task.loss)) if turn is not None]
        curve, spent = [], 0.0
        for step in range(program.steps):
            start = time.process_time()
            for model, loss_of, optimizer in turns:
                optimizer.zero_grad()
                loss = loss_of(step)
                loss.backward()
                if task.clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), task.clip)
                optimizer.step()
            spent += time.process_time() - start
            if not torch.isfinite(loss):
                break
            if (step + 1) * EVALUATIONS // program.steps > step * EVALUATIONS // program.steps:
                task.model.eval()
                with torch.no_grad():
                    curve.append((step + 1, spent, task.error()))
                task.model.train()
    return {
        "curve": curve,
        "milliseconds": 1e3 * spent / program.steps,
        "share": adamw_share([optimizer for _, _, optimizer in turns]),
    }


def adamw_share(optimizers):
    """Return the share of the numbers that RNGD leaves to AdamW; None for other optimizers."""
    if not isinstance(optimizers[0], RNGD):
        return None
    left = sum(p.numel() for each in optimizers for p, state in each.state.items() if "exp_avg" in state)
    return left / sum(p.numel() for each in optimizers for group in each.param_groups for p in group["params"])


def best(run):
    """Return the lowest error of a run."""
    return min((error for _, _, error in run["curve"]), default=float("inf"))


def results_of(name, seeds, out):
    """Run all methods of a program that have not run yet, and return the runs by method."""
    program = importlib.import_module(name).PROGRAM
    path = out / "runs" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = json.loads(path.read_text()) if path.exists() else {}

    def run(method, seed):
        key = f"{method} / {seed}"
        if key not in done:
            done[key] = train(program, methods_of(program)[method], seed)
            path.with_suffix(".new").write_text(json.dumps(done))
            path.with_suffix(".new").replace(path)
            print(f"{name}: {key}: {best(done[key]):.4g} in {done[key]['curve'][-1][1]:.1f} s", flush=True)
        return done[key]

    first = {method: run(method, 0) for method in program.tuned}
    tuned = min(first, key=lambda method: best(first[method]))
    fixed = [method for method in methods_of(program) if method not in program.tuned]
    return program, tuned, {method: [run(method, seed) for seed in range(seeds)] for method in [*fixed, tuned]}


def verdict(ours, theirs):
    """Return whether our errors are lower: by more than the standard error of the difference of means."""
    mine, its = ([best(run) for run in runs] for runs in (ours, theirs))
    error = sum(statistics.variance(each) / len(each) for each in (mine, its)) ** 0.5 if len(mine) > 1 else 0.0
    difference = statistics.mean(mine) - statistics.mean(its)
    return "level" if abs(difference) <= error else "better" if difference < 0 else "worse"


def reached(runs, target):
    """Return the mean step and seconds at which runs reach an error; None if one does not."""
    found = [next(((step, spent) for step, spent, error in run["curve"] if error <= target), None) for run in runs]
    return None if None in found else tuple(statistics.mean(each) for each in zip(*found, strict=True))


def spread(runs):
    """Return the mean of the best errors, and their standard deviation."""
    errors = [best(run) for run in runs]
    deviation = statistics.stdev(errors) if len(errors) > 1 else 0.0
    return f"{statistics.mean(errors):.4g} ± {deviation:.1g}"


def row(program, tuned, runs):
    """Return the line of a program."""
    own, ours = runs["own"], runs["RNGD"]
    target = statistics.mean(best(run) for run in own)
    soon = reached(ours, target)
    first = reached(own, max(best(run) for run in own))
    speed = "-" if soon is None or first is None else f"{soon[0] / first[0]:.2f} / {soon[1] / first[1]:.2f}"
    milliseconds = (f"{statistics.mean(run['milliseconds'] for run in each):.1f}" for each in (own, ours))
    recipe = spread(runs["RNGD, recipe"]) if "RNGD, recipe" in runs else ""
    against = verdict(ours, own), verdict(ours, runs[tuned])
    cells = (program.title, program.measure, spread(own), f"{spread(runs[tuned])} ({tuned})", spread(ours), recipe)
    return [*cells, *against, speed, " / ".join(milliseconds), f"{100 * ours[0]['share']:.2g} %"]


HEADER = (
    *("program", "validation", "own settings", "best of the tuned", "`RNGD(model)`", "with the recipe"),
    *(
        "against own",
        "against tuned",
        "steps / seconds to own best, as shares",
        "ms a step, own / RNGD",
        "left to AdamW",
    ),
)


def ratio(runs, other):
    """Return the mean error of RNGD over that of another method."""
    ours, theirs = (statistics.mean(best(run) for run in runs[method]) for method in ("RNGD", other))
    return ours / theirs


def draw(rows, path):
    """Draw the errors of RNGD relative to those of the program and of the tuned optimizer, the lowest at the top."""
    ordered = sorted(rows, key=lambda each: -ratio(each[2], "own"))
    figure, axis = plt.subplots(figsize=(9, 1 + 0.26 * len(rows)), layout="constrained")
    places = range(len(ordered))
    for place, (_, tuned, runs) in enumerate(ordered):
        axis.plot([ratio(runs, "own"), ratio(runs, tuned)], [place, place], color="lightgrey", zorder=0)
    own = [ratio(runs, "own") for _, _, runs in ordered]
    axis.plot(own, places, "o", color="tab:blue", label="the program's own settings")
    tuned = [ratio(runs, name) for _, name, runs in ordered]
    axis.plot(tuned, places, "s", color="tab:orange", markersize=5, label="the best of the tuned")
    axis.axvline(1, color="grey", linewidth=0.8)
    axis.set(xscale="log", xlabel="validation error of RNGD(model), relative to", ylim=(-1, len(rows)))
    axis.set_yticks(places, [program.title for program, _, _ in ordered], fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=130)


def main():
    """Run the programs that are named, or all; write and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help=", ".join(NAMES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/programs"))
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"no program is called {', '.join(unknown)}: there are {', '.join(NAMES)}")
    torch.set_num_threads(1)
    found = {name: results_of(name, arguments.seeds, arguments.out) for name in arguments.names}
    rows = [row(*each) for each in found.values()]
    counts = [[cells[place] for cells in rows] for place in (6, 7)]
    summary = " ".join(
        f"Against {whom}: not worse on {len(rows) - each.count('worse')} of {len(rows)} (better on "
        f"{each.count('better')}, level on {each.count('level')}, worse on {each.count('worse')})."
        for whom, each in zip(("the programs' own settings", "the best of the tuned"), counts, strict=True)
    )
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEADER, ["---"] * len(HEADER), *rows)]
    text = "\n".join([*lines, "", summary, ""])
    (arguments.out / "table.md").write_text(text)
    draw(list(found.values()), arguments.out / "programs.png")
    print(text)


if __name__ == "__main__":
    main()
