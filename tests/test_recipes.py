"""The recipes of the documentation run as they are, and train all of their models with a metric."""

import re
import warnings
from pathlib import Path

import pytest
import torch

from relfisher import RNGD, ResidualRNGD

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "recipes.md").read_text()
SNIPPETS = re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
OF_EQUATIONS = re.findall(r"^```python\n(.*?)^```", (DOCS / "physics.md").read_text(), re.DOTALL | re.MULTILINE)


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


GALLERY = (DOCS / "gallery.md").read_text()
EXAMPLES = re.findall(r"^## ([^\n]*)\n(?:(?!^## ).)*?^```python\n(.*?)^```", GALLERY, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("kind", "snippet"), EXAMPLES, ids=[kind for kind, _ in EXAMPLES])
def test_examples_of_the_gallery_run_without_a_warning_and_lower_the_loss(kind, snippet):
    torch.manual_seed(0)
    first, found = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once = snippet.replace("range(10):\n    loss", "range(1):\n    loss").replace(
            "range(10):\n    phase", "range(1):\n    phase"
        )
        exec(compile(once.replace("range(steps)", "range(1)"), kind, "exec"), first)
        torch.manual_seed(0)
        exec(compile(snippet, kind, "exec"), found)
    assert isinstance(found["optimizer"], ResidualRNGD)
    assert float(found["loss"]) < float(first["loss"])


@pytest.mark.parametrize("snippet", OF_EQUATIONS)
def test_equations_are_solved_without_a_warning_and_all_parameters_move(snippet):
    torch.manual_seed(0)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(snippet, "physics.md", "exec"), found)
    assert isinstance(found["optimizer"], ResidualRNGD)
    assert bool(found["loss"].isfinite())
    assert all(found["optimizer"].state[layer.weight] for layer in found["model"][::2])


def test_every_example_of_the_gallery_runs():
    assert len(EXAMPLES) == len(re.findall(r"^## ", GALLERY, re.MULTILINE)) == 5


def test_every_kind_but_the_last_has_a_snippet():
    assert len(SNIPPETS) == len(re.findall(r"^## ", PAGE, re.MULTILINE)) - 1
