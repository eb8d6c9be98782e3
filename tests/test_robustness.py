"""The quick campaign of faults: nothing is lost."""

import runpy
import sys
from pathlib import Path

import pytest

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
