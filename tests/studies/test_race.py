import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from instant import Log

from relfisher.studies import training
from relfisher.studies.engine import carry_out
from relfisher.studies.peers import CONFIGURATIONS, PEERS, UNTUNED, available
from relfisher.studies.race import (
    RACES,
    Race,
    RaceOptions,
    RaceRun,
    RaceStudy,
    carry_out_run,
    plan,
    reached,
    running_mean,
)
from relfisher.studies.race_report import header, report, rows
from relfisher.studies.report import Invocation, write
from relfisher.studies.runs import Record
from relfisher.studies.store import Store
from relfisher.studies.workloads import WORKLOADS

RACE = Race("mlp", ("SGD", "Adam", "SOAP"), target=0.5, budget=9.0, window=5)
OPTIONS = RaceOptions("noise", "none", "mlp", 50, threads=1)
STUDY = RaceStudy("test", RACE.methods, seeds=3, tuning=1.0, budget=9.0, race=RACE, options=OPTIONS)


def train(run, tell):
    """SGD reaches the target with 0.03 alone, Adam never does, SOAP diverges."""
    seconds = run.seconds
    count = int(20 * seconds)
    end = {"SGD": 0.1 if run.learning_rate == 0.03 else 0.8, "Adam": 0.7, "SOAP": math.nan}[run.method]
    cost = np.linspace(1.0, end, count).astype(np.float32)
    tell(1.0, end)
    return Record(
        cost=cost,
        seconds=np.linspace(0, seconds, count + 1)[1:],
        validation=np.array([0.25, 0.75, 0.5]),
        full_cost=end,
        diverged=math.isnan(end),
        evaluated=(0, count // 2, count),
        state_bytes=1_000_000,
    )


def raced(directory, trainer=train):
    return carry_out(STUDY, trainer, Store(directory, Record.of), jobs=1, watcher=Log())


def test_every_method_tunes_as_long():
    for race in RACES.values():
        for method in race.methods:
            candidates = RaceStudy("test", race.methods, 3, 1.0, 9.0, race, OPTIONS).candidates(method)
            assert len(set(candidates)) == (1 if method == UNTUNED else CONFIGURATIONS)
            assert {run.seconds for run in candidates} == {1.0}
            assert [run.configuration for run in candidates] == PEERS[method].configurations


def test_tuning_picks_the_best_and_the_others_seeds_follow(tmp_path):
    outcome = raced(tmp_path)
    assert outcome.chosen["SGD"].configuration == {"lr": 0.03}
    assert outcome.chosen["SOAP"] is None
    assert len(outcome.records) == 3 * CONFIGURATIONS + 2 * 3
    assert [(run.seed, run.seconds) for run in outcome.repeats("SGD")] == [(0, 9.0), (1, 9.0), (2, 9.0)]
    assert [len(outcome.diverged(method)) for method in RACE.methods] == [0, 0, CONFIGURATIONS]


def test_the_table_tells_who_reached_the_target(tmp_path):
    outcome = raced(tmp_path)
    table = {row[0]: dict(zip(header(outcome), row, strict=True)) for row in rows(outcome)}
    sgd, adam, soap = (table[method] for method in RACE.methods)
    assert (sgd["reached"], adam["reached"], soap["reached"]) == ("3 of 3", "0 of 3", "0 of 3")
    steps = 1 + math.ceil(0.5 / 0.9 * 179 + 2)
    assert sgd["steps to 0.5"] == f"{steps} ± 0"
    assert sgd["s to 0.5"] == f"{steps / 20:.1f} ± 0"
    assert adam["s to 0.5"] == "-"
    assert (sgd["best validation"], sgd["validation at 0.5"]) == ("0.7500 ± 0", "0.5000 ± 0")
    assert (soap["configuration"], soap["diverged"]) == ("all diverged", str(CONFIGURATIONS))


def test_an_interrupted_race_goes_on_to_the_same_files(tmp_path):
    begun = []

    def interrupted(run, tell):
        begun.append(run)
        if len(begun) in {5, 27}:
            raise KeyboardInterrupt
        return train(run, tell)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            raced(tmp_path / "runs", interrupted)
    outcome = raced(tmp_path / "runs", interrupted)
    assert len(begun) == 2 + 3 * CONFIGURATIONS + 2 * 3
    written = []
    for found, name in [(outcome, "one"), (raced(tmp_path / "whole"), "other")]:
        (tmp_path / name).mkdir()
        write(report(found, {"Muon": "not installed"}), Invocation("relfisher bench race", 1), tmp_path / name)
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {"table.md", "config.json", "tuning.csv", "curves.csv.gz", "race.png", "race.svg"}
    assert b"| Muon | not installed |" in written[0]["table.md"]


def test_a_target_is_reached_by_the_mean_of_the_last_batches():
    record = Record(np.array([4, 0, 4, 2, 0, 1], dtype=np.float32), np.arange(6.0), np.zeros(0))
    np.testing.assert_allclose(running_mean(record.cost, 2), [2, 2, 3, 1, 0.5])
    assert reached(record, 2.0, 2) == 2
    assert reached(record, 1.0, 2) == 5
    assert reached(record, 0.4, 2) is None
    assert reached(record, None, 2) is None
    assert reached(record, 9.0, 7) is None


@pytest.mark.usefixtures("noise")
def test_a_run_lasts_for_its_seconds_and_is_evaluated_on_the_way():
    race = plan("mlp", "noise", methods=("BNB+Adam",), seeds=2, tuning=0.05, budget=0.2, threads=1)
    assert race.planned == CONFIGURATIONS + 2
    reports = []
    run = race.repeats(race.candidates("BNB+Adam")[3])[0]
    record = carry_out_run("noise", run, lambda *told: reports.append(told))
    assert (record.seconds[:-1] < 0.2).all()
    assert record.seconds[-1] >= 0.2
    assert len(record.cost) == len(record.seconds) == record.evaluated[-1]
    assert record.evaluated[0] == 0
    assert 3 <= len(record.validation) == len(record.evaluated) <= 1 + 20
    assert reports[-1][0] == 1.0
    assert record.state_bytes > 0
    assert math.isfinite(record.full_cost)


@pytest.mark.usefixtures("noise")
def test_a_diverging_run_ends():
    race = plan("mlp", "noise", methods=("SGD",), seeds=1, tuning=60.0, budget=60.0, threads=1)
    record = carry_out_run("noise", replace(race.candidates("SGD")[0], learning_rate=1e20), lambda *_: None)
    assert record.diverged
    assert not math.isfinite(record.cost[-1])
    assert len(record.cost) < 100


@pytest.mark.usefixtures("noise")
def test_a_run_whose_optimizer_cannot_decompose_its_matrices_has_diverged(monkeypatch):
    def fails(*_):
        raise torch.linalg.LinAlgError("it did not converge")

    monkeypatch.setattr(training, "iterate", fails)
    race = plan("mlp", "noise", methods=("SGD",), seeds=1, tuning=60.0, budget=60.0, threads=1)
    record = carry_out_run("noise", race.candidates("SGD")[0], lambda *_: None)
    assert record.diverged
    assert len(record.cost) == len(record.seconds) == 1
    assert record.warnings == ("it did not converge",)


def test_methods_that_cannot_be_had_are_told_apart(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    notes, names = available(("SOAP", "Adam"), PEERS, WORKLOADS["mlp"].build)
    assert names == ("Adam",)
    assert "relfisher[bench]" in notes["SOAP"]


def test_a_run_keeps_the_name_that_it_had_before():
    options = RaceOptions("mnist5k", "d5e5551dad158c3b", "mlp", 50, threads=1, relfisher="0.1.0")
    run = RaceRun("race-mlp", "RNGD", 0.05, 1, options, (("damping", 0.1),), seconds=1.0, evaluations=20)
    assert run.key == "race-mlp-RNGD-lr0.05-seed1-773d7e9e9a8b"
