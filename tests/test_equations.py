"""The table of equations tells the truth: it is complete, and what it names is there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DONE, _, NOT_DONE = (ROOT / "docs" / "equations.md").read_text().partition("## Not implemented, and why")


def rows(text: str) -> list[list[str]]:
    """Return the cells of all rows of tables but their heads."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("| ") and not line.startswith(("| equation", "| statement"))
    ]


ROWS = rows(DONE)
NUMBERED = [row for row in ROWS if row[0].startswith("(")]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_equation_has_one_row() -> None:
    found = []
    for row in NUMBERED:
        first, last = (re.findall(r"\d+", row[0]) * 2)[:2] if "-" not in row[0] else re.findall(r"\d+", row[0])
        found += range(int(first), int(last) + 1)
    assert found == list(range(1, 82))


def test_what_is_not_implemented_has_a_reason() -> None:
    assert rows(NOT_DONE)
    assert all(place.startswith("Section ") and reason.endswith(".") for place, reason in rows(NOT_DONE))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_no_cell_is_empty(row: list[str]) -> None:
    assert all(row)
    assert names(row[-2])
    assert names(row[-1])


@pytest.mark.parametrize("path", sorted({path for row in ROWS for path in names(row[-2])}))
def test_functions_are_there(path: str) -> None:
    assert path.startswith("relfisher.")
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        break
    for part in parts[end:]:
        found = getattr(found, part)
    assert found.__doc__


@pytest.mark.parametrize("path", sorted({path for row in ROWS for path in names(row[-1])}))
def test_tests_are_there(path: str) -> None:
    file, _, test = path.partition("::")
    assert f"def {test or 'test_'}" in (ROOT / file).read_text()
