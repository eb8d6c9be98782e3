import json
import math
from functools import partial

import numpy as np
import pytest
import torch

from relfisher.cli import main
from relfisher.studies.coordinates import Whitening, raw, whitened
from relfisher.studies.damped_systems import DampedSystems
from relfisher.studies.data import Dataset
from relfisher.studies.descent import Configuration, Problems, descend, log_cost
from relfisher.studies.engine import Outcome, carry_out
from relfisher.studies.executor import RESUMED
from relfisher.studies.neuron import GRID, METHODS, Batch, Curves, NeuronOptions, plan, solve
from relfisher.studies.neuron_figure import scientific
from relfisher.studies.neuron_report import claims
from relfisher.studies.panels import Panel, panels, problems
from relfisher.studies.sample_space import SampleSpaceSystems
from relfisher.studies.store import Store


def ignore(_epoch, _cost):
    pass


@pytest.fixture
def data():
    """Two overlapping classes of 60 images, of which six pixels vary, one of them twice."""
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(130, 784)
    images[:, :5] = torch.rand(130, 5, generator=generator)
    images[:, 5] = images[:, 4]
    labels = torch.cat([torch.zeros(60), torch.ones(60), torch.full((10,), 2.0)]).long()
    images[:60, 0] += 0.3
    return Dataset("toy", images[10:], labels[10:], images[:10], labels[:10])


class Log:
    """A watcher that remembers what it was told."""

    def __init__(self):
        self.begun, self.how = [], []

    def progressed(self, cell, fraction, cost):
        assert 0 <= fraction <= 1
        if math.isnan(cost):
            self.begun.append(cell)

    def finished(self, cell, ending):
        self.how.append(ending)


def plain_descent(z, y, theta, configuration, natural, epochs, parameters):
    """(28) to (30) as they are written, one run, no tricks."""
    costs, velocity = [], np.zeros_like(theta)
    for _ in range(epochs + 1):
        p = 1 / (1 + np.exp(-z @ theta))
        costs.append(np.mean(-y * np.log(p) - (1 - y) * np.log(1 - p)))
        step = z.T @ (p - y) / len(y)
        if natural:
            metric = (z.T * (p * (1 - p))) @ z / len(y)
            step = np.linalg.solve(metric + 1e-2 * np.trace(metric) / parameters * np.eye(len(theta)), step)
        velocity = configuration.momentum * velocity + step
        theta = theta - configuration.learning_rate * velocity
    return np.array(costs)


def test_whitening_gives_unit_covariance_on_the_non_singular_directions(data):
    x = data.train_images.double()
    whitening = Whitening.of(x)
    white = whitening(x)
    expected = torch.zeros(784, 784, dtype=torch.double)
    expected[range(5), range(5)] = 1
    assert whitening.rank == 5
    assert torch.allclose(white.mean(0), torch.zeros(784, dtype=torch.double), atol=1e-12)
    assert torch.allclose(white.T @ white / len(x), expected, atol=1e-10)


@pytest.mark.parametrize("coordinates", [raw, whitened])
def test_coordinates_give_the_neuron_the_same_pre_activations(data, coordinates):
    x = data.train_images.double()
    z = Whitening.of(x)(x) if coordinates is whitened else x
    z = torch.cat([z, torch.ones(len(x), 1)], dim=1)
    theta = torch.randn(785, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    found = coordinates(x)
    assert found.features.shape == (len(x), 6)
    assert torch.allclose(found.features @ (theta @ found.basis), z @ theta, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("subset", [False, True])
def test_batched_descent_is_the_published_update(data, method, subset):
    panel = Panel((0, 1), 40 if subset else 120, subset)
    found = problems(data, panel, METHODS[method].coordinates, runs=3, initial_std=0.1)
    configurations = [Configuration(0.5, 0.0), Configuration(0.2, 0.8)]
    curves = descend(found, configurations, natural=METHODS[method].natural, epochs=6, report=ignore)
    for c, configuration in enumerate(configurations):
        for run in range(3):
            s, m = (run, 0) if subset else (0, run)
            reference = plain_descent(
                found.features[s].numpy(),
                (found.signs[s].numpy() + 1) / 2,
                found.start[s, m].numpy(),
                configuration,
                METHODS[method].natural,
                6,
                785,
            )
            assert np.allclose(curves[c, run].exp(), reference, rtol=1e-8)


def test_both_solvers_solve_the_damped_systems():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 40, 12, generator=generator, dtype=torch.double) * torch.logspace(0, -3, 12)
    weights = torch.rand(2, 3, 2, 40, generator=generator, dtype=torch.double) ** 8
    gradient = torch.randn(2, 3, 2, 12, generator=generator, dtype=torch.double)
    metric = torch.einsum("scmn,sni,snj->scmij", weights, features, features) / 40
    epsilon = 1e-2 * metric.diagonal(dim1=3, dim2=4).sum(3) / 20
    expected = torch.linalg.solve(metric + epsilon[..., None, None] * torch.eye(12), gradient)
    iterative = DampedSystems(features, 3, 1e-2, 20)
    for _ in range(4):
        # The later ones are preconditioned by what the first ones left.
        assert torch.allclose(iterative.solve(weights, gradient), expected, rtol=1e-7)
    assert torch.allclose(SampleSpaceSystems(features, 1e-2, 20).solve(weights, gradient), expected, rtol=1e-7)


def test_costs_far_below_the_smallest_number_keep_their_accuracy():
    margins = torch.tensor([[50.0, 60.0], [5000.0, 4000.0], [-3.0, 2.0]], dtype=torch.double)
    expected = [
        math.log((math.exp(-50) + math.exp(-60)) / 2),
        -4000 - math.log(2),
        math.log((math.log1p(math.exp(3)) + math.log1p(math.exp(-2))) / 2),
    ]
    assert torch.allclose(log_cost(margins), torch.tensor(expected, dtype=torch.double), rtol=1e-14)
    assert scientific(-4000 - math.log(2)) == "3.32e-1738"
    assert scientific(math.log(9.999)) == "1.00e+01"


def test_a_diverging_configuration_ends_and_the_others_go_on(data):
    x = data.train_images.double()[:40]
    found = raw(x)
    start = torch.zeros(1, 2, found.features.shape[1], dtype=torch.double)
    overlapping = torch.where(torch.arange(40) % 2 == 0, 1.0, -1.0).double()
    problem = Problems(found.features[None], overlapping[None], start, 785)
    curves = descend(
        problem, [Configuration(1e5, 0.8), Configuration(0.5, 0.0)], natural=True, epochs=30, report=ignore
    )
    assert curves[0].isnan().any()
    assert not curves[0, :, -1].isfinite().any()
    assert curves[1].isfinite().all()
    assert (curves[1, :, -1] < curves[1, :, 0]).all()


def curves_of(*finals):
    log_cost = torch.zeros(len(GRID), 2, 3, dtype=torch.double)
    for index, final in enumerate(finals):
        log_cost[index, :, -1] = torch.tensor(final)
    return Curves(log_cost, 1.0, 1)


def test_the_lowest_mean_is_chosen_and_a_diverged_run_never():
    curves = curves_of((-1.0, -1.0), (-9.0, math.nan), (-3.0, -3.0), (-8.0, -0.5))
    assert curves.chosen == GRID[2]
    assert curves.score == -3.0
    assert curves.ends == {GRID[1]: 2}
    nothing = Curves(torch.full((len(GRID), 2, 3), math.nan).double(), 1.0, 1)
    assert nothing.chosen is None
    assert nothing.diverged
    assert nothing.ending == "all configurations diverged in 1.0 s"
    assert len(nothing.ends) == len(GRID)


def test_claims_are_about_the_final_means(data):
    panel = Panel((0, 1), 120, subset=False)
    study = plan(data, (panel,))
    final = {"GD": -1.0, "WhiteGD": -2.0, "NGD": -4.0, "WhiteNGD": -3.0}
    curves = {study.batch(panel, name): curves_of((cost, cost)) for name, cost in final.items()}
    assert list(claims(Outcome(study, curves), panel).values()) == [True, False, True]


def test_finished_batches_are_kept_and_damaged_ones_done_again(data, tmp_path):
    study = plan(data, panels(data, [(0, 1)], [20, None]), runs=2, epochs=3)
    work = partial(solve, data)
    first = carry_out(study, work, Store(tmp_path, Curves.of), jobs=1, watcher=Log())
    damaged = study.batches[3]
    store, log = Store(tmp_path, Curves.of), Log()
    store.path(damaged).write_bytes(b"nothing")
    second = carry_out(study, work, store, jobs=1, watcher=log)
    assert log.begun == [damaged]
    assert log.how.count(RESUMED) == 7
    assert store.damaged == [store.path(damaged)]
    for batch in study.batches:
        assert torch.equal(first.records[batch].log_cost.nan_to_num(), second.records[batch].log_cost.nan_to_num())


def test_a_batch_keeps_the_name_that_it_had_before():
    options = NeuronOptions("mnist5k", "d5e5551dad158c3b", runs=2, epochs=3, initial_std=0.01, relfisher="0.1.0")
    batch = Batch(Panel((3, 5), 1000, subset=False), "GD", options)
    assert batch.key == "neuron-3vs5-n1000-GD-b0beb1b97dfb"


@pytest.fixture
def run(monkeypatch):
    def start(*arguments):
        monkeypatch.setattr("sys.argv", ["relfisher", "reproduce", "neuron", *map(str, arguments)])
        return main()

    return start


def test_the_command_writes_figure_tables_and_configuration(tmp_path, capsys, run):
    out = tmp_path / "out"
    arguments = ["--out", out, "--pair", "3,5", "--size", "40", "--size", "all"]
    arguments += ["--runs", "2", "--epochs", "2", "--methods", "gd,WhiteNGD"]
    assert run(*arguments) == 0
    assert "WhiteNGD" in capsys.readouterr().out
    written = {path.name for path in out.iterdir()}
    assert written == {
        "runs", "table.md", "table.csv", "grid.csv", "curves.csv.gz", "config.json", "figure4.png", "figure4.svg",
    }  # fmt: skip
    assert json.loads((out / "config.json").read_text())["panels"] == ["3 vs 5, n = 40", "3 vs 5, n = 1,000"]
    assert len((out / "table.csv").read_text().splitlines()) == 1 + 4
    assert len((out / "grid.csv").read_text().splitlines()) == 1 + 4 * len(GRID)
    assert run(*arguments) == 0
    assert capsys.readouterr().out.count("already finished") == 4


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--pair", "3"], "'--pair': '3' is not a pair"),
        (["--pair", "3,3"], "'--pair': 3 and 3 are not two classes"),
        (["--pair", "3,12"], "'--pair': 3 and 12 are not two classes"),
        (["--size", "many"], "'--size': 'many' is not a number"),
        (["--size", "4"], "'--size': 4 images of 3 and 5 in mnist5k: allowed are 20 to 1000"),
        (["--methods", "adam"], "'--methods': 'adam' is not a method, allowed are GD, WhiteGD, NGD, WhiteNGD"),
        (["--data", "nowhere"], "'--data': 'nowhere' is neither"),
        (["--runs", "0"], "--runs"),
    ],
)
def test_errors_are_one_line_that_names_the_argument(tmp_path, capsys, run, arguments, part):
    assert run("--out", tmp_path / "out", *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert part in lines[0].replace("Invalid value for ", "")
