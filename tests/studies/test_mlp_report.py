import csv
import gzip
import io
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from relfisher.studies import figures, mlp_report, report
from relfisher.studies.engine import Outcome
from relfisher.studies.mlp import METHODS, MlpOptions, MlpRun, MlpStudy
from relfisher.studies.runs import Record

ITERATIONS = 404
EPOCHS = 4
OPTIONS = MlpOptions("digits", "none", EPOCHS)


def run(method, learning_rate, seed):
    return MlpRun("mlp", method, learning_rate, seed, OPTIONS)


def record(seed, *, diverged=False):
    generator = np.random.default_rng(seed)
    cost = np.exp(-np.arange(ITERATIONS) / 100 + generator.normal(size=ITERATIONS) / 5).astype(np.float32)
    if diverged:
        cost = np.append(cost[:100], np.float32(math.inf))
    seconds = np.arange(1, len(cost) + 1) / 50
    return Record(cost, seconds, np.linspace(0.5, 0.9, EPOCHS), full_cost=0.01 * seed, diverged=diverged)


@pytest.fixture
def outcome():
    """Two methods with two seeds, one of whose candidates diverged, and a method that diverged altogether."""
    grids = {"PLAIN+SGD": (0.1, 0.2), "PLAIN+RNGD-DEFAULT": (0.3,), "BNA+ADAM": (0.01,)}
    study = MlpStudy(grids, 2, OPTIONS)
    records = {
        run("PLAIN+SGD", 0.1, 0): record(1),
        run("PLAIN+SGD", 0.2, 0): record(2, diverged=True),
        run("PLAIN+RNGD-DEFAULT", 0.3, 0): record(3),
        run("BNA+ADAM", 0.01, 0): record(4, diverged=True),
        run("PLAIN+SGD", 0.1, 1): record(5),
        run("PLAIN+RNGD-DEFAULT", 0.3, 1): record(6, diverged=True),
    }
    return Outcome(study, records)


def test_averages_of_ten_are_means_also_of_a_shorter_rest():
    np.testing.assert_allclose(figures.averaged(np.arange(24.0)), [4.5, 14.5, 21.5])
    np.testing.assert_allclose(figures.averaged(np.arange(3.0)), [1.0])


def test_the_curves_are_those_of_the_runs(outcome):
    text = gzip.decompress(report.encoded("curves.csv.gz", mlp_report.curve_lines(outcome))).decode()
    lines = list(csv.DictReader(io.StringIO(text)))
    for each, expected in outcome.records.items():
        identity = (each.method, str(each.learning_rate), str(each.seed))
        mine = [line for line in lines if (line["method"], line["learning_rate"], line["seed"]) == identity]
        ends = [int(line["iteration"]) for line in mine]
        assert ends == [*range(10, len(expected.cost), 10), len(expected.cost)]
        starts = [0, *ends[:-1]]
        means = [expected.cost[start:end].mean(dtype=float) for start, end in zip(starts, ends, strict=True)]
        np.testing.assert_allclose([float(line["cost"]) for line in mine], means, rtol=1e-5)
        seconds = expected.seconds[np.array(ends) - 1]
        np.testing.assert_allclose([float(line["seconds"]) for line in mine], seconds, atol=1e-4)


def test_the_table_says_what_the_runs_say(outcome):
    sgd, rngd, adam = mlp_report.rows(outcome)
    costs = [outcome.records[run("PLAIN+SGD", 0.1, seed)].cost for seed in (0, 1)]
    last = np.concatenate([cost[-81:] for cost in costs]).astype(float)
    assert sgd.sharp_ratios[mlp_report.TAUS.index(0.2)] == pytest.approx((last.mean(), last.std()))
    assert sgd.final_cost == pytest.approx((0.01 * 1 + 0.01 * 5) / 2)
    assert sgd.best_validation == pytest.approx(0.9)
    assert sgd.seconds_per_epoch == pytest.approx(ITERATIONS / 50 / EPOCHS)
    assert (sgd.learning_rate, sgd.seeds, sgd.diverged) == (0.1, 2, ("lr 0.2 seed 0",))
    assert (rngd.seeds, rngd.diverged) == (1, ("lr 0.3 seed 1",))
    assert (adam.learning_rate, adam.seeds, adam.final_cost) == (None, 0, None)


def test_both_forms_of_the_table_are_well_formed(outcome):
    table = mlp_report.rows(outcome)
    lines = list(csv.DictReader(io.StringIO(report.encoded("table.csv", mlp_report.table_lines(table)).decode())))
    assert [line["method"] for line in lines] == list(outcome.study.groups)
    assert float(lines[0]["cost_mean_tau_1"]) == table[0].sharp_ratios[0][0]
    assert lines[2]["final_cost"] == lines[2]["cost_std_tau_0.5"] == ""
    markdown = mlp_report.table_markdown(table).split("\n\n")[0].splitlines()
    assert len(markdown) == 2 + len(table)
    assert len({line.count("|") for line in markdown}) == 1


def test_the_grid_shows_every_candidate(outcome):
    lines = list(csv.DictReader(io.StringIO(report.encoded("table.csv", mlp_report.grid_lines(outcome)).decode())))
    assert [(line["method"], line["learning_rate"], line["diverged"], line["chosen"]) for line in lines] == [
        ("PLAIN+SGD", "0.1", "False", "True"),
        ("PLAIN+SGD", "0.2", "True", "False"),
        ("PLAIN+RNGD-DEFAULT", "0.3", "False", "True"),
        ("BNA+ADAM", "0.01", "True", "False"),
    ]


def test_the_figure_is_a_png_and_an_svg_and_the_same_every_time(outcome):
    first, second = (figures.encode(mlp_report.figure5(outcome, "A title")) for _ in range(2))
    assert first["png"].startswith(b"\x89PNG")
    assert "PLAIN+RNGD-DEFAULT" in first["svg"].decode()
    assert "BNA+ADAM" not in first["svg"].decode()
    assert first == second


def test_the_figure_shows_the_curves_of_the_runs(outcome):
    left, right, third = mlp_report.figure5(outcome, "A title").axes
    thin = left.lines[0]
    records = [outcome.records[run("PLAIN+SGD", 0.1, seed)] for seed in (0, 1)]
    np.testing.assert_allclose(thin.get_ydata(), np.mean([figures.averaged(each.cost) for each in records], axis=0))
    assert thin.get_xdata()[-1] == ITERATIONS
    assert right.lines[0].get_xdata()[-1] == pytest.approx(ITERATIONS / 50)
    assert left.get_yscale() == right.get_yscale() == "log"
    accuracies = np.mean([record.validation for record in records], axis=0)
    np.testing.assert_allclose(third.lines[0].get_ydata(), 100 * accuracies)
    assert list(third.lines[0].get_xdata()) == list(range(1, len(accuracies) + 1))


def test_the_axis_of_accuracies_starts_where_most_methods_are_early():
    curves = [np.linspace(start, end, 10) for start, end in ((0.1, 0.5), (0.6, 0.9), (0.7, 1.0))]
    low, high = figures.accuracy_range(curves)
    assert (low, high) == (pytest.approx(0.5), pytest.approx(1.025))


def test_a_curve_that_blows_up_leaves_the_figure_and_hides_no_other():
    x = np.arange(1.0, 101.0)
    fine, bad = (
        figures.Line(method, figures.Look("#000000"), x, x, cost, cost)
        for method, cost in (("fine", 1 / x), ("bad", 10 ** (x / 10)))
    )
    left, right = figures.panels([fine, bad], "A title", "A caption").axes
    low, high = left.get_ylim()
    assert low < fine.cost.min()
    assert fine.cost[2] < high < 10 * fine.cost[0]
    markers = [drawn.get_ydata()[0] for drawn in right.lines if drawn.get_marker() == "o"]
    assert markers == [fine.cost[-1], high]
    names = {text.get_text(): text.get_position()[1] for text in left.texts}
    assert names["fine"] < names["bad"] == 1.0


def test_a_study_that_diverged_altogether_is_still_drawn(outcome):
    lost = {each: replace(record, diverged=True) for each, record in outcome.records.items()}
    assert figures.encode(mlp_report.figure5(Outcome(outcome.study, lost), "A title")).keys() == {"png", "svg"}


def test_every_method_has_a_look():
    assert set(mlp_report.LOOKS) == set(METHODS)


def test_labels_keep_their_distance():
    places = figures._spread({"a": 0.5, "b": 0.501, "c": 0.99, "d": 1.0, "e": 0.0})
    heights = sorted(places.values())
    assert min(np.diff(heights)) >= figures.LABEL_GAP - 1e-12
    assert heights[-1] <= 1.0
    assert places["a"] < places["b"]


def test_the_summary_tells_a_diverged_method_apart(outcome):
    text = io.StringIO()
    Console(file=text, width=100).print(mlp_report.summary(mlp_report.rows(outcome)))
    assert "all candidates diverged" in text.getvalue()
    assert text.getvalue().count("90.00%") == 2
