"""The public names: all there, the same for people and for type checkers, and free until they are used."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import relfisher


@pytest.mark.parametrize("name", relfisher.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(relfisher, name).__doc__
    assert name in dir(relfisher)


def test_type_checkers_see_the_names_that_people_get():
    tree = ast.parse(Path(relfisher.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.name for node in block.body for alias in node.names}
    assert declared == set(relfisher.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Adam'"):
        _ = relfisher.Adam


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, relfisher, relfisher.cli; assert 'torch' not in sys.modules, 'torch was imported'"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
