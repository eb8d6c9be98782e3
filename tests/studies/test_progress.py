import io
import math

import numpy as np
import pytest
from instant import Trial
from rich.console import Console

from relfisher.studies.executor import RESUMED
from relfisher.studies.progress import Display
from relfisher.studies.runs import Record

RUN = Trial("mlp", "PLAIN+SGD", 0.1, 0)
RECORD = Record(np.full(200, 0.25, dtype=np.float32), np.arange(200) / 100, np.array([0.9]), 0.25)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_display_follows_a_run(terminal):
    text = io.StringIO()
    with Display(Console(file=text, force_terminal=terminal, width=100), planned=2) as display:
        display.progressed(RUN, 0.0, math.nan)
        display.progressed(RUN, 0.5, 0.5)
        display.finished(RUN, RECORD.ending)
        display.finished(RUN, RESUMED)
    shown = text.getvalue()
    assert "[1/2] PLAIN+SGD lr 0.1 seed 0: cost 0.25 in 2.0 s" in shown
    assert "[2/2] PLAIN+SGD lr 0.1 seed 0: already finished" in shown
    assert ("all runs" in shown) == terminal
    assert ("\x1b" in shown) == terminal
