"""Every option names itself in the error for a value of a wrong kind, without the help of a type checker."""

import json
import subprocess
import sys
from pathlib import Path


def test_every_option_refuses_values_of_every_wrong_kind_by_name():
    program = Path(__file__).with_name("junk.py")
    run = subprocess.run([sys.executable, program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result["tried"] > 1000
    assert result["wrong"] == {}
