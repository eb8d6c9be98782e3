"""The page on geometry is true: its Python runs, and its pictures are there."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "geometry.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def test_an_unknown_layer_takes_information_away(capsys):
    (snippet,) = [each for each in SNIPPETS if "adjusted_for" in each]
    found = {}
    exec(compile(snippet, "geometry.md", "exec"), found)
    known, unknown = found["known"], found["unknown"]
    assert 0 < unknown.trace() < known.trace()
    assert unknown.rank() <= known.rank()
    assert capsys.readouterr().out


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)", PAGE))
def test_links_lead_to_files(target):
    assert (DOCS / target).exists()
