"""The recipes of the documentation run as they are, and train all of their models with a metric."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from relfisher import RNGD

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
SNIPPETS = re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("kind", "snippet"), SNIPPETS, ids=[kind for kind, _ in SNIPPETS])
def test_recipes_run_without_a_warning_and_every_layer_has_a_metric(kind, snippet):
    torch.manual_seed(0)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(snippet, kind, "exec"), found)
    optimizers = [made for made in found.values() if isinstance(made, RNGD)]
    assert optimizers
    for optimizer in optimizers:
        assert optimizer.health.skipped_steps == 0
        assert not any("exp_avg" in state for state in optimizer.state.values())
        assert all(layer.structure is not None for layer in optimizer.layers)


def test_every_kind_but_the_last_has_a_snippet():
    assert len(SNIPPETS) == len(re.findall(r"^## ", PAGE, re.MULTILINE)) - 1
