"""What fails around a command, such as a disk or an output: one line, nothing torn, and the command goes on later."""

import errno
import io
import os
import sys

import pytest
from commands import call

from relfisher import files
from relfisher.cli.output import Output

STUDY = ["--methods", "PLAIN+SGD", "--lr", "PLAIN+SGD=0.1,0.2", "--epochs", "1"]
WRITTEN = 2 + 5 + 2
"""The files of the study: two runs, five tables and settings, and the figure as PNG and SVG."""


def mlp(digits, out):
    return ["reproduce", "mlp", "--data", str(digits), "--out", str(out), *STUDY]


def names(out):
    return sorted(path.name for path in out.rglob("*") if path.is_file())


@pytest.mark.parametrize("place", [0, 1, 2, 4, WRITTEN - 1])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(digits, tmp_path, capsys, monkeypatch, place):
    out, count, fsync = tmp_path / "out", 0, os.fsync

    def full(descriptor):
        nonlocal count
        count += 1
        if count > place:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert call(mlp(digits, out)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"relfisher: {out}")
    assert "cannot be written: No space left on device" in error
    assert f"safe in {out / 'runs'}" in error
    assert "the same command" in error
    assert error.count("\n") == 1
    assert len(names(out)) == place
    assert call(mlp(digits, out)) == 0
    assert len(names(out)) == WRITTEN
    assert capsys.readouterr().out.count("already finished") == min(place, 2)


class Failing(io.StringIO):
    """A stream that a number of writes fit into."""

    def __init__(self, fitting=0):
        super().__init__()
        self.fitting = fitting

    def write(self, text):
        if self.fitting == 0:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        self.fitting -= 1
        return super().write(text)


@pytest.mark.parametrize("stream", [Failing(), Failing(1), None], ids=["full", "full later", "closed"])
def test_an_output_that_fails_is_one_line_and_loses_no_file(digits, tmp_path, capsys, monkeypatch, stream):
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "stdout", stream)
    assert call(mlp(digits, out)) == 1
    error = capsys.readouterr().err
    assert error.startswith("relfisher: standard output failed: ")
    assert error.count("\n") == 1
    assert len(names(out)) == WRITTEN


def test_errors_that_nobody_can_read_still_have_their_status(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Failing())
    assert call(["reproduce", "mlp", "--out", str(tmp_path), "--epochs", "0"]) == 2


def test_measurements_that_cannot_be_written_are_printed(tmp_path, capsys, monkeypatch):
    def full(path, _):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("relfisher.studies.report.write_atomically", full)
    options = [
        "--workloads",
        "mlp",
        "--methods",
        "SGD",
        "--repeats",
        "1",
        "--seconds",
        "0.1",
        "--no-growth",
        "--no-peak",
    ]
    assert call(["bench", "step", "--out", str(tmp_path / "out"), *options]) == 1
    captured = capsys.readouterr()
    assert "| SGD |" in captured.out
    assert (
        f"{tmp_path / 'out' / 'table.md'} cannot be written: No space left on device; standard output" in captured.err
    )
    assert captured.err.count("\n") == 1


def test_too_little_memory_is_one_line(tmp_path, capsys, monkeypatch):
    def greedy(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000000 bytes")

    monkeypatch.setattr("relfisher.studies.panels.panels", greedy)
    assert call(["reproduce", "neuron", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("relfisher: there is not enough memory: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("rate", ["1e20", "1e300", "1e400"])
def test_rates_that_overflow_are_refused(digits, tmp_path, capsys, rate):
    command = ["reproduce", "mlp", "--data", str(digits), "--out", str(tmp_path / "out")]
    assert call([*command, "--lr", f"PLAIN+RNGD={rate}"]) == 2
    expected = f"'{rate}' in 'PLAIN+RNGD={rate}' is not a learning rate, allowed are numbers above 0, up to 1e+06\n"
    assert capsys.readouterr().err == f"relfisher: Invalid value for '--lr': {expected}"


@pytest.mark.parametrize("entry", ["PLAIN+SGD", "PLAIN+SGD=", "PLAIN+SGD=0.1,"])
def test_a_missing_rate_is_said_with_its_entry(tmp_path, capsys, entry):
    assert call(["reproduce", "mlp", "--out", str(tmp_path / "out"), "--lr", entry]) == 2
    assert f"'--lr': '{entry}' lacks a learning rate" in capsys.readouterr().err


def test_two_grids_for_a_method_are_refused(tmp_path, capsys):
    grids = ["--lr", "PLAIN+SGD=0.1", "--lr", "plain+sgd=0.2"]
    assert call(["reproduce", "mlp", "--out", str(tmp_path / "out"), *grids]) == 2
    assert "'--lr': 'plain+sgd' is given twice" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--budget", "--tuning"])
@pytest.mark.parametrize("value", ["inf", "nan", "0", "-1", "1e400", "many"])
def test_durations_are_finite(tmp_path, capsys, option, value):
    assert call(["bench", "race", "mlp", "--out", str(tmp_path / "out"), option, value]) == 2
    expected = f"relfisher: Invalid value for '{option}': '{value}' is not a finite number > 0\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize("value", ["inf", "nan", "-1", "1e400"])
def test_the_spread_of_initial_weights_is_finite(tmp_path, capsys, value):
    assert call(["reproduce", "neuron", "--out", str(tmp_path / "out"), "--initial-std", value]) == 2
    assert f"'--initial-std': '{value}' is not a finite number >= 0" in capsys.readouterr().err


def test_a_panel_whose_configurations_all_diverge_has_its_report(tmp_path):
    options = ["--runs", "1", "--epochs", "1", "--pair", "3,5", "--size", "60", "--methods", "GD,NGD"]
    assert call(["reproduce", "neuron", "--out", str(tmp_path / "out"), *options, "--initial-std", "1e308"]) == 0
    assert "| 10 of 10 |" in (tmp_path / "out" / "table.md").read_text()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("file:///nonexistent", "allowed are URLs that begin with http:// or https://"),
        ("nonsense", "allowed are URLs that begin with http:// or https://"),
        ("", "allowed are URLs that begin with http:// or https://"),
        ("http://[", "allowed are URLs that begin with http:// or https://"),
        ("http://127.0.0.1:9", "no answer from the server"),
    ],
)
def test_what_cannot_be_fetched_is_said_with_the_reason(tmp_path, capsys, monkeypatch, url, reason):
    monkeypatch.setenv("RELFISHER_CACHE", str(tmp_path / "cache"))
    assert call(["data", "fetch", "mnist", "--base-url", url]) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"relfisher: Invalid value for '--base-url': {url}/train-images-idx3-ubyte.gz cannot be downl"
    )
    assert reason in error
    assert "SHA" not in error
    assert error.count("\n") == 1


def test_characters_that_an_output_lacks_are_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    output = Output(stream)
    output.write("2 × 3")
    output.flush()
    assert stream.buffer.getvalue() == b"2 \\xd7 3"
    assert output.failure is None


def test_a_file_that_vanishes_is_no_stale_file(tmp_path, monkeypatch):
    """As when another process renames it after it was listed."""
    monkeypatch.setattr(type(tmp_path), "glob", lambda *_: iter([tmp_path / ".gone.tmp"]))
    files.remove_stale(tmp_path)
