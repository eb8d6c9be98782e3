"""The recorded trajectories can be repeated: the same bits in one process, and the recorded first loss elsewhere."""

import json
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks" / "trajectories.py"))


@pytest.mark.parametrize("name", BENCHMARK["MODELS"])
def test_trajectories_repeat_and_begin_as_recorded(name):
    one, two = (BENCHMARK["trajectory"](name, steps=3) for _ in range(2))
    assert one == two
    recorded = json.loads((ROOT / "results" / "trajectories" / f"{name}.json").read_text())
    assert len(recorded["losses"]) == BENCHMARK["STEPS"]
    first = [float.fromhex(losses["losses"][0]) for losses in (one, recorded)]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
