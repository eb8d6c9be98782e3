"""A study that faults are done to, on a few images of noise. It runs in forked processes, which need no start-up."""

import contextlib
import gzip
import json
import multiprocessing
import os
import random
import resource
import struct
import sys
import time
from io import StringIO
from unittest.mock import patch

import numpy as np
import torch

from relfisher.cli import main

__all__ = ["REPORT", "Site", "answer", "kept", "results", "run", "told"]

FORK = multiprocessing.get_context("fork")
IMAGES = 240
RATES = (0.1, 0.2, 0.05, 0.5, 0.02, 0.01)
REPORT = ("table.md", "table.csv", "grid.csv", "curves.csv.gz", "config.json", "figure5.png", "figure5.svg")
PATIENCE = 600


def write_digits(directory):
    """Write a data set of noise as IDX files.

    Args:
        directory: an empty directory.
    """
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (IMAGES, 28, 28), dtype=np.uint8)
    for name, values in (
        ("train-images-idx3-ubyte.gz", images),
        ("train-labels-idx1-ubyte.gz", generator.integers(0, 10, IMAGES, dtype=np.uint8)),
    ):
        header = bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape)
        (directory / name).write_bytes(gzip.compress(header + values.tobytes(), mtime=0))


class Site:
    """A directory with data, a study, and the results of the study when nothing happens to it.

    Args:
        root: an empty directory.
        seed: of the random moments and places.
        epochs: the length of each run of the study.
        rates: the number of learning rates of each of its two methods.
    """

    def __init__(self, root, seed, epochs, rates):
        self.random = random.Random(seed)
        self.root = root
        self.digits = root / "digits"
        self.digits.mkdir(parents=True)
        write_digits(self.digits)
        self.options = ["--methods", "PLAIN+SGD,PLAIN+RNGD-DEFAULT", "--epochs", str(epochs), "--seeds", "2"]
        grid = ",".join(map(str, RATES[:rates]))
        self.options += ["--lr", f"PLAIN+SGD={grid}", "--lr", f"PLAIN+RNGD-DEFAULT={grid}"]
        # What this process has imported and prepared, the forked ones need not.
        run(self.command(root / "first"), StringIO())
        self.intact = root / "intact"
        start = time.perf_counter()
        status, errors = self.run(self.intact)
        self.seconds = time.perf_counter() - start
        if status != 0:
            raise RuntimeError(f"the study fails by itself: status {status}, {errors}")
        self.results = results(self.intact)

    def command(self, out):
        """Return the arguments of the study with another output directory."""
        return ["reproduce", "mlp", "--data", str(self.digits), "--out", str(out), *self.options]

    def fork(self, out, printed=StringIO, limit=None):
        """Start the study in another process.

        Args:
            out: the output directory.
            printed: makes its standard output.
            limit: the largest size of a file that it can write.

        Returns:
            The process, and the connection that receives its status and what it printed as errors.
        """
        ours, theirs = FORK.Pipe(duplex=False)
        process = FORK.Process(target=_carry_out, args=(self.command(out), printed, limit, theirs))
        process.start()
        theirs.close()
        return process, ours

    def run(self, out, printed=StringIO, limit=None):
        """Run the study in another process, and return its status and what it printed as errors."""
        return answer(*self.fork(out, printed, limit))

    def whole(self, out):
        """Return what distinguishes an output directory from the intact one; "" if nothing does."""
        missing = [name for name in REPORT if not (out / name).is_file()]
        left = [path.name for path in out.rglob(".*.tmp")]
        if missing or left:
            return f"{missing} missing, {left} left behind"
        return "" if results(out) == self.results else "other results"

    def resumed(self, out):
        """Give the command again, and return what distinguishes its results from the intact ones; "" if nothing does.

        Files that a killed process left incomplete are made as old as they have to be to be removed.
        """
        for path in out.rglob(".*.tmp"):
            os.utime(path, (0, 0))
        status, errors = self.run(out)
        return self.whole(out) if status == 0 else f"status {status}, {errors}"


def _carry_out(arguments, printed, limit, connection):
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    connection.send(run(arguments, printed()))


def run(arguments, printed):
    """Run a command in this process.

    Args:
        arguments: its arguments.
        printed: its standard output.

    Returns:
        Its status, and what it printed as errors.
    """
    errors = StringIO()
    with (
        patch.object(sys, "argv", ["relfisher", *arguments]),
        contextlib.redirect_stdout(printed),
        contextlib.redirect_stderr(errors),
    ):
        try:
            status = main()
        except BaseException as error:  # the fault that is looked for
            status = f"{type(error).__name__}: {error}"
    return status, errors.getvalue()


def answer(process, connection):
    """Wait for a study that was started by `fork`.

    Args:
        process: its process.
        connection: its connection.

    Returns:
        Its status, and what it printed as errors.
    """
    try:
        return connection.recv() if connection.poll(PATIENCE) else (None, "it does not end")
    except EOFError:
        return None, "it was lost"
    finally:
        process.kill()
        process.join()


def results(out):
    """Return everything in the files of all runs that does not depend on time, by file name."""
    found = {}
    for path in sorted((out / "runs").glob("*.npz")):
        with np.load(path) as file:
            found[path.name] = (str(file["run"]), *kept(file))
    return found


def kept(arrays):
    """Return the arrays of a run that do not depend on time."""
    return arrays["cost"].tobytes(), arrays["validation"].tobytes(), json.loads(str(arrays["about"]))


def told(errors, *parts):
    """Return whether an error is one line that contains all parts."""
    return errors.startswith("relfisher: ") and errors.count("\n") == 1 and all(part in errors for part in parts)
