"""Residual RNGD: its metric against derivatives row by row, its step by hand, and what it solves."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from relfisher import ResidualRNGD
from relfisher.optim import residual, rowwise
from relfisher.optim.joint import step_of_rows
from relfisher.optim.rows import drawn_rows, scaled_parts
from relfisher.optim.rowwise import RowDerivatives, as_matrix, taped


def network(*widths):
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())][:-1]
    return nn.Sequential(*layers).double()


def poisson(model, x):
    """The residuals of -u'' = pi^2 sin(pi x), [points, 1], and those at the ends."""
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    ends = model(torch.tensor([[-1.0], [1.0]], dtype=x.dtype))
    return [bend + math.pi**2 * torch.sin(math.pi * x), 3 * ends]


def points(count=12):
    return torch.linspace(-1, 1, count, dtype=torch.float64)[:, None].requires_grad_()


def derivatives(residuals, layer):
    """The derivatives [residuals, out, d] of scaled residuals by a layer's weight and bias, one by one."""
    flat = torch.cat([part.flatten() / math.sqrt(part.numel()) for part in residuals])
    rows = [
        torch.autograd.grad(one, [layer.weight, layer.bias], retain_graph=True, materialize_grads=True) for one in flat
    ]
    return torch.stack([torch.cat([weight, bias[:, None]], 1) for weight, bias in rows])


def assert_go_on_alike(pair, twin, x, steps):
    """Two models with their optimizers stay bitwise equal."""
    for _ in range(steps):
        for model, optimizer in (pair, twin):
            optimizer.step(lambda model=model: poisson(model, x))
    for one, same in zip(pair[0].parameters(), twin[0].parameters(), strict=True):
        torch.testing.assert_close(one, same, rtol=0.0, atol=0.0)


def test_the_metric_is_that_of_all_residuals_in_the_eigenvectors_of_its_factors():
    model, x = network(1, 5, 4, 1), points()
    layer = model[2]
    rows = derivatives(poisson(model, x), layer)
    optimizer = ResidualRNGD(model, 1e-12)
    optimizer.step(lambda: poisson(model, x))
    state = optimizer.state[layer.weight]
    torch.testing.assert_close(state["outputs"], sum(row @ row.T for row in rows))
    torch.testing.assert_close(state["inputs"], sum(row.T @ row for row in rows))
    turned = state["outputs_basis"].T @ rows @ state["inputs_basis"]
    torch.testing.assert_close(state["metric"], turned.square().sum(0))


def test_the_first_step_is_the_inverse_metric_times_the_gradient_with_the_length_of_the_rate():
    model, x = network(1, 4, 1), points()
    layer = model[2]
    before = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    rows = derivatives(poisson(model, x), layer)
    flat = torch.cat([part.flatten() / math.sqrt(part.numel()) for part in poisson(model, x)]).detach()
    gradient = 2 * torch.einsum("n,nij->ij", flat, rows)
    optimizer = ResidualRNGD(model, 0.05, momentum=0.0, damping=1e-3)
    loss = optimizer.step(lambda: poisson(model, x))
    torch.testing.assert_close(loss, flat.square().sum())
    # One output: the factor of the inputs is the whole metric.
    metric = torch.einsum("nij,nik->jk", rows, rows)
    damped = metric + 1e-3 * metric.trace() / len(metric) * torch.eye(len(metric), dtype=torch.float64)
    step = torch.linalg.solve(damped, gradient[0])[None]
    expected = before - 0.05 * 0.2 * math.sqrt(step.numel()) * step / step.norm()
    torch.testing.assert_close(torch.cat([layer.weight, layer.bias[:, None]], 1).detach(), expected)


def test_some_rows_stand_for_all_on_average():
    """Each row has a chance of its own; the mean over many draws is the whole metric."""
    model, x = network(1, 3, 1), points(8)
    whole = ResidualRNGD(model, 1e-12, decay=0.0)
    whole.step(lambda: poisson(model, x))
    expected = whole.state[model[0].weight]["inputs"]
    total, some = torch.zeros_like(expected), ResidualRNGD(model, 1e-12, interval=1, decay=0.0, samples=4)
    for _ in range(100):
        some.step(lambda: poisson(model, x))
        total += some.state[model[0].weight]["inputs"] / 100
    # The two rows at the ends are within the number of samples.
    torch.testing.assert_close(total, expected, rtol=0.0, atol=0.2 * float(expected.abs().max()))


def test_several_residuals_of_a_row_add_up_on_average():
    model = nn.Linear(2, 3).double()
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimizer = ResidualRNGD(model, 1e-12, interval=1, decay=0.0)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(100):
        optimizer.step(lambda: model(x))
        total += optimizer.state[model.weight]["outputs"] / 100
    mean = (x.square().sum() + 6) / 18
    torch.testing.assert_close(total.diagonal(), mean.expand(3))
    torch.testing.assert_close(total, mean * torch.eye(3, dtype=torch.float64), rtol=0.0, atol=0.3 * float(mean))


def test_an_equation_is_solved_better_than_by_adam():
    torch.manual_seed(0)
    ours, x = network(1, 16, 16, 1), points()
    theirs, steps = copy.deepcopy(ours), 150
    optimizer, adam = ResidualRNGD(ours, 0.1, total_steps=steps), torch.optim.Adam(theirs.parameters(), 1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        optimizer.step(lambda: poisson(ours, x))
        adam.zero_grad()
        sum(part.square().mean() for part in poisson(theirs, x)).backward()
        adam.step()
        scheduler.step()
    losses = [float(sum(part.square().mean() for part in poisson(model, x)).detach()) for model in (ours, theirs)]
    assert losses[0] < 0.1 * losses[1]


class Inverse(nn.Module):
    """A network with a coefficient, a layer without bias, and a layer that is not trained."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.frozen = nn.Linear(1, 6, bias=False), nn.Linear(6, 6), nn.Linear(6, 1)
        self.coefficient = nn.Parameter(torch.zeros(()))
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.frozen(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_parameters_outside_of_layers_are_trained_and_frozen_ones_are_not():
    torch.manual_seed(0)
    model = Inverse()
    x = torch.linspace(-1, 1, 10)[:, None]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = ResidualRNGD(model, 0.05)
    losses = [float(optimizer.step(lambda: model(x) + model.coefficient - 3.0 - x)) for _ in range(80)]
    assert losses[-1] < 0.1 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"coefficient", "first.weight", "second.weight", "second.bias"}


@pytest.mark.parametrize("lr", [0.05, None])
def test_a_saved_run_goes_on_alike(lr):
    torch.manual_seed(0)
    model, x = network(1, 4, 1), points()
    optimizer = ResidualRNGD(model, lr, samples=6, interval=3)
    for _ in range(5):
        optimizer.step(lambda: poisson(model, x))
    other = copy.deepcopy(model)
    resumed = ResidualRNGD(other, lr, samples=6, interval=3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_go_on_alike((model, optimizer), (other, resumed), x, 5)


@pytest.mark.parametrize("lr", [0.05, None])
def test_a_loss_that_is_not_finite_moves_nothing(lr):
    model, x = network(1, 4, 1), points()
    optimizer = ResidualRNGD(model, lr)
    optimizer.step(lambda: poisson(model, x))
    before = [parameter.clone() for parameter in model.parameters()]
    loss = optimizer.step(lambda: [part * math.inf for part in poisson(model, x)])
    assert not math.isfinite(float(loss))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -1.0), ("momentum", 1.0), ("damping", -1.0), ("decay", 1.0), ("interval", 0), ("samples", 0)],
)
def test_errors_name_the_option(option, value):
    with pytest.raises(ValueError, match=option):
        ResidualRNGD(nn.Linear(1, 1), **{option: value})


def test_without_a_rate_there_is_no_schedule():
    with pytest.raises(ValueError, match="total_steps"):
        ResidualRNGD(nn.Linear(1, 1), None, total_steps=10)


def test_layers_with_the_same_weight_move_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = model[0].weight.detach().clone()
    optimizer = ResidualRNGD(model, 0.05)
    optimizer.step(lambda: model(x) - 1)
    moved = torch.cat([model[0].weight.detach() - before, torch.zeros(3, 1, dtype=torch.float64)], 1)
    assert float(moved.norm()) <= 0.05 * 0.2 * math.sqrt(12) + 1e-12


def test_a_closure_must_return_residuals():
    optimizer = ResidualRNGD(nn.Linear(1, 1))
    with pytest.raises(TypeError, match="residuals"):
        optimizer.step(list)


def jacobian(residuals, parameters):
    """The derivatives [residuals, parameters] of scaled residuals one by one, and the residuals."""
    flat = torch.cat([part.flatten() / math.sqrt(part.numel()) for part in residuals])
    rows = [torch.autograd.grad(one, parameters, retain_graph=True, materialize_grads=True) for one in flat]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]), flat.detach()


class Heat(nn.Module):
    """A network of two inputs with a trained coefficient, and the residuals of u_t = k u_xx and of its values."""

    def __init__(self):
        super().__init__()
        self.layers = network(2, 4, 3, 1)
        self.coefficient = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def residuals(self, x):
        u = self.layers(x)
        (slopes,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (bends,) = torch.autograd.grad(slopes[:, 0].sum(), x, create_graph=True)
        equation = slopes[:, 1] - self.coefficient * bends[:, 0]
        edge = torch.ones(3, 2, dtype=x.dtype) * torch.arange(3, dtype=x.dtype)[:, None]
        return [torch.stack([equation, u[:, 0] - x[:, 1].detach()], -1), 2 * self.layers(edge)]


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_joint_step_is_that_of_the_whole_metric(share):
    """The step d has the least |r + J d|^2 + e |d - kept|^2, by a dense solution for parameters."""
    torch.manual_seed(0)
    model = Heat()
    x = torch.rand(6, 2, dtype=torch.float64).requires_grad_()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    parameters = [part for layer in layers for part in (layer.weight, layer.bias)]
    matrix, flat = jacobian(model.residuals(x), [*parameters, model.coefficient])
    kept = [share * torch.randn_like(as_matrix([layer.weight, layer.bias])) for layer in layers]
    kept.append(share * torch.ones(1, dtype=torch.float64))
    with taped(layers, model) as tape:
        parts = scaled_parts(model.residuals(x))
        rows = drawn_rows(parts, tape, layers, [model.coefficient], 100, torch.Generator())
    found, damping = step_of_rows(rows, 1e-5, kept if share else ())
    assert damping == 1e-5
    # The mean of the diagonal of J J', as the damping is relative to it.
    damping *= float(matrix.square().sum()) / len(matrix)

    def flattened(step):
        parts = [part.flatten() for layer in step[:-1] for part in (layer[:, :-1], layer[:, -1])]
        return torch.cat([*parts, step[-1]])

    unit = torch.eye(matrix.shape[1], dtype=torch.float64)
    right = damping * flattened(kept) - matrix.T @ flat
    torch.testing.assert_close(flattened(found), torch.linalg.solve(matrix.T @ matrix + damping * unit, right))


def test_steps_keep_a_share_of_the_last_one_where_points_are_drawn_and_none_where_they_are_not(monkeypatch):
    given = []

    def watched(rows, damping, kept):
        given.append(len(kept))
        return step_of_rows(rows, damping, kept)

    monkeypatch.setattr(residual, "step_of_rows", watched)
    torch.manual_seed(0)
    model = network(1, 4, 1)
    optimizer = ResidualRNGD(model)
    for count in (5, 5, 9, 9):
        optimizer.step(lambda count=count: poisson(model, points(count)))
    assert given == [0, 0, 3, 0]


def test_rows_with_random_signs_have_the_whole_metric_on_average():
    torch.manual_seed(0)
    model = Heat()
    x = torch.rand(6, 2, dtype=torch.float64).requires_grad_()
    matrix, flat = jacobian(model.residuals(x), list(model.layers.parameters()))
    optimizer, total, gradient = ResidualRNGD(model), 0.0, 0.0
    layers = optimizer._layers
    for seed in range(100):
        with taped(layers, model) as tape:
            parts = scaled_parts(model.residuals(x))
            rows = drawn_rows(parts, tape, layers, [], 7, torch.Generator().manual_seed(seed))
        dense = torch.cat([layer.dense().flatten(1) for layer in rows.layers], 1)
        assert len(dense) == 7
        total, gradient = total + dense.square().sum() / 100, gradient + rows.residuals.square().sum() / 100
    torch.testing.assert_close(total, matrix.square().sum(), rtol=0.2, atol=0.0)
    torch.testing.assert_close(gradient, flat.square().sum(), rtol=0.2, atol=0.0)


@pytest.mark.parametrize("products", [1, 3])
def test_inner_products_of_rows_are_those_of_dense_rows(products, monkeypatch):
    monkeypatch.setattr(rowwise, "PASS", 0)
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(150, products, 40, dtype=torch.float64, generator=generator) for _ in range(2))
    dense = torch.einsum("nko,nkd->nod", left, right).flatten(1)
    found = RowDerivatives(left, right).gram()
    torch.testing.assert_close(found.tril(), (dense @ dense.T).tril())


def test_without_a_rate_the_loss_never_rises():
    torch.manual_seed(0)
    model, x = network(1, 8, 8, 1), points()
    optimizer = ResidualRNGD(model)
    losses = [float(optimizer.step(lambda: poisson(model, x))) for _ in range(30)]
    assert all(after <= before for before, after in itertools.pairwise(losses))
    assert losses[-1] < 1e-6 * losses[0]


def test_a_step_that_raises_the_loss_is_taken_back():
    model, x = network(1, 4, 1), points()
    optimizer = ResidualRNGD(model)
    before = [parameter.clone() for parameter in model.parameters()]
    calls = []

    def residuals():
        calls.append(1)
        return [part * (10.0 if len(calls) > 2 else 1.0) for part in poisson(model, x)]

    optimizer.step(residuals)  # the rows, their check, and the loss after each half of the step
    assert len(calls) == 2 + 6
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.param_groups[0]["damping"] == pytest.approx(0.1)


def mixed(model, x):
    return model(x) - model(x).mean()


def reversed_rows(model, x):
    return model(x).flip(0) - x[:, :1]


def through_functional(model, x):
    return nn.functional.linear(model[0](x), model[2].weight) - x[:, :1]


@pytest.mark.parametrize("residuals", [mixed, reversed_rows, through_functional])
def test_rows_that_mix_are_refused(residuals):
    torch.manual_seed(0)
    model, x = network(2, 4, 1), torch.rand(8, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="do not add up to the gradient"):
        ResidualRNGD(model).step(lambda: residuals(model, x))


def test_one_call_may_serve_several_residuals_and_other_rows_are_refused():
    torch.manual_seed(0)
    model, x = network(2, 4, 1), torch.rand(8, 2, dtype=torch.float64)

    def split(sizes):
        return [part - 1 for part in model(x).split(sizes)]

    losses = [float(ResidualRNGD(model).step(lambda: split([5, 3]))) for _ in range(4)]
    assert losses[-1] < losses[0]
    with pytest.raises(ValueError, match="depend on 8 rows"):
        ResidualRNGD(model).step(lambda: model(x).view(4, 2).sum(1) - 1)


def test_without_a_rate_few_numbers_may_lie_outside_of_layers():
    with pytest.raises(ValueError, match="32 do: give lr"):
        ResidualRNGD(nn.Sequential(nn.Linear(2, 16), nn.LayerNorm(16)))


def test_layers_are_as_before_after_a_step():
    model, x = network(1, 4, 1), points()
    with pytest.raises(TypeError, match="residuals"):
        ResidualRNGD(model).step(lambda: (poisson(model, x), None)[1])
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("lr", [0.05, None])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copied_optimizer_goes_on_alike_with_the_copied_model(lr, copied):
    torch.manual_seed(0)
    model, x = network(1, 4, 1), points()
    optimizer = ResidualRNGD(model, lr)
    for _ in range(2):
        optimizer.step(lambda: poisson(model, x))
    assert_go_on_alike((model, optimizer), copied((model, optimizer)), x, 3)


def test_metrics_stay_finite_where_residuals_are_not():
    model = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    optimizer = ResidualRNGD(model, 0.03)
    for factor in (math.nan, 1e25, 1.0):
        before = model[1].weight.detach().clone()
        optimizer.step(lambda factor=factor: factor * (model(x) - 1))
    assert not torch.equal(model[1].weight, before)
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert all(value.isfinite().all() for value in kept)


def test_weights_that_are_computed_have_the_metrics_of_what_they_are_computed_from():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 4)), nn.Tanh(), nn.Linear(4, 1))
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = ResidualRNGD(model, 0.03)
    for _ in range(3):
        optimizer.step(lambda: model(x) - 1)
    assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    saved = optimizer.state_dict()["state"]
    assert all("metric" in saved[place] for place in saved)


def test_inputs_may_be_given_by_name():
    model, x = nn.Linear(2, 1), torch.ones(3, 2)
    before = model.weight.detach().clone()
    ResidualRNGD(model, 0.03).step(lambda: model(input=x) - 1)
    assert not torch.equal(model.weight, before)


def test_frozen_parameters_and_further_groups_are_refused():
    model = network(1, 4, 1)
    optimizer = ResidualRNGD(model)
    with pytest.raises(ValueError, match="one group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})
    model[2].bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"2\.bias was frozen"):
        optimizer.step(lambda: poisson(model, points()))


def test_states_of_others_are_refused():
    model = network(1, 4, 1)
    optimizer = ResidualRNGD(model, 0.03)
    with pytest.raises(ValueError, match="lacks after"):
        optimizer.load_state_dict(torch.optim.SGD(model.parameters(), 0.1).state_dict())
    optimizer.step(lambda: poisson(model, points()))
    with pytest.raises(ValueError, match=r"metric of 0\.weight has the shape \[4, 2\].*needs \[5, 2\]"):
        ResidualRNGD(network(1, 5, 1), 0.03).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda _: None, TypeError, "a tensor or several"),
        (lambda residuals: residuals > 0, TypeError, r"real residuals.*torch\.bool"),
        (lambda residuals: residuals * 1j, TypeError, r"real residuals.*torch\.complex64"),
        (lambda residuals: residuals.detach(), ValueError, "depend on trained parameters"),
    ],
)
def test_errors_say_what_residuals_must_be(change, error, said):
    model = nn.Linear(2, 1)
    with pytest.raises(error, match=said):
        ResidualRNGD(model).step(lambda: change(model(torch.ones(3, 2))))
