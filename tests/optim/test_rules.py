"""The step rules: what each one bounds, and what it does not depend on."""

import math

import pytest
import torch
from builders import inputs, mlp, normed_mlp, train, weights
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from relfisher import RNGD, MetricOptions
from relfisher.layers import discover
from relfisher.optim.rules import Move, Normalized, Spectral, TrustRegion, polar_factor
from relfisher.optim.rules.spectral import polar_operations
from relfisher.responses import LinearGaussian
from relfisher.structures import Diagonal, Inversion, NeuronBlocks, Samples, SharedBlock

sizes = st.tuples(st.integers(4, 12), st.integers(2, 6), st.integers(2, 5))
STRUCTURES = {"shared": SharedBlock(), "neuron": NeuronBlocks(), "diagonal": Diagonal()}


def move(size, structure=None, lr=0.1, scale=1.0, root=True):
    """Return the move of a linear layer whose metric is that of random inputs."""
    n, out, d = size
    structure = structure or SharedBlock()
    model = mlp(sizes=(d, out), bias=False)
    (layer,) = discover(model).layers
    state = structure.create((out, d), torch.float64, torch.device("cpu"), identity=False, root=root)
    batch = structure.batch_statistics(Samples(inputs(0, n, d), inputs(1, n, out), LinearGaussian()))
    structure.ema_update(state, batch, 0.9)
    structure.refresh(state, Inversion(0.1))
    state = {key: state[key].unsqueeze(0) for key in structure.factors((out, d), root=root)}
    state |= {"log_norm_stats": torch.zeros(1, 3), "uncorrelated": torch.zeros(1)}
    gradient = scale * inputs(2, out, d).unsqueeze(0)
    return Move((layer,), structure, state, gradient, gradient, gradient, 0.0, lr)


def taken(step):
    scale = step.scale
    return (scale.view(-1, 1, 1) if isinstance(scale, torch.Tensor) else scale) * step.direction


@given(size=sizes, scale=st.floats(1e-6, 1e6), kind=st.sampled_from(sorted(STRUCTURES)))
def test_normalised_and_spectral_steps_do_not_depend_on_the_losss_scale(size, scale, kind):
    for rule in (Normalized(), Spectral()):
        (one,) = rule.steps([move(size, STRUCTURES[kind])])
        (other,) = rule.steps([move(size, STRUCTURES[kind], scale=scale)])
        torch.testing.assert_close(taken(one), taken(other), rtol=1e-6, atol=1e-9)
        rms = float(taken(one).square().mean().sqrt())
        assert rms == pytest.approx(0.2 * 0.1 if isinstance(rule, Normalized) else 0.1 / math.sqrt(size[2]))


@pytest.mark.parametrize("rule", [Normalized(), Spectral()])
@given(scales=st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=8), whole=st.floats(1e-3, 1e3))
def test_steps_are_shorter_where_gradients_are_a_tenth_of_what_they_were_or_less(rule, scales, whole):
    moves, full = move((6, 3, 2)), 0.2 * 0.1 if isinstance(rule, Normalized) else 0.1 / math.sqrt(2)
    weights, logarithms = [], []
    for number, scale in enumerate(scales, start=1):
        (step,) = rule.steps([moves._replace(gradient=moves.gradient * scale * whole)])
        weights.append((number / 500) ** 2)
        logarithms.append(math.log(scale))
        usual = math.exp(sum(w * each for w, each in zip(weights, logarithms, strict=True)) / sum(weights))
        shorter = min(1.0, scale / (0.1 * usual))
        assert float(taken(step).square().mean().sqrt()) == pytest.approx(full * shorter, rel=1e-3)


@pytest.mark.parametrize("rule", [Normalized(noise_floor=0), Spectral(noise_floor=0)])
@given(
    factors=st.lists(st.floats(-3, 3).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=12),
    share=st.floats(0, 0.95),
    seed=st.integers(0, 99),
)
def test_the_length_of_steps_is_the_momentum_relative_to_that_of_uncorrelated_gradients(rule, factors, share, seed):
    moves, full = move((6, 3, 2)), 0.2 * 0.1 if isinstance(rule, Normalized) else 0.1 / math.sqrt(2)
    common, gradients = inputs(seed, 3, 2).unsqueeze(0), []
    for place, factor in enumerate(factors):
        gradients.append(factor * (common + inputs(seed + place, 3, 2)))
        weights = [share**age for age in reversed(range(len(gradients)))]
        velocity = sum(weight * each for weight, each in zip(weights, gradients, strict=True))
        apart = sum((weight * each).square().sum() for weight, each in zip(weights, gradients, strict=True))
        now = moves._replace(gradient=velocity, velocity=velocity, latest=gradients[-1], momentum=share)
        (step,) = rule.steps([now])
        coherence = min(max(1.0, float(velocity.norm() / apart.sqrt())), math.sqrt((1 + share) / (1 - share)))
        assert float(taken(step).square().mean().sqrt()) == pytest.approx(full * coherence, rel=1e-5)


def test_steps_are_longest_for_a_constant_gradient_and_not_shortened_for_an_alternating_one():
    lengths = {}
    for name, sign in {"constant": 1, "alternating": -1}.items():
        rule, moves, velocity = Spectral(), move((6, 3, 2)), 0
        for place in range(200):
            latest = sign**place * moves.latest
            velocity = 0.9 * velocity + latest
            (step,) = rule.steps([moves._replace(gradient=velocity, velocity=velocity, latest=latest, momentum=0.9)])
        lengths[name] = float(taken(step).square().mean().sqrt()) / (0.1 / math.sqrt(2))
    assert lengths["constant"] == pytest.approx(math.sqrt(19), rel=1e-3)
    assert lengths["alternating"] == pytest.approx(1)


def test_the_length_of_a_step_does_not_depend_on_the_units_of_the_loss():
    models = [mlp(), mlp()]
    for model, scale in zip(models, (1.0, 1e4), strict=True):
        optimizer = RNGD(model)
        for seed in range(12):
            optimizer.zero_grad()
            (scale * model(inputs(seed, 8, 6)).square().sum()).backward()
            optimizer.step()
    for one, other in zip(*(weights(model).values() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_gradient_of_zeros_makes_no_step_and_is_not_counted():
    rule, moves = Normalized(), move((6, 3, 2))
    (step,) = rule.steps([moves._replace(gradient=torch.zeros_like(moves.gradient))])
    assert not taken(step).any()
    (step,) = rule.steps([moves])
    assert float(taken(step).square().mean().sqrt()) == pytest.approx(0.2 * 0.1)


@given(size=sizes, scale=st.floats(1e3, 1e9))
def test_a_bounded_step_does_not_depend_on_the_losss_scale(size, scale):
    rule = TrustRegion(1e-6)
    (one,) = rule.steps([move(size, scale=1e3)])
    (other,) = rule.steps([move(size, scale=scale)])
    torch.testing.assert_close(taken(one), taken(other), rtol=1e-6, atol=1e-12)


def test_how_far_a_layer_moves_does_not_depend_on_others():
    rule, little, much = TrustRegion(1e-2), move((6, 3, 2), scale=1e-3), move((6, 3, 2), scale=1e3)
    assert [step.scale for step in rule.steps([little, much])] == [
        rule.steps([each])[0].scale for each in (little, much)
    ]
    assert rule.steps([little])[0].scale == little.lr


@given(size=sizes, seed=st.integers(0, 99))
def test_the_spectral_step_does_not_depend_on_the_root(size, seed):
    """Any orthogonal factor before the root cancels."""
    first = move(size)
    turn = torch.linalg.qr(inputs(seed, size[2], size[2]))[0]
    state = {**first.state, "root": turn @ first.state["root"]}
    (one,) = Spectral().steps([first])
    (other,) = Spectral().steps([first._replace(state=state)])
    torch.testing.assert_close(taken(one), taken(other))


@given(size=sizes)
def test_the_spectral_direction_moves_every_whitened_input_alike(size):
    """D R^-1 has singular values near 1: the response changes by as much as a whitened input is long, or less."""
    given_move = move(size)
    (step,) = Spectral().steps([given_move])
    direction = step.direction
    values = torch.linalg.svdvals(direction @ torch.linalg.inv(given_move.state["root"]))
    assert float(values.max()) < 1.3
    exact = torch.linalg.svdvals(given_move.gradient @ given_move.state["root"].mT)
    large = int((exact > 0.05 * exact.norm()).sum())
    assert float(values[..., :large].min()) > 0.5


@given(size=sizes, seed=st.integers(0, 99))
def test_the_spectral_direction_is_the_steepest_of_its_bound(size, seed):
    """No other D with ||D R^-1|| <= 1 has a larger <D, M>, for the exact polar factor, which the iteration nears."""
    given_move = move(size)
    root, gradient = given_move.state["root"], given_move.gradient
    u, s, v = torch.linalg.svd(gradient @ root.mT, full_matrices=False)
    steepest = torch.sum((u @ v) @ root * gradient)
    torch.testing.assert_close(steepest, s.sum())
    other = inputs(seed, *gradient.shape[1:])
    other = other / torch.linalg.matrix_norm(other, 2)
    assert float(torch.sum(other @ root * gradient)) <= float(steepest) * (1 + 1e-9)
    near = Spectral(iterations=5).steps([given_move])[0].direction
    assert float(torch.sum(near * gradient)) > 0.6 * float(steepest)


@given(rows=st.integers(1, 12), columns=st.integers(1, 12), iterations=st.integers(1, 6))
def test_polar_factors_are_the_quintic_of_the_singular_values(rows, columns, iterations):
    matrix = inputs(rows + 13 * columns, rows, columns)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(iterations):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(polar_factor(matrix, iterations), left * values @ right)


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), groups=st.sampled_from([(), (2,)]))
def test_polar_factors_share_the_singular_vectors(rows, columns, groups):
    generator = torch.Generator().manual_seed(rows + 7 * columns)
    matrix = torch.randn(*groups, rows, columns, generator=generator, dtype=torch.float64)
    factor = polar_factor(matrix)
    product = factor @ matrix.mT
    torch.testing.assert_close(product, product.mT)
    assert float(torch.linalg.eigvalsh(product).min()) > -1e-9
    assert not polar_factor(torch.zeros_like(matrix)).any()


@pytest.mark.parametrize("size", [1e-15, 1e-19, 1e-22, 1e-30, 1e-40])
def test_polar_factors_of_tiny_matrices_are_finite(size):
    factor = polar_factor(size * torch.ones(50, 60))
    assert torch.isfinite(factor).all()
    assert float(factor.norm()) < 1.3


@given(m=st.integers(1, 9), longer=st.integers(0, 40), iterations=st.integers(1, 6))
def test_operations_of_polar_factors_are_those_of_their_products(m, longer, iterations):
    matrix = inputs(m, m, m + longer)
    with FlopCounterMode(display=False) as counted:
        polar_factor(matrix, iterations)
    assert counted.get_total_flops() == min(polar_operations(m, m + longer, iterations))


@pytest.mark.parametrize("shape", [(130, 131), (400, 129), (2, 140, 300), (130, 700)])
def test_wide_polar_factors_in_single_precision_are_those_in_double_precision_up_to_a_few_per_cent(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, near = polar_factor(matrix), polar_factor(matrix.float())
    assert near.dtype == torch.float32
    assert float((near - exact).norm()) < 0.03 * float(exact.norm())


@pytest.mark.parametrize("rule", [TrustRegion(), Normalized(), Spectral()])
def test_a_direction_that_is_not_finite_is_no_step(rule):
    bad = move((5, 3, 2), root=rule.needs_root)
    assert bool(rule.steps([bad])[0].is_finite)
    assert not bool(rule.steps([bad._replace(gradient=bad.gradient * float("nan"))])[0].is_finite)
    assert rule.steps([]) == []


@pytest.mark.parametrize("rule", ["normalized", "spectral"])
@pytest.mark.parametrize("structure", ["shared", "neuron", "diagonal"])
def test_learns(rule, structure):
    model = normed_mlp()
    losses = train(model, RNGD(model, lr=0.05, step_rule=rule, metric=MetricOptions(structure=structure)), 80)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_rules_bring_their_own_defaults():
    model = nn.Sequential(nn.Linear(3, 2))
    keys = ("lr", "momentum", "averaging", "weight_decay", "damping")
    options = [
        [RNGD(model, step_rule=rule).param_groups[0][key] for key in keys]
        for rule in ("trust-region", "normalized", "spectral")
    ]
    assert options == [[0.3, 0.0, 0.0, 0.0, 0.1], *[[0.01, 0.9, 0.1, 0.1, 0.1]] * 2]
    assert RNGD(model, 0.5, step_rule=Spectral(), averaging=0.0).param_groups[0]["averaging"] == 0.0


@pytest.mark.parametrize(
    ("fit", "expected"), [("generalize", (0.1, 0.1)), ("plain", (0.0, 0.1)), ("interpolate", (0.0, 1e-4))]
)
def test_a_fit_sets_decay_and_damping_unless_they_are_given(fit, expected):
    (group,) = RNGD(nn.Linear(3, 2), fit=fit).param_groups
    assert (group["weight_decay"], group["damping"]) == expected
    (group,) = RNGD(nn.Linear(3, 2), fit=fit, weight_decay=0.3, damping=0.2).param_groups
    assert (group["weight_decay"], group["damping"]) == (0.3, 0.2)
    with pytest.raises(ValueError, match="fit must be one of generalize, plain, interpolate, got 'all'"):
        RNGD(nn.Linear(3, 2), fit="all")


def test_heads_of_a_softmax_take_longer_steps_and_have_no_decay_of_the_fits():
    """A layer with units of its own size, then the logits; the decay that is given is for all."""
    lengths = {}
    for options in ({}, {"weight_decay": 0.1}, {"step_rule": Spectral(head=1.0)}, {"step_rule": "normalized"}):
        model = mlp(sizes=(6, 5, 3), bias=False)
        optimizer = RNGD(model, lr=0.1, averaging=0.0, **options)
        before = weights(model)
        train(model, optimizer, 1)
        shrunk = 1 - 0.1 * 0.1 * (options == {"weight_decay": 0.1})
        hidden = model[0].weight - (1 - 0.1 * 0.1) * before["0.weight"]
        head = model[2].weight - shrunk * before["2.weight"]
        lengths[str(options)] = [float(each.detach().square().mean().sqrt()) for each in (hidden, head)]
        assert optimizer.param_groups[0]["decays_heads"] == ("weight_decay" in options)
    default, decayed, alike, normalized = lengths.values()
    assert default == pytest.approx([0.1 / math.sqrt(6), 0.3 / math.sqrt(5)])
    assert decayed == pytest.approx(default)
    assert alike == pytest.approx([0.1 / math.sqrt(6), 0.1 / math.sqrt(5)])
    assert normalized == pytest.approx([0.02, 0.02])


def test_a_group_with_a_decay_of_its_own_decays_its_heads():
    model = mlp(sizes=(6, 5, 3))
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.1}]
    assert [group["decays_heads"] for group in RNGD(model, params=groups).param_groups] == [False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"step_rule": "newton"},
            "step_rule must be one of spectral, normalized, trust-region, .*, got 'newton'",
        ),
        ({"step_rule": ""}, "step_rule must be one of spectral, .*, got ''"),
    ],
)
def test_wrong_rules_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        RNGD(nn.Linear(3, 2), **options)


def test_lengths_must_be_positive():
    with pytest.raises(ValueError, match="relative_rms must lie in"):
        Normalized(relative_rms=-1.0)
    with pytest.raises(ValueError, match="head must lie in"):
        Spectral(head=0.0)
