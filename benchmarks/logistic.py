"""Race `relfisher.LogisticRegression` against scikit-learn's solvers to the same gradient norm, on Fashion-MNIST.

    OMP_NUM_THREADS=1 python benchmarks/logistic.py --out results/logistic

Each solver uses the loosest tolerance of a grid with which the largest entry of the gradient, computed here for all
solvers, is below the target. The fastest of three such fits is reported, by processor time, which depends less on
other programs than wall-clock time. Fits that exceed the time limit or miss the target stay in the table.
"""

from __future__ import annotations

import argparse
import csv
import io
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression as Reference

from relfisher.files import write_atomically
from relfisher.logistic import LogisticRegression
from relfisher.logistic.newton import LogisticObjective
from relfisher.studies.data import load

SOLVERS = ("natural gradient", "newton-cholesky", "newton-cg", "lbfgs")
FACTORS = (10.0, 1.0, 0.1, 0.01)
HEADER = ("data", "n", "D", "C", "target", "solver", "seconds", "processor_seconds", "steps", "gradient", "objective")
# scikit-learn forms the whole 7850 x 7850 Hessian.
TOO_LARGE = "newton-cholesky"

Model = LogisticRegression | Reference


def tasks(only: list[str]) -> list[tuple[str, NDArray[np.float64], NDArray[np.int64], float, float]]:
    """Return the name, samples, labels, C and target of each race."""
    data = load("fashion-mnist")
    x = torch.cat([data.train_images, data.validation_images]).double().numpy()
    y = torch.cat([data.train_labels, data.validation_labels]).numpy()
    pairs = {"T-shirt vs shirt": (0, 6), "pullover vs coat": (2, 4)}
    found = []
    for name, classes in pairs.items():
        chosen = np.isin(y, classes)
        found += [(name, x[chosen], y[chosen], C, target) for C in (1.0, 0.01) for target in (1e-4, 1e-7)]
    found.append(("ten classes", x[:12000], y[:12000], 1.0, 1e-4))
    found.append(("ten classes", x[:12000], y[:12000], 0.01, 1e-4))
    found.append(("ten classes", x, y, 0.01, 1e-4))
    return [task for task in found if not only or task[0] in only]


def model(solver: str, C: float, tolerance: float) -> Model:
    """Return an unfitted classifier."""
    if solver == SOLVERS[0]:
        return LogisticRegression(C=C, tol=tolerance, max_iter=1000)
    return Reference(solver=solver, C=C, tol=tolerance, max_iter=5000)


def reached(fitted: Model, x: NDArray[np.float64], y: NDArray[np.int64], C: float) -> tuple[float, float]:
    """Return the largest entry of the gradient, and the objective, at the weights of a fit."""
    classes, labels = np.unique(y, return_inverse=True)
    objective = LogisticObjective(
        torch.from_numpy(x), torch.from_numpy(labels), classes=len(classes), penalty=1 / (C * len(x)), bias=True
    )
    weights = torch.from_numpy(np.column_stack([fitted.coef_, fitted.intercept_]))
    scores = objective.scores(weights)
    gradient = objective.gradient(objective.probabilities(scores), weights)
    return float(gradient.abs().max()), objective.value(scores, weights)


def race(
    solver: str, x: NDArray[np.float64], y: NDArray[np.int64], C: float, target: float, limit: float
) -> tuple[float, float, int, float, float]:
    """Return the seconds, processor seconds, steps, gradient and objective of a solver's best fit."""
    for factor in FACTORS:
        clock, processor = time.perf_counter(), time.process_time()
        fitted = model(solver, C, factor * target).fit(x, y)
        times = [(time.process_time() - processor, time.perf_counter() - clock)]
        gradient, objective = reached(fitted, x, y, C)
        if gradient <= target or times[0][0] > limit:
            break
    while len(times) < 3 and sum(spent for spent, _ in times) < limit:
        clock, processor = time.perf_counter(), time.process_time()
        model(solver, C, factor * target).fit(x, y)
        times.append((time.process_time() - processor, time.perf_counter() - clock))
    processor_seconds, seconds = min(times)
    return seconds, processor_seconds, int(np.max(fitted.n_iter_)), gradient, objective


def markdown(lines: list[tuple[object, ...]]) -> str:
    """Return the table."""
    rows = [HEADER, ("---",) * len(HEADER), *lines]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows) + (
        f"\nThreads: {torch.get_num_threads()}. Best of up to three fits by processor time. Gradient: largest entry, of"
        " mean loss + |W|^2 / (2 C n). newton-cholesky is left out for ten classes: it forms a 7850 x 7850 matrix.\n"
    )


def main() -> None:
    """Run the races and update the table after each."""
    parser = argparse.ArgumentParser(description="Race logistic regression solvers.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", action="append", default=[], help="name of a race")
    parser.add_argument("--limit", type=float, default=30.0, help="processor seconds after which nothing is repeated")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    lines: list[tuple[object, ...]] = []
    for name, x, y, C, target in tasks(arguments.only):
        for solver in SOLVERS:
            if solver == TOO_LARGE and name == "ten classes":
                continue
            seconds, processor, steps, gradient, objective = race(solver, x, y, C, target, arguments.limit)
            numbers = (f"{seconds:.2f}", f"{processor:.2f}", steps, f"{gradient:.1e}", f"{objective:.9f}")
            lines.append((name, len(x), x.shape[1] + 1, C, target, solver, *numbers))
            print(*lines[-1], sep="\t", flush=True)
        write_atomically(arguments.out / "table.md", markdown(lines).encode())
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([HEADER, *lines])
        write_atomically(arguments.out / "table.csv", text.getvalue().encode())


if __name__ == "__main__":
    main()
