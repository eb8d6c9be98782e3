"""The quick campaign of faults: nothing is lost."""

import io
import re
import runpy
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import relfisher

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def tallies(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        campaign = runpy.run_path(str(BENCHMARKS / "robustness.py"))
        found = list(campaign["campaign"](tmp_path_factory.mktemp("site"), 0, campaign["QUICK"]))
    for name in [name for name in sys.modules if name.split(".")[0] == "faults"]:
        del sys.modules[name]
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::relfisher.optim.HealthWarning")
def test_nothing_is_lost(tallies):
    assert len(tallies) == 12
    assert [loss for tally in tallies for loss in tally.lost] == []
    assert all(tally.tried > 0 for tally in tallies)


def intact():
    page = (BENCHMARKS.parent / "docs" / "robustness.md").read_text()
    found = {}
    exec(re.search(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE).group(1), found)
    return found["intact"]


def loaded(path):
    """Return what torch reads from a saved state, as bytes; None if it refuses the file."""
    try:
        state = torch.load(path, weights_only=True)
    except Exception:
        return None
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def test_the_documented_check_finds_every_changed_bit_in_the_numbers_of_a_saved_state(tmp_path):
    path = tmp_path / "state.pt"
    model = torch.nn.Linear(4, 3)
    torch.save(relfisher.RNGD(model).state_dict(), path)
    content, before = path.read_bytes(), loaded(path)
    check = intact()
    assert check(path)
    for place in range(0, zipfile.ZipFile(path).start_dir, 7):
        torn = bytearray(content)
        torn[place] ^= 1 << place % 8
        path.write_bytes(torn)
        assert not check(path) or loaded(path) in (None, before)
