"""A small data set."""

import pytest
from commands import write_digits

from relfisher.studies.data import load


@pytest.fixture
def digits(tmp_path):
    directory = tmp_path / "digits"
    directory.mkdir()
    write_digits(directory)
    yield directory
    load.cache_clear()
