"""One table of all committed races by error, results/pde-* and results/field-*: where residual RNGD wins and loses.

    python benchmarks/physics.py

A line has the median error of each problem's best peer, of the methods of this library, and of dense Gauss-Newton. The
recipe is ResidualRNGD-plane where all steps have the same points, and ResidualRNGD where they are drawn for each.
"""

import json
import statistics
from pathlib import Path

from relfisher.studies.physics.methods import LIMIT, METHODS, OURS, PLANE, RESIDUAL, UNTUNED
from relfisher.studies.physics.problems import PROBLEMS
from relfisher.studies.report import ABSENT, markdown

RESULTS = Path(__file__).parents[1] / "results"
HEADER = ["problem", "points", "best peer", "its error", "recipe", "better by", UNTUNED, "RNGD", LIMIT]


def row(name: str) -> list[str]:
    """Return the line of a problem."""
    errors = json.loads((RESULTS / name / "config.json").read_text())["errors"]
    medians = {method: statistics.median(found) for method, found in errors.items() if found}
    peers = [method for method in METHODS if method in medians and method not in (*OURS, LIMIT)]
    best = min(peers, key=medians.__getitem__)
    fresh = PROBLEMS[name].fresh
    recipe = medians[RESIDUAL if fresh else PLANE]
    rest = [f"{medians[method]:.2g}" if method in medians else ABSENT for method in (UNTUNED, "RNGD", LIMIT)]
    drawn = "drawn" if fresh else "fixed"
    return [
        f"[{PROBLEMS[name].title}](results/{name}/table.md)",
        drawn,
        best,
        f"{medians[best]:.2g}",
        f"{recipe:.2g}",
        f"{medians[best] / recipe:.2g}",
        *rest,
    ]


if __name__ == "__main__":
    print(markdown(HEADER, [row(name) for name in PROBLEMS if (RESULTS / name / "config.json").exists()], 3), end="")
