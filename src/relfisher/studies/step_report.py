"""The output of `relfisher bench step`: a table per workload, all numbers, and the growth of cost with width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from relfisher.studies.figures import STYLE
from relfisher.studies.report import ABSENT, Report, markdown
from relfisher.studies.step import Timing
from relfisher.studies.workloads import WORKLOADS

__all__ = [
    "BATCHES",
    "BATCHES_WIDTH",
    "GROWTH_METHODS",
    "HEADER",
    "STEP_WORKLOADS",
    "WIDTHS",
    "growth_figure",
    "growth_rows",
    "report",
    "rows",
]

BASE = "Adam"
STEP_WORKLOADS = ("mlp", "mlp-500", "autoencoder", "cnn", "transformer")
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
BATCHES = (16, 64, 256, 1024, 4096)
BATCHES_WIDTH = 256
GROWTH_METHODS = (BASE, "RNGD")
COLORS = {BASE: "#8a8a8a", "RNGD": "#d1345b"}
LINE: dict[str, Any] = {"linewidth": 2, "marker": "o"}
HEADER = (
    "method",
    "ms",
    "range",
    f"x {BASE}",
    "median step",
    "p99/median",
    "state MB",
    f"x {BASE}",
    "peak MB",
    f"x {BASE}",
    "operations",
    "reads",
    "iterations",
)
NOTES = f"""
An iteration is zero_grad, forward, backward and step. ms: mean time per iteration, as the median and range over the
repeats; it includes infrequent work, such as inverting a metric. Methods take turns in short blocks, with the same
initial weights and batches. Median step, p99/median: of single iterations. State: all tensors that the optimizer
keeps. Peak: the peak memory growth of a training process, without the data. x {BASE}: relative to torch's default
{BASE}. Operations: those that a step without infrequent work dispatches, each of which is a launch on a GPU. Reads:
those among them with which the host reads a number, for which it waits on a GPU.
"""

Growth = Mapping[int, Sequence[Timing]]


def rows(timings: Sequence[Timing]) -> list[list[str]]:
    """Return the rows of a workload's table.

    Args:
        timings: one timing per method; without the base method, the ratios stay empty.

    Returns:
        The rows as text, with the columns of `HEADER`.
    """
    base = next((timing for timing in timings if timing.method == BASE), None)
    return [_row(timing, base) for timing in timings]


def growth_rows(growth: Growth) -> list[list[str]]:
    """Return the time and state of each method and the ratio of their times, with one row per size."""
    return [
        [
            str(size),
            *(text for timing in timings for text in (f"{1e3 * timing.seconds:.2f}", _megabytes(timing.state_bytes))),
            f"{_ratio(timings):.2f}",
        ]
        for size, timings in growth.items()
    ]


def growth_figure(widths: Growth, batches: Growth) -> Figure:
    """Draw time and state against width, and the ratio of times against batch size.

    Args:
        widths: the timings of each width.
        batches: the timings of each batch size.

    Returns:
        The figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 4.6), dpi=150)
        time, state, ratio = figure.subplots(1, 3)
        for number, first in enumerate(next(iter(widths.values()))):
            timings = [timings[number] for timings in widths.values()]
            style: dict[str, Any] = {"color": COLORS[first.method], "label": first.method, **LINE}
            time.plot(list(widths), [1e3 * timing.seconds for timing in timings], **style)
            state.plot(list(widths), [timing.state_bytes / 1e6 for timing in timings], **style)
        time.set(ylabel="an iteration (ms)", yscale="log")
        state.set(ylabel="optimizer state (MB)", yscale="log")
        for axes in (time, state):
            axes.legend(loc="upper left", frameon=False)
            _count(axes, "width, batch 256", list(widths))
        ratio.plot(list(batches), [_ratio(timings) for timings in batches.values()], color=COLORS["RNGD"], **LINE)
        ratio.axhline(1.0, color=COLORS[BASE], linewidth=1)
        ratio.set(ylabel=f"an iteration of RNGD over {BASE}'s", ylim=(0, None))
        _count(ratio, f"batch, width {BATCHES_WIDTH}", list(batches))
        figure.suptitle("784-width-width-10 ReLU network", x=0.05, ha="left", fontsize=13, weight="bold")
        figure.tight_layout()
    return figure


def report(found: Mapping[str, Sequence[Timing]], widths: Growth, batches: Growth) -> Report:
    """Report the measurements.

    Args:
        found: the timings of each workload.
        widths: the timings of each width; empty if growth was not measured.
        batches: the timings of each batch size; empty if growth was not measured.

    Returns:
        The tables, the numbers and, if growth was measured, a figure.
    """
    tables: dict[str, tuple[Sequence[str], list[list[str]]]]
    tables = {f"{name}: {WORKLOADS[name].title}": (HEADER, rows(timings)) for name, timings in found.items()}
    about: dict[str, object] = {"workloads": {name: list(map(_numbers, timings)) for name, timings in found.items()}}
    for size, growth, fixed in (("width", widths, "batch 256"), ("batch", batches, f"width {BATCHES_WIDTH}")):
        if growth:
            title = f"growth with the {size}: 784-width-width-10 ReLU, {fixed}"
            tables[title] = (_growth_header(size, growth), growth_rows(growth))
            about[f"growth with the {size}"] = {each: list(map(_numbers, timings)) for each, timings in growth.items()}
    return Report(
        table="\n".join(f"## {title}\n\n" + markdown(*table) for title, table in tables.items()) + NOTES,
        about=about,
        about_name="steps",
        threads=[torch.get_num_threads()],
        figures={"growth": growth_figure(widths, batches)} if widths else {},
    )


def _growth_header(size: str, growth: Growth) -> list[str]:
    columns = (f"{timing.method}, {unit}" for timing in next(iter(growth.values())) for unit in ("ms", "state MB"))
    return [size, *columns, f"RNGD x {BASE}"]


def _ratio(timings: Sequence[Timing]) -> float:
    base, ours = timings
    return ours.seconds / base.seconds


def _count(axes: Axes, label: str, sizes: Sequence[int]) -> None:
    axes.set(xscale="log", xlabel=label)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()


def _row(timing: Timing, base: Timing | None) -> list[str]:
    if timing.note:
        return [timing.method, timing.note, *[ABSENT] * (len(HEADER) - 2)]

    def ratio(name: str) -> str:
        mine, of_base = getattr(timing, name), getattr(base, name, None)
        return f"{mine / of_base:.2f}" if mine is not None and of_base else ABSENT

    return [
        timing.method,
        f"{1e3 * timing.seconds:.2f}",
        f"{1e3 * min(timing.repeats):.2f} to {1e3 * max(timing.repeats):.2f}",
        ratio("seconds"),
        f"{1e3 * float(np.median(timing.steps)):.2f}",
        f"{timing.tail:.1f}",
        _megabytes(timing.state_bytes),
        ratio("state_bytes"),
        ABSENT if timing.peak_bytes is None else _megabytes(timing.peak_bytes),
        ratio("peak_bytes"),
        str(timing.operations),
        str(timing.reads),
        str(len(timing.steps)),
    ]


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.3g}"


def _numbers(timing: Timing) -> dict[str, object]:
    """Return the timing as a dictionary, with its single steps, which are many, in whole microseconds."""
    return {**asdict(timing), "steps": [round(1e6 * seconds) for seconds in timing.steps]}
