"""The support matrix in the docs is what the tests say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_made_of_the_tests():
    run = subprocess.run([sys.executable, "tests/support.py"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (ROOT / "docs" / "support.md").read_text(), "python tests/support.py > docs/support.md"
