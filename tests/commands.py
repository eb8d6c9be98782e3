"""The command line, called in this process, and a data set that is small enough for it."""

import gzip
import struct
import sys

import numpy as np
import pytest

from relfisher.cli import main


def write_idx(path, values):
    header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


def write_digits(directory):
    generator = np.random.default_rng(0)
    write_idx(directory / "train-images-idx3-ubyte.gz", generator.integers(0, 256, (240, 28, 28), dtype=np.uint8))
    write_idx(directory / "train-labels-idx1-ubyte.gz", generator.integers(0, 10, 240).astype(np.uint8))


def call(arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["relfisher", *arguments])
        return main()
