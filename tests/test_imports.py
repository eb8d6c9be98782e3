"""Imports flow one way: responses -> metric -> structures -> layers -> observe -> optim -> studies, and never back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "relfisher"

# A module imports from its own level or from levels above it in this list.
LEVELS = (
    {"shapes", "validation", "files", "memory", "evaluation", "registry", "shards", "distributions"},
    {"information", "moments"},
    {"responses"},
    {"metric"},
    {"pullback"},
    {"autodiff"},
    {"structures"},
    {"layers"},
    {"observe"},
    {"diagnostics", "along", "optim", "logistic"},
    {"testing"},
    {"__init__"},
    {"studies"},
    {"cli"},
)
LEVEL = {name: place for place, names in enumerate(LEVELS) for name in names}


def room(path):
    """Return the top-level module or package of a file."""
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported(path):
    """Return the rooms that a file imports at run time."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "relfisher":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [a.name if a.name in LEVEL else "__init__" for a in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "relfisher":
                    yield parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_never_run_backwards(path):
    here = room(path)
    for other in imported(path):
        assert LEVEL[other] <= LEVEL[here], f"{here} imports {other}, which comes after it"


def test_a_backward_import_would_be_seen(tmp_path):
    path = tmp_path / "metric.py"
    path.write_text("from relfisher.optim import RNGD\nfrom relfisher import studies\nimport relfisher.cli\n")
    assert sorted(imported(path)) == ["cli", "optim", "studies"]


def test_the_core_needs_nothing_but_torch():
    """With every optional package out of reach, the library imports and takes a step."""
    code = """
import sys
for name in ("numpy", "scipy", "matplotlib", "mlxtend", "rich", "typer", "pooch", "sklearn", "jaxtyping", "beartype"):
    sys.modules[name] = None
import warnings
warnings.simplefilter("ignore")  # torch itself asks for numpy
import torch, relfisher
model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
optimizer = relfisher.RNGD(model)
torch.nn.functional.cross_entropy(model(torch.ones(4, 3)), torch.tensor([0, 1, 0, 1])).backward()
optimizer.step()
metric = relfisher.module_metric(model, "0", torch.ones(4, 3))
assert metric.solve(torch.ones(8), damping=0.1).isfinite().all()
heavy = {"relfisher.studies", "relfisher.cli"} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
