"""From a question about section 5.2 to a directory with its answer: plan, train, write figure and tables."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from relfisher.studies import figures, tables
from relfisher.studies.data import Dataset
from relfisher.studies.mlp import BATCH_SIZE, METHODS, WIDTHS
from relfisher.studies.runs import write_atomically
from relfisher.studies.study import Outcome, Study

__all__ = ["EPOCHS", "QUICK_EPOCHS", "Invocation", "plan", "surroundings", "write_results"]

EPOCHS = 50
QUICK_EPOCHS = 16


@dataclass(frozen=True)
class Invocation:
    """What the results do not depend on, apart from their seconds, but a reader wants to know."""

    command: str
    jobs: int


def plan(
    data: Dataset,
    *,
    methods: tuple[str, ...] = tuple(METHODS),
    quick: bool = False,
    epochs: int | None = None,
    seeds: int = 1,
    grids: Mapping[str, tuple[float, ...]] | None = None,
) -> Study:
    """Says which runs section 5.2 takes.

    Args:
        data: What is trained on.
        methods: Names from `METHODS`, in the order in which they appear.
        quick: Fewer epochs, for a first look.
        epochs: Passes over the training images, if not the usual number.
        seeds: How many seeds the chosen learning rate of each method gets.
        grids: Learning-rate candidates that replace a method's usual ones.

    Returns:
        The comparison.
    """
    usual = {name: METHODS[name].grid for name in methods}
    settings: dict[str, str | int | float] = {
        "data": data.name,
        "fingerprint": data.fingerprint(),
        "epochs": epochs or (QUICK_EPOCHS if quick else EPOCHS),
        "batch_size": BATCH_SIZE,
        "relfisher": version("relfisher"),
    }
    return Study("mlp", usual | dict(grids or {}), seeds, settings)


def write_results(outcome: Outcome, data: Dataset, invocation: Invocation, directory: Path) -> tuple[Path, Path]:
    """Writes figure, table, grid, curves and configuration.

    Args:
        outcome: The finished study.
        data: What was trained on.
        invocation: How the study was started.
        directory: Where to.

    Returns:
        The paths of the table and of the picture.
    """
    table = tables.rows(outcome)
    files = {
        "table.md": tables.table_markdown(table).encode(),
        "table.csv": tables.table_csv(table).encode(),
        "grid.csv": tables.grid_csv(outcome).encode(),
        "curves.csv.gz": tables.curves_csv_gz(outcome),
        "config.json": (json.dumps(_configuration(outcome, data, invocation), indent=2) + "\n").encode(),
    }
    for name, content in files.items():
        write_atomically(directory / name, content)
    picture, _ = figures.save(figures.figure5(outcome, _title(data)), directory)
    return directory / "table.md", picture


def _title(data: Dataset) -> str:
    widths = "-".join(map(str, WIDTHS))
    return f"{widths} ReLU network, {len(data.train_labels):,} images of {data.name}, batch {BATCH_SIZE}"


def _configuration(outcome: Outcome, data: Dataset, invocation: Invocation) -> dict[str, object]:
    study = outcome.study
    return {
        "command": invocation.command,
        "settings": dict(study.settings),
        "widths": WIDTHS,
        "training_images": len(data.train_labels),
        "validation_images": len(data.validation_labels),
        "seeds": study.seeds,
        "grids": dict(study.grids),
        "chosen": outcome.chosen,
        **surroundings(invocation, {record.threads for record in outcome.records.values()}),
    }


def surroundings(invocation: Invocation, threads: Iterable[int]) -> dict[str, object]:
    """Says with which packages and on which machine results were made, for their `config.json`.

    Args:
        invocation: How they were made.
        threads: The numbers of threads that the runs had.

    Returns:
        Entries of the configuration.
    """
    packages = ("relfisher", "torch", "numpy", "matplotlib")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "jobs": invocation.jobs,
            "threads_per_run": sorted(set(threads)),
            "torch_threads": torch.get_num_threads(),
        },
    }


def _processor() -> str:
    """The processor's name; Python alone knows only its architecture on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
