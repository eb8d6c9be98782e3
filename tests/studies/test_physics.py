"""The race on equations: true solutions, references, residuals, optimizers and the report."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from instant import Log
from scipy.integrate import solve_ivp
from torch import nn

from relfisher.studies.engine import carry_out
from relfisher.studies.peers import available
from relfisher.studies.physics.gauss_newton import jacobian
from relfisher.studies.physics.methods import LIMIT, METHODS, RESIDUAL, UNTUNED
from relfisher.studies.physics.problems import PROBLEMS
from relfisher.studies.physics.race import Solved, carry_out_run, plan
from relfisher.studies.physics.references import allen_cahn, burgers
from relfisher.studies.physics.report import best_peer, header, report, rows
from relfisher.studies.physics.task import Closure, Solving
from relfisher.studies.report import Invocation, write
from relfisher.studies.store import Store

WITHOUT_FORMULA = ("pde-burgers", "pde-allen-cahn")
POISSON = PROBLEMS["pde-poisson"]
NOTHING = nn.Identity()


def test_maps_are_those_of_integrals_and_of_a_flow():
    integral, flow = PROBLEMS["map-integral"], PROBLEMS["map-flow"]
    x = torch.tensor([[3.0, 0.4], [0.0, 0.7]], dtype=torch.float64)
    places = torch.linspace(0, 1, 4001, dtype=torch.float64)
    expected = [torch.trapezoid(torch.cos(w * places * end), places * end) for w, end in x]
    torch.testing.assert_close(integral.answer(x)[:, 0], torch.stack(expected), rtol=1e-6, atol=0.0)
    starts = flow.within(4, torch.Generator().manual_seed(0)).numpy()

    def rate(_, state):
        a, b = state.reshape(2, -1)
        growth = 1 - a**2 - b**2
        return np.concatenate([growth * a - flow.rate * b, growth * b + flow.rate * a])

    ends = solve_ivp(rate, (0, 1), starts.T.ravel(), rtol=1e-9, atol=1e-10).y[:, -1].reshape(2, -1).T
    np.testing.assert_allclose(flow.answer(torch.from_numpy(starts)), ends, atol=1e-6)


@pytest.mark.parametrize("name", ["map-integral", "map-flow"])
def test_maps_are_learned(name):
    task = Solving(PROBLEMS[name])
    model, drawn = task.equation.build(0), task.draws(torch.Generator().manual_seed(0))
    optimizer, before = METHODS[RESIDUAL].make(model), task.validate(model)
    for _ in range(5):
        task.iterate(optimizer, model, *next(drawn))
    assert task.validate(model) < 0.3 * before


@pytest.mark.parametrize("name", sorted(set(PROBLEMS) - set(WITHOUT_FORMULA) - {"pde-coefficient"}))
def test_the_true_solution_has_no_residual(name, monkeypatch):
    equation = PROBLEMS[name]
    monkeypatch.setattr(type(equation), "solution", lambda self, _, x: self.answer(x))
    x = equation.within(20, torch.Generator().manual_seed(0)).double().requires_grad_()
    torch.testing.assert_close(equation.residual(NOTHING, x), torch.zeros_like(equation.residual(NOTHING, x)))
    conditions = equation.conditions(NOTHING, equation.on_edge(20, torch.Generator().manual_seed(0)).double())
    assert conditions is None or float(conditions.abs().max()) == 0


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_the_loss_is_that_of_its_residuals_and_depends_on_the_network(name):
    equation = PROBLEMS[name]
    model = equation.build(0)
    points = next(equation.points(torch.Generator().manual_seed(0)))
    loss = equation.loss(model, points)
    expected = equation.residual(model, points[0]).square().sum() / equation.inside
    conditions = equation.conditions(model, points[1])
    if conditions is not None:
        expected = expected + equation.weight * conditions.square().sum() / equation.edge
    torch.testing.assert_close(loss, expected)
    loss.backward()
    slopes = [parameter.grad for parameter in model.parameters()]
    assert all(slope is not None and bool(slope.isfinite().all()) for slope in slopes)


@pytest.mark.parametrize("name", ["pde-helmholtz", "pde-burgers", "pde-allen-cahn"])
def test_conditions_that_are_built_in_hold_for_any_network(name):
    equation = PROBLEMS[name]
    x = equation.on_edge(40, torch.Generator().manual_seed(0))
    if len(equation.axes) and equation.axes[1] == "t":
        x = x[x[:, 1] != 1]
    found = equation.solution(equation.build(0), x).detach().double()
    torch.testing.assert_close(found, equation.answer(x), rtol=0.0, atol=2e-6)


@pytest.mark.parametrize("name", ["pde-heat", "pde-advection", "pde-taylor-green"])
def test_no_condition_is_set_at_the_end_of_time(name):
    equation = PROBLEMS[name]
    assert bool((equation.on_edge(60, torch.Generator().manual_seed(0))[:, -1] < equation.box[-1][1]).all())


def test_points_are_drawn_anew_where_the_equation_says_so():
    for equation in PROBLEMS.values():
        steps = equation.points(torch.Generator().manual_seed(0))
        first, second = next(steps)[0], next(steps)[0]
        assert torch.equal(first, second) != equation.fresh


def test_the_reference_of_burgers_equation_satisfies_it():
    x, t = np.array([0.3, 0.6, -0.5, 0.8, -0.1]), np.array([0.37, 0.2, 0.72, 0.9, 0.1])
    nu, h = 0.01 / math.pi, 1e-3

    def at(dx, dt):
        return burgers(x + dx, t + dt, nu)

    u_t, u_x = (at(0, h) - at(0, -h)) / (2 * h), (at(h, 0) - at(-h, 0)) / (2 * h)
    u_xx = (at(h, 0) - 2 * at(0, 0) + at(-h, 0)) / h**2
    np.testing.assert_allclose(u_t + at(0, 0) * u_x, nu * u_xx, atol=1e-4)
    places = np.linspace(-1, 1, 11)
    np.testing.assert_allclose(burgers(places, np.zeros(11), nu), -np.sin(np.pi * places), atol=1e-12)
    np.testing.assert_allclose(burgers(np.array([-1.0, 1.0]), np.array([0.7, 0.7]), nu), 0, atol=1e-12)


def test_the_reference_of_the_allen_cahn_equation_is_that_of_finite_differences():
    places = np.linspace(-1, 1, 401)
    width = places[1] - places[0]

    def rate(_, u):
        padded = np.concatenate([[-1.0], u, [-1.0]])
        return 1e-3 * np.diff(padded, 2) / width**2 + 5 * u - 5 * u**3

    inner = places[1:-1]
    found = solve_ivp(
        rate, (0, 1), inner**2 * np.cos(np.pi * inner), method="RK45", rtol=1e-6, atol=1e-8, t_eval=[0.5, 1]
    )
    for time, values in zip(found.t, found.y.T, strict=True):
        np.testing.assert_allclose(allen_cahn(inner, np.full_like(inner, time)), values, atol=5e-3)
    np.testing.assert_allclose(allen_cahn(np.array([-1.0, 1.0]), np.array([0.3, 0.3])), -1, atol=1e-12)


@pytest.mark.parametrize("name", ["pde-poisson", "pde-taylor-green", "map-integral", "map-flow"])
def test_the_jacobian_of_the_limit_is_that_of_each_residual(name, monkeypatch):
    equation = PROBLEMS[name]
    monkeypatch.setattr(type(equation), "hidden", (4, 3))
    monkeypatch.setattr(type(equation), "double", True)
    monkeypatch.setattr(type(equation), "inside", 5)
    monkeypatch.setattr(type(equation), "edge", 4)
    model = equation.build(0)
    closure = Closure(
        equation, model, torch.optim.SGD(model.parameters()), next(equation.points(torch.Generator().manual_seed(0)))
    )
    matrix, flat = jacobian(closure)
    parts = [one for part in closure.parts() for one in part.unbind(1)]
    expected = torch.cat(parts)
    torch.testing.assert_close(flat, expected.detach())
    parameters = list(model.parameters())
    slopes = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in expected]
    torch.testing.assert_close(matrix, torch.stack([torch.cat([part.flatten() for part in row]) for row in slopes]))


def test_the_limit_lowers_the_loss_by_orders_of_magnitude_in_some_steps():
    task = Solving(POISSON)
    model, points = POISSON.build(0), next(POISSON.points(torch.Generator().manual_seed(0)))
    optimizer = METHODS[LIMIT].make(model)
    losses = [task.iterate(optimizer, model, points) for _ in range(12)]
    assert losses[-1] < 1e-3 * losses[0]
    assert all(after <= before for before, after in itertools.pairwise(losses))


def test_every_tuned_method_has_as_many_configurations():
    assert {len(method.configurations) for name, method in METHODS.items() if name != UNTUNED} == {6}
    assert METHODS[UNTUNED].configurations[0].items() <= METHODS[RESIDUAL].configurations[0].items()


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_run_of_each_method_is_measured(method):
    _, known = available((method,), METHODS, lambda seed, _: POISSON.build(seed))
    if not known:
        pytest.skip("comes with the extra `bench`")
    study = plan("pde-poisson", methods=(method,), seeds=1, tuning=0.05, budget=0.1)
    record = carry_out_run(study.candidates(method)[-1], lambda *_: None)
    assert not record.diverged
    assert record.validation[0] == pytest.approx(Solving(POISSON).validate(POISSON.build(0)))
    assert record.solution.shape == (101**2, 1)
    again = Solved.of(record.arrays())
    assert again.evaluated == record.evaluated
    assert np.array_equal(again.solution, record.solution)


def test_adam_gives_way_to_lbfgs_at_its_share_of_the_run():
    method, task = METHODS["Adam-L-BFGS"], Solving(POISSON)
    model, points = POISSON.build(0), next(POISSON.points(torch.Generator().manual_seed(0)))
    optimizer = method.make(model, lr=5e-3, share=0.5)
    evaluations = []
    model.register_forward_hook(lambda *_: evaluations.append(1))
    counts = []
    for done in (0.0, 0.49, 0.51):
        evaluations.clear()
        method.pace(optimizer, done)
        task.iterate(optimizer, model, points)
        counts.append(len(evaluations))
    assert counts[0] == counts[1] == 2
    assert counts[2] > 20


def test_the_schedule_is_a_cosine_over_the_time_of_the_run():
    method = METHODS["Adam"]
    optimizer = method.make(nn.Linear(1, 1), lr=0.1)
    rates = []
    for done in (0.0, 0.5, 1.0):
        method.pace(optimizer, done)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.1, 0.05, 0.0])


STUDY = plan("pde-poisson", methods=("Adam", LIMIT, RESIDUAL), seeds=3, tuning=1.0, budget=4.0)


def instant(run, tell):
    """Adam ends at 0.1 at best, ResidualRNGD at 0.01, and the limit diverges."""
    end = {"Adam": 0.1, LIMIT: math.nan, RESIDUAL: 0.01}[run.method] * (1 + 0.1 * run.seed)
    if run.learning_rate not in {2e-3, 1e-2}:
        end *= 2
    tell(1.0, end)
    count = int(10 * run.seconds)
    return Solved(
        cost=np.full(count, end, dtype=np.float32),
        seconds=np.linspace(0, run.seconds, count + 1)[1:],
        validation=np.array([1.0, 3 * end, end]),
        full_cost=end,
        diverged=math.isnan(end),
        evaluated=(0, count // 2, count),
        solution=np.zeros((101**2, 1), dtype=np.float32),
    )


def test_the_table_compares_the_medians_with_the_best_peer(tmp_path):
    outcome = carry_out(STUDY, instant, Store(tmp_path / "runs", Solved.of), jobs=1, watcher=Log())
    assert outcome.chosen["Adam"].learning_rate == 2e-3
    assert best_peer(outcome) == ("Adam", pytest.approx(0.11))
    table = {row[0]: dict(zip(header(outcome), row, strict=True)) for row in rows(outcome)}
    assert table[RESIDUAL]["error at 4 s"] == "0.011"
    assert table[RESIDUAL]["of the seeds"] == "0.01 to 0.012"
    assert table[RESIDUAL]["relative to the best peer"] == "0.1"
    assert table[RESIDUAL]["at 2 s"] == "0.033"
    assert table[LIMIT]["configuration"] == "all diverged"
    write(report(outcome, {"SOAP": "not installed"}), Invocation("relfisher bench race", 1), tmp_path)
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    drawn = {f"{name}.{kind}" for name in ("race", "solution") for kind in ("png", "svg")}
    assert names == {"table.md", "config.json", "tuning.csv", "curves.csv.gz"} | drawn
    assert "| SOAP | not installed |" in (tmp_path / "table.md").read_text()


def test_a_run_is_repeated_with_every_seed_for_the_whole_time():
    best = replace(STUDY.candidates("Adam")[2], seed=0)
    assert [(run.seed, run.seconds) for run in STUDY.repeats(best)] == [(0, 4.0), (1, 4.0), (2, 4.0)]


def test_the_error_of_an_inverse_problem_is_that_of_its_coefficient(monkeypatch):
    equation = PROBLEMS["pde-coefficient"]
    task, model = Solving(equation), equation.build(0)
    assert task.validate(model) == pytest.approx(1 / 0.05 - 1)
    with torch.no_grad():
        model.log_coefficient.fill_(math.log(0.05))
    assert task.validate(model) == pytest.approx(0.0)
    monkeypatch.setattr(type(equation), "solution", lambda self, _, x: self.answer(x))
    x = equation.within(20, torch.Generator().manual_seed(0)).requires_grad_()
    torch.testing.assert_close(equation.residual(model, x), torch.zeros(20, 2, dtype=torch.float64))
    notes, known = available((LIMIT, RESIDUAL), METHODS, lambda seed, _: equation.build(seed))
    assert set(notes) == {LIMIT}
    assert known == (RESIDUAL,)


def test_a_distance_grows_like_one():
    equation = PROBLEMS["field-distance"]
    x = equation.within(500, torch.Generator().manual_seed(0)).double()
    step = 1e-4 * torch.randn(500, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = (equation.answer(x + step) - equation.answer(x)).abs()[:, 0]
    assert bool((change <= step.norm(dim=1) + 1e-12).all())
    on_the_arc = torch.tensor([[-0.6, 0.0], [0.0, 0.6], [-0.45, 0.0], [0.6, 0.0]], dtype=torch.float64)
    expected = torch.tensor([-0.15, -0.15, 0.0, 2 * 0.6 * math.sin(math.pi / 12) - 0.15], dtype=torch.float64)
    torch.testing.assert_close(equation.answer(on_the_arc)[:, 0], expected)
