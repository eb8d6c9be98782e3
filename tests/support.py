"""The support matrix, made of the `supports` markers of the tests: python tests/support.py > docs/support.md."""

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HEAD = """# Support matrix

Made of the tests themselves by `python tests/support.py > docs/support.md`: a row says what is verified of which
layers, and by how many cases of which test. A test checks that this page is what they say. Where sizes and values are
drawn at random, a case stands for many draws.

| layers | what is verified | cases | test |
|---|---|---|---|"""


class Collector:
    """Counts the cases of each test that has the marker."""

    def __init__(self) -> None:
        self.cases: Counter[tuple[str, str, str, str]] = Counter()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for marker in item.iter_markers("supports"):
                what, *layers = marker.args
                name = item.originalname
                path = item.path.relative_to(ROOT).as_posix()
                self.cases[", ".join(f"`{layer}`" for layer in layers), what, path, name] += 1


def matrix() -> str:
    """Return the page."""
    collector = Collector()
    rooms = [str(ROOT / "tests" / room) for room in ("optim", "subsystems", "clients")]
    status = pytest.main(["--collect-only", "-p", "no:terminal", "-p", "no:xdist", *rooms], plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(f"the tests cannot be collected: {status!r}")
    rows = [
        f"| {layers} | {what} | {count} | `{path}::{name}` |"
        for (layers, what, path, name), count in sorted(collector.cases.items())
    ]
    return "\n".join([HEAD, *rows]) + "\n"


if __name__ == "__main__":
    sys.stdout.write(matrix())
