"""The support matrix, made of the `supports` markers of the tests: python tests/support.py > docs/support.md."""

import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = [ROOT / "tests" / room for room in ("layers", "observe", "optim", "clients")]

HEAD = """# Support matrix

Made of the tests themselves by `python tests/support.py > docs/support.md`: a row says what is verified of which
layers, and by how many cases of which test. A test checks that this page is what they say. Where sizes and values are
drawn at random, a case stands for many draws.

| layers | what is verified | cases | test |
|---|---|---|---|"""


def matrix(items: Iterable[pytest.Item]) -> str:
    """Return the page for the collected tests."""
    cases: Counter[tuple[str, str, str]] = Counter()
    for item in items:
        for marker in item.iter_markers("supports"):
            what, *layers = marker.args
            test = f"{item.path.relative_to(ROOT).as_posix()}::{item.originalname}"
            cases[", ".join(f"`{layer}`" for layer in layers), what, test] += 1
    rows = [f"| {layers} | {what} | {count} | `{test}` |" for (layers, what, test), count in sorted(cases.items())]
    return "\n".join([HEAD, *rows]) + "\n"


class Printer:
    """Prints the page once the tests are collected."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        sys.stdout.write(matrix(session.items))


if __name__ == "__main__":
    options = ["--collect-only", "-p", "no:terminal", "-p", "no:xdist"]
    sys.exit(pytest.main([*options, *map(str, ROOMS)], plugins=[Printer()]))
