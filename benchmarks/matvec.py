"""Measure the time of `metric @ v` relative to the two matrix products that it consists of.

The metric of a layer acts on V [out, in + 1] as (F (X V'))' X / n. The plain products are X V' and R' X alone, with the
same X and without the bias, so that the ratio covers everything that the operator adds: the bias, F, the mean and
Python.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from relfisher import layer_metric, responses

SAMPLES, INPUTS, OUT = 4096, 512, 512
REPEATS = 60
TARGET = 1.5
RESPONSES = {
    "linear": responses.LinearGaussian(),
    "tanh": responses.TanhBernoulli(),
    "softmax": responses.Categorical(),
}


def milliseconds(function: Callable[[], object]) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


def cases() -> dict[str, Callable[[], object]]:
    """Return the plain products and the metric's product for each response, on the same random data."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(SAMPLES, INPUTS), torch.randn(OUT, INPUTS) / INPUTS**0.5, torch.randn(OUT)
    v, plain = torch.randn(OUT, INPUTS + 1), torch.randn(OUT, INPUTS)
    found: dict[str, Callable[[], object]] = {"two plain products": lambda: (x @ plain.T).T @ x}
    for name, response in RESPONSES.items():
        metric = layer_metric(x, weight, bias, response)
        found[f"`metric @ v`, {name}"] = lambda metric=metric: metric @ v
    return found


def measure(functions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Return the times of each function, measured in alternation, so that other load slows all of them equally."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(REPEATS + 5):
        for name, function in functions.items():
            taken = milliseconds(function)
            if repeat >= 5:
                times[name].append(taken)
    return times


def table(times: dict[str, list[float]]) -> str:
    """Return the times as Markdown: medians, quartiles and the median of the ratios within a turn."""
    plain = times["two plain products"]
    lines = ["| product | median, ms | quartiles, ms | times the plain products |", "|---|---|---|---|"]
    for name, taken in times.items():
        low, median, high = statistics.quantiles(taken, n=4)
        ratio = statistics.median(one / other for one, other in zip(taken, plain, strict=True))
        lines.append(f"| {name} | {median:.2f} | {low:.2f} to {high:.2f} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    times = measure(cases())
    print(f"{SAMPLES} samples, {INPUTS} inputs, {OUT} outputs, float32, {torch.get_num_threads()} threads, ", end="")
    print(f"{REPEATS} turns; target at most {TARGET} times the plain products\n")
    print(table(times))


if __name__ == "__main__":
    main()
