"""One table of all committed races by error, results/pde-*, field-* and map-*: where residual RNGD wins and loses.

    python benchmarks/physics.py

A line has the median error of each problem's best peer, of the methods of this library, and of dense Gauss-Newton.
"""

import json
import statistics
from pathlib import Path

from relfisher.studies.physics.methods import LIMIT, OURS, RATE, RESIDUAL, UNTUNED
from relfisher.studies.physics.problems import PROBLEMS
from relfisher.studies.report import ABSENT, markdown

RESULTS = Path(__file__).parents[1] / "results"
HEADER = ["problem", "points", "best peer", "its error", RESIDUAL, "ahead", UNTUNED, RATE, "RNGD", LIMIT]


def told(ratio):
    """Return by how much the tuned method is ahead, as a fraction of 1 where it is far behind."""
    return f"{ratio:.2g}" if ratio > 0.1 else f"1/{1 / ratio:,.0f}"


def row(name: str) -> list[str]:
    """Return the line of a problem; "ahead" is the best peer's error over that of the tuned method."""
    errors = json.loads((RESULTS / name / "config.json").read_text())["errors"]
    medians = {method: statistics.median(found) for method, found in errors.items() if found}
    best = min((method for method in medians if method not in (*OURS, LIMIT)), key=medians.__getitem__)
    problem = PROBLEMS[name]
    others = [f"{medians[each]:.2g}" if each in medians else ABSENT for each in HEADER[6:]]
    return [
        f"[{problem.title}](results/{name}/table.md)",
        "drawn" if problem.fresh else "fixed",
        best,
        f"{medians[best]:.2g}",
        f"{medians[RESIDUAL]:.2g}",
        told(medians[best] / medians[RESIDUAL]),
        *others,
    ]


if __name__ == "__main__":
    print(markdown(HEADER, [row(name) for name in PROBLEMS if (RESULTS / name / "config.json").exists()], 3), end="")
