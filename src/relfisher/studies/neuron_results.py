"""From the curves of section 5.1 to a directory: figure, tables, every configuration and how it was made."""

from __future__ import annotations

import json
from pathlib import Path

from relfisher.studies import figures, neuron_tables
from relfisher.studies.data import Dataset
from relfisher.studies.descent import DAMPING
from relfisher.studies.neuron import LEARNING_RATES, MOMENTUMS
from relfisher.studies.neuron_figures import figure4
from relfisher.studies.neuron_study import NeuronOutcome
from relfisher.studies.reproduce import Invocation, surroundings
from relfisher.studies.runs import write_atomically

__all__ = ["write_neuron_results"]


def write_neuron_results(
    outcome: NeuronOutcome, data: Dataset, invocation: Invocation, directory: Path
) -> tuple[Path, Path]:
    """Writes figure, table, grid, curves and configuration.

    Args:
        outcome: The finished study.
        data: What was trained on.
        invocation: How the study was started.
        directory: Where to.

    Returns:
        The paths of the table and of the picture.
    """
    files = {
        "table.md": neuron_tables.table_markdown(outcome).encode(),
        "table.csv": neuron_tables.table_csv(outcome).encode(),
        "grid.csv": neuron_tables.grid_csv(outcome).encode(),
        "curves.csv.gz": neuron_tables.curves_csv_gz(outcome),
        "config.json": (json.dumps(_configuration(outcome, invocation), indent=2) + "\n").encode(),
    }
    for name, content in files.items():
        write_atomically(directory / name, content)
    picture, _ = figures.save(figure4(outcome, data.name), directory, "figure4")
    return directory / "table.md", picture


def _configuration(outcome: NeuronOutcome, invocation: Invocation) -> dict[str, object]:
    study = outcome.study
    return {
        "command": invocation.command,
        "settings": dict(study.settings),
        "panels": [str(panel) for panel in study.panels],
        "methods": study.methods,
        "learning_rates": LEARNING_RATES,
        "momentums": MOMENTUMS,
        "damping": DAMPING,
        **surroundings(invocation, {curves.threads for curves in outcome.curves.values()}),
    }
