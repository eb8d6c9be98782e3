"""The page that says why the defaults are what they are says what they are."""

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path

from torch import nn

from relfisher import RNGD, AdamWOptions, MetricOptions

PAGE = Path(__file__).parents[2] / "docs" / "decisions" / "defaults.md"
VALUE = re.compile(r'(?P<literal>-?\d+(\.\d+)?(e-?\d+)?|"[^"]*"|\([^)]*\)|True|False|None)(?P<mebi> MiB)?')


def rows():
    """Return the cell with the default of each option in the page's first table."""
    table = PAGE.read_text().split("| option | default | why |")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {option.strip("`"): default for option, default, _ in cells}


def value(cell):
    """Return what a cell begins with: a number, one of MiB, a quoted word, a tuple or a constant of Python."""
    found = VALUE.match(cell)
    assert found is not None, f"{cell!r} begins with no value"
    literal = ast.literal_eval(found["literal"])
    return literal << 20 if found["mebi"] else literal


def test_the_table_of_defaults_is_what_the_optimizer_has():
    found = rows()
    assert len(found) >= 10
    own = RNGD(nn.Linear(2, 2)).defaults  # those of the step rule stand for None
    defaults = {name: each.default for name, each in inspect.signature(RNGD).parameters.items()}
    defaults = {name: own.get(name) if each is None else each for name, each in defaults.items()}
    defaults |= {f"metric.{each.name}": each.default for each in fields(MetricOptions)}
    defaults |= {f"fallback.{each.name}": each.default for each in fields(AdamWOptions)}
    for option, cell in found.items():
        assert option in defaults, f"{option!r} is no option"
        assert value(cell) == defaults[option], f"{option}: {cell}"
