import csv
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from commands import call

import relfisher

PROGRAM = [sys.executable, "-c", "import sys; from relfisher.cli import main; sys.exit(main())"]
OUTPUTS = ["config.json", "curves.csv.gz", "figure5.png", "figure5.svg", "grid.csv", "runs", "table.csv", "table.md"]


def test_help_does_not_load_torch():
    code = "import sys; from relfisher.cli import main; sys.argv = ['relfisher', '--help']; main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout.split()


def mlp(digits, out, *options):
    return ["reproduce", "mlp", "--data", str(digits), "--out", str(out), *options]


def finished(out):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (out / "runs").glob("*.npz")}


def test_version(capsys):
    assert call(["--version"]) == 0
    assert capsys.readouterr().out == f"relfisher {relfisher.__version__}\n"


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["reproduce"],
        ["reproduce", "mlp"],
        ["data"],
        ["data", "fetch"],
        ["bench"],
        ["bench", "step"],
        ["bench", "race"],
        ["plan"],
    ],
)
def test_every_command_has_help(capsys, command):
    assert call([*command, "--help"]) == 0
    assert "Usage: relfisher" in capsys.readouterr().out


def test_the_whole_experiment_leaves_its_results(digits, tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--epochs", "2", "--seeds", "2", "--lr", "PLAIN+SGD=0.1,1e6", "--lr", "plain+rngd-default=0.3"]
    assert call(mlp(digits, out, "--methods", "PLAIN+SGD,plain+rngd-default", *options)) == 0
    assert sorted(path.name for path in out.iterdir()) == OUTPUTS
    printed = capsys.readouterr().out
    assert str(out / "table.md") in printed.replace("\n", "")
    assert str(out / "figure5.png") in printed.replace("\n", "")
    assert "PLAIN+SGD lr 1e+06 seed 0: diverged" in printed
    configuration = json.loads((out / "config.json").read_text())
    assert configuration["command"].startswith("relfisher reproduce mlp --data")
    assert configuration["chosen"] == {"PLAIN+SGD": 0.1, "PLAIN+RNGD-DEFAULT": 0.3}
    assert configuration["settings"]["epochs"] == 2
    with gzip.open(out / "curves.csv.gz", "rt") as file:
        runs = {(line["method"], float(line["learning_rate"]), int(line["seed"])) for line in csv.DictReader(file)}
    expected = {("PLAIN+SGD", 0.1, 0), ("PLAIN+SGD", 1e6, 0), ("PLAIN+SGD", 0.1, 1)}
    assert runs == expected | {("PLAIN+RNGD-DEFAULT", 0.3, 0), ("PLAIN+RNGD-DEFAULT", 0.3, 1)}


def test_a_repeated_command_trains_nothing_again_but_a_torn_run(digits, tmp_path, capsys):
    out = tmp_path / "out"
    command = mlp(digits, out, "--methods", "PLAIN+SGD", "--epochs", "1")
    assert call(command) == 0
    before = finished(out)
    table = (out / "grid.csv").read_bytes()
    torn = next(iter(before))
    torn.write_bytes(torn.read_bytes()[:-40])
    capsys.readouterr()
    assert call(command) == 0
    after = finished(out)
    assert {path for path in before if before[path] != after[path]} == {torn}
    assert (out / "grid.csv").read_bytes() == table
    captured = capsys.readouterr()
    assert captured.out.count("already finished") == 3
    assert f"{torn} was unreadable" in captured.err


def test_other_settings_in_the_same_directory_are_other_runs(digits, tmp_path):
    out = tmp_path / "out"
    for epochs in ("1", "2"):
        assert call(mlp(digits, out, "--methods", "PLAIN+SGD", "--lr", "PLAIN+SGD=.1", "--epochs", epochs)) == 0
    assert len(finished(out)) == 2


PATIENCE = 600
"""Seconds until something is given up: only a test that fails takes them, however slow the machine."""


def wait_for_runs(out, count, process):
    deadline = time.monotonic() + PATIENCE
    while len(finished(out)) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(command):
    # A shell that runs the tests in the background has them ignore interrupts, and their children with them.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*PROGRAM, *command], **pipes, text=True, preexec_fn=heed, start_new_session=True)


def long_grid(method, count):
    return ["--methods", method, "--lr", f"{method}={','.join(f'{0.001 * k:g}' for k in range(1, count + 1))}"]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_after_kill_9_no_worker_is_left_and_the_same_command_goes_on(digits, tmp_path, capsys):
    out = tmp_path / "out"
    command = mlp(digits, out, *long_grid("PLAIN+SGD", 12), "--epochs", "100")
    process = start([*command, "--jobs", "2"])
    wait_for_runs(out, 2, process)
    workers = children(process.pid)
    process.kill()
    process.communicate()
    wait_until_gone(workers)
    before = finished(out)
    assert 2 <= len(before) < 12
    assert call(command) == 0
    after = finished(out)
    assert len(after) == 12
    assert {path: after[path] for path in before} == before
    captured = capsys.readouterr()
    assert captured.out.count("already finished") == len(before)
    assert "unreadable" not in captured.err


@pytest.mark.parametrize("runs", [0, 2])
def test_ctrl_c_stops_the_workers_and_says_how_to_go_on(digits, tmp_path, runs):
    """Also while the workers are still starting, which takes them seconds."""
    out = tmp_path / "out"
    process = start(mlp(digits, out, *long_grid("PLAIN+SGD", 24), "--epochs", "100", "--jobs", "2"))
    while len(workers := children(process.pid)) < 3:  # one cleans up after the others
        time.sleep(0.01)
    wait_for_runs(out, runs, process)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    expected = f"relfisher: stopped; the same command goes on with the runs missing in {out / 'runs'}\n"
    assert errors == expected
    wait_until_gone(workers)
    assert len(finished(out)) < 24


def wait_until_gone(pids):
    deadline = time.monotonic() + PATIENCE
    while any(map(alive, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_lost_worker_is_one_line(digits, tmp_path):
    out = tmp_path / "out"
    process = start(mlp(digits, out, *long_grid("PLAIN+SGD", 24), "--epochs", "100", "--jobs", "2"))
    wait_for_runs(out, 1, process)
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert re.fullmatch(
        r"relfisher: a worker process was lost during PLAIN\+SGD lr \S+ seed 0.*; the same command goes on .*\n", errors
    )


def children(pid):
    """The worker processes, on a system that says so."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except FileNotFoundError:
        return []


ERRORS = {
    "command": (["reproduce", "figure9"], ["figure9"]),
    "option": (["reproduce", "mlp", "--output", "x"], ["--output"]),
    "missing": (["reproduce", "mlp"], ["--out"]),
    "source": (["--data", "cifar"], ["--data", "'cifar'", "mnist5k", "fashion-mnist", "directory"]),
    "method": (["--methods", "PLAIN+SDG"], ["--methods", "'PLAIN+SDG'", "PLAIN+SGD", "PLAIN+RNGD-DEFAULT"]),
    "negative rate": (["--lr", "PLAIN+SGD=-0.1"], ["--lr", "'-0.1'", "above 0"]),
    "zero rate": (["--lr", "PLAIN+SGD=0"], ["--lr", "'0'", "above 0"]),
    "infinite rate": (["--lr", "PLAIN+SGD=inf"], ["--lr", "'inf'", "above 0, up to 1e+06"]),
    "no rate": (["--lr", "PLAIN+SGD"], ["--lr", "'PLAIN+SGD' lacks a learning rate", "above 0"]),
    "method as typed": (["--methods", "plain+sdg"], ["'plain+sdg'"]),
    "rate of no method": (["--lr", "SGD=0.1"], ["--lr", "'SGD'", "PLAIN+SGD"]),
    "epochs": (["--epochs", "0"], ["--epochs", "'0' is not a whole number from 1 to 100000"]),
    "seeds": (["--seeds", "many"], ["--seeds", "'many' is not a whole number"]),
    "jobs": (["--jobs", "-1"], ["--jobs", "'-1' is not a whole number from 1"]),
    "fetch": (["data", "fetch", "cifar"], ["'name'", "'cifar'", "mnist, fashion-mnist"]),
}


def assert_one_line_error(captured, parts):
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("relfisher: ")
    for part in parts:
        assert part in lines[0]


@pytest.mark.parametrize("case", ERRORS)
def test_a_wrong_argument_is_one_line_and_status_2(digits, tmp_path, capsys, case):
    arguments, parts = ERRORS[case]
    command = arguments if arguments[0] in {"reproduce", "data"} else mlp(digits, tmp_path / "out", *arguments)
    assert call(command) == 2
    assert_one_line_error(capsys.readouterr(), parts)


def test_damaged_data_is_one_line_that_names_option_and_file(digits, tmp_path, capsys):
    damages = {
        "magic number": lambda file: file.write_bytes(gzip.compress(b"\0" * 4000)),
        "not a gzip file": lambda file: file.write_bytes(b"plain"),
        "truncated": lambda file: file.write_bytes(gzip.compress(b"\0" * 4000)[:-9]),
        "no file train-images-idx3-ubyte": lambda file: file.unlink(),
    }
    for message, damage in damages.items():
        damage(digits / "train-images-idx3-ubyte.gz")
        assert call(mlp(digits, tmp_path / "out")) == 2
        assert_one_line_error(capsys.readouterr(), ["--data", str(digits), message])
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_cannot_be_written_is_one_line(digits, tmp_path, capsys):
    (tmp_path / "file").write_text("here first")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "runs").write_text("here first")
    for out in (tmp_path / "file", tmp_path / "file" / "out", tmp_path / "used"):
        assert call(mlp(digits, out)) == 2
        assert_one_line_error(capsys.readouterr(), ["--out", str(out)])


def test_the_installed_program_has_the_same_errors():
    done = subprocess.run([*PROGRAM, "reproduce", "mlp"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("relfisher: ")
    assert done.stderr.count("\n") == 1
