"""The README is true: its Python runs, its commands exist, its files are there."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from relfisher import RNGD, Metric

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippets_run(snippet, capsys):
    """What they print is there, their optimizers train all of the model, and their metrics are metrics."""
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(snippet, "README.md", "exec"), found)
    assert bool(capsys.readouterr().out) == ("print(" in snippet)
    for made in found.values():
        if isinstance(made, RNGD):
            trained = {parameter for group in made.param_groups for parameter in group["params"]}
            assert trained == set(found["model"].parameters())
            assert made.health.skipped_steps == 0
        if isinstance(made, Metric):
            dense = made.to_dense()
            torch.testing.assert_close(dense, dense.T)
            assert float(torch.linalg.eigvalsh(dense)[-1]) > 0


def test_there_is_a_snippet_for_each_of_the_two_readers():
    assert any("RNGD(" in snippet for snippet in SNIPPETS)
    assert any("layer_metric(" in snippet for snippet in SNIPPETS)


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)#]+)", README))
def test_links_lead_to_files(target):
    assert (ROOT / target).exists()


@pytest.mark.parametrize("target", re.findall(r"`?make (\w+)", README))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
