import io

import numpy as np
import pytest
from rich.console import Console

from relfisher.studies.progress import Display, summary
from relfisher.studies.runs import Record, Run
from relfisher.studies.tables import TAUS, Row

RUN = Run("mlp", "PLAIN+SGD", 0.1, 0, ())
RECORD = Record(np.full(200, 0.25, dtype=np.float32), np.arange(200) / 100, np.array([0.9]), 0.25)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_follows_a_run(terminal):
    text = io.StringIO()
    with Display(Console(file=text, force_terminal=terminal, width=100), planned=2) as display:
        display.started(RUN)
        display.progressed(RUN, 0.5, 0.5)
        display.finished(RUN, RECORD, resumed=False)
        display.finished(RUN, RECORD, resumed=True)
    shown = text.getvalue()
    assert "[1/2] PLAIN+SGD lr 0.1 seed 0: cost 0.25 in 2.0 s" in shown
    assert "[2/2] PLAIN+SGD lr 0.1 seed 0: already finished" in shown
    assert ("all runs" in shown) == terminal
    assert ("\x1b" in shown) == terminal


def test_the_summary_tells_a_diverged_method_apart():
    ratios = tuple((tau, 0.001) for tau in TAUS)
    table = [Row("PLAIN+SGD", 0.1, 1, (), ratios, 0.1, 0.9, 2.0), Row("PLAIN+ADAM", None, 0, ("lr 1 seed 0",))]
    text = io.StringIO()
    Console(file=text, width=100).print(summary(table))
    assert "0.1 ± 0.001" in text.getvalue()
    assert "all candidates diverged" in text.getvalue()
