"""Every response against its own density, written out by hand: information, slope, moments, limits, errors."""

import math

import mpmath
import pytest
import reference
import torch
from cases import BERNOULLI, GAUSSIAN, JOINT, RESPONSES, UNITS, assert_close
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from relfisher import responses


def named(cases: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("response", "density"), cases.values(), ids=cases)


def alone(cases: dict) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("response", [response for response, _ in cases.values()], ids=cases)


# Away from the kinks of ReLU and ELU, where the Hessian has no value.
pre_activations = st.lists(
    st.floats(-6, 6).filter(lambda z: abs(z) > 1e-3), min_size=1, max_size=3
).map(lambda z: torch.tensor(z, dtype=torch.float64))  # fmt: skip


@named(RESPONSES)
@given(z=pre_activations)
def test_information_is_both_expectations(response, density: reference.Density, z: Tensor) -> None:
    outer, curvature = reference.information(density, z)
    found = response.operator(z.unsqueeze(0)).dense()[0]
    assert_close(found, outer)
    assert_close(found, curvature, 1e-7)
    stated = response.information(z.unsqueeze(0))[0]
    assert_close(stated if isinstance(response, responses.Categorical) else torch.diag(stated), outer)


@named(UNITS)
@given(z=pre_activations)
def test_slope_is_the_derivative_of_the_activation(response, density: reference.Density, z: Tensor) -> None:
    assert_close(response.activation(z), density.mean(z))
    assert_close(response.slope(z), reference.slope(density.mean, z))
    assert_close(response.slope(z), reference.slope(response.activation, z))


@named(RESPONSES)
@given(z=pre_activations)
def test_log_prob_is_the_density(response, density: reference.Density, z: Tensor) -> None:
    for y, _ in zip(*density.support(z), strict=True):
        assert_close(response.log_prob(z.unsqueeze(0), y.unsqueeze(0)).sum(), density.log(z, y))


@named(RESPONSES)
@given(z=pre_activations, seed=st.integers(0, 1000))
def test_divergence_is_the_expected_log_ratio_and_curves_as_the_information(response, density, z, seed: int) -> None:
    other = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    divergence = lambda point: response.divergence(z.unsqueeze(0), point.unsqueeze(0)).sum()  # noqa: E731
    ratios = [density.log(z, y) - density.log(other, y) for y in density.support(z)[0]]
    assert_close(divergence(other), density.support(z)[1] @ torch.stack(ratios))
    assert_close(divergence(z), torch.zeros((), dtype=torch.float64))
    assert_close(reference.jacobian(divergence, z), torch.zeros_like(z))
    assert_close(torch.func.hessian(divergence)(z), reference.information(density, z)[0])


@alone(RESPONSES)
def test_divergence_has_the_shape_of_log_prob(response) -> None:
    z = torch.linspace(-1, 1, 24).reshape(4, 2, 3)
    found = response.divergence(z, z.square() + 1)
    assert found.shape == response.log_prob(z, response.sample(z)).shape
    assert (found[0] > 0).all()


@pytest.mark.parametrize("kind", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("step", [200.0, 3.0, 0.1, 1e-3, 1e-6])
@pytest.mark.parametrize("z", [0.3, 8.0, 20.0, 60.0])
def test_divergences_of_small_steps_and_of_saturated_units_have_their_digits(z: float, step: float, kind: torch.dtype):
    for response, gain in ((responses.SigmoidBernoulli(), 1), (responses.TanhBernoulli(), 2), (None, 1)):
        for sign in (1, -1):
            at = torch.tensor([z, 0.0, -1.0], dtype=kind)
            to = at + torch.tensor([sign * step, 0.0, 0.0], dtype=kind)
            if response is None:
                found, logits = responses.Categorical().divergence(at, to), (at, to)
            else:
                at, to = at[:1], to[:1]
                found = response.divergence(at, to)[0]
                logits = [torch.cat([gain * each, torch.zeros_like(each)]) for each in (at, to)]
            wanted = exact_divergence(*logits)
            assert float(found) == pytest.approx(wanted, rel=1e-5 if kind == torch.float32 else 1e-12, abs=1e-37)


def exact_divergence(*logits: Tensor) -> float:
    with mpmath.workdps(80):
        logs = [[mpmath.mpf(float(each)) for each in z] for z in logits]
        totals = [mpmath.log(mpmath.fsum(mpmath.exp(each) for each in z)) for z in logs]
        log_p, log_q = ([each - total for each in z] for z, total in zip(logs, totals, strict=True))
        return float(mpmath.fsum(mpmath.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))


def test_divergence_of_classes_that_are_ruled_out() -> None:
    z, other = torch.tensor([[0.0, 1.0, -math.inf]]), torch.tensor([[1.0, 0.0, -math.inf]])
    categorical = responses.Categorical()
    torch.testing.assert_close(categorical.divergence(z, other), categorical.divergence(z[:, :2], other[:, :2]))
    assert categorical.divergence(torch.zeros(1, 3), z).isinf()


@alone(BERNOULLI | JOINT)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@given(saturated=st.floats(-40, 40), y=st.sampled_from([0, 1]))
def test_curvature_of_the_density_is_the_information_of_saturated_units(response, kind, saturated: float, y: int):
    """These families have the same Hessian for all outcomes."""
    z = torch.tensor([saturated, 0.0, -0.5], dtype=kind)
    shape = () if response in [each for each, _ in JOINT.values()] else (3,)
    found = -torch.func.hessian(lambda at: response.log_prob(at, torch.full(shape, y)).sum())(z)
    wanted = response.operator(z.unsqueeze(0)).dense()[0]
    torch.testing.assert_close(found, wanted, rtol=1e2 * torch.finfo(kind).eps, atol=0)


@alone(BERNOULLI | JOINT)
@given(z=pre_activations)
def test_probabilities_of_the_outcomes_sum_to_one(response, z: Tensor) -> None:
    total = torch.zeros(())
    for value in response.outcomes(z.numel()):
        shape = () if isinstance(response, responses.Categorical) else z.shape
        total = total + response.log_prob(z, torch.full(shape, value)).exp()
    assert_close(total, torch.ones_like(total), 1e-12)


@alone(GAUSSIAN)
def test_density_integrates_to_one(response) -> None:
    z = torch.tensor([-1.3, 0.4], dtype=torch.float64)
    y = torch.linspace(-30, 30, 20001, dtype=torch.float64).unsqueeze(1)
    mass = torch.trapezoid(response.log_prob(z.expand(len(y), 2), y.expand(-1, 2)).exp(), y, dim=0)
    assert response.outcomes(2) is None
    assert_close(mass, torch.ones(2, dtype=torch.float64))


@named(UNITS)
def test_samples_have_the_mean_and_variance_of_the_density(response, density: reference.Density) -> None:
    z = torch.tensor([-1.2, 0.3, 1.5], dtype=torch.float64)
    draws = 20_000
    y = response.sample(z.expand(draws, 3), torch.Generator().manual_seed(0))
    nodes, weights = density.support(z)
    mean = weights @ nodes
    variance = weights @ (nodes - mean).square()
    assert y.shape == (draws, 3)
    assert ((y.mean(0) - mean).abs() < 4.5 * (variance / draws).sqrt()).all()
    torch.testing.assert_close(y.var(0), variance, rtol=0.06, atol=0)


@pytest.mark.parametrize("shape", [(4,), (20_000, 4), (20_000, 1, 4)], ids=str)
def test_categorical_samples_follow_the_softmax(shape: tuple[int, ...]) -> None:
    z = torch.tensor([0.1, -2.0, 1.0, 0.5]).expand(shape)
    y = responses.Categorical().sample(z, torch.Generator().manual_seed(0))
    assert y.shape == shape[:-1]
    if y.ndim:
        share = torch.bincount(y.flatten(), minlength=4) / y.numel()
        torch.testing.assert_close(share, torch.softmax(z.reshape(-1, 4)[0], -1), rtol=0, atol=0.015)


@alone(RESPONSES)
def test_a_generator_decides_the_samples_and_spares_the_global_state(response) -> None:
    z = torch.linspace(-1, 1, 60).reshape(20, 3)
    before = torch.get_rng_state()
    first, again, other = (response.sample(z, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


@alone(UNITS)
@given(magnitude=st.floats(20, 1e4), sign=st.sampled_from([-1, 1]))
def test_single_precision_is_finite_far_out(response, magnitude: float, sign: int) -> None:
    z = torch.tensor([sign * magnitude])
    nu, slope, value = response.information(z), response.slope(z), response.activation(z)
    assert nu.dtype == torch.float32
    for result in (nu, slope, value, response.log_prob(z, value)):
        assert torch.isfinite(result).all()
    assert (nu >= 0).all()


LIMITS = {
    "tanh": (responses.TanhBernoulli(), 0.0, 0.0),
    "sigmoid": (responses.SigmoidBernoulli(), 0.0, 0.0),
    "relu": (responses.ReLUGaussian(sigma=0.5), 0.0, 4.0),
    "prelu": (responses.ReLUGaussian(iota=0.5, sigma=2.0), 0.0625, 0.25),
    "smooth relu": (responses.SmoothReLUGaussian(omega=1e-3, iota=0.5, sigma=2.0), 0.0625, 0.25),
    "elu": (responses.ELUGaussian(alpha=3.0, sigma=0.5), 0.0, 4.0),
    "linear": (responses.LinearGaussian(sigma=4.0), 0.0625, 0.0625),
}


@pytest.mark.parametrize(("response", "below", "above"), LIMITS.values(), ids=LIMITS)
def test_information_has_the_right_limits(response, below: float, above: float) -> None:
    nu = response.information(torch.tensor([-1e4, 1e4]))
    torch.testing.assert_close(nu, torch.tensor([below, above]))


@given(z=st.floats(-1e4, 1e4))
def test_smooth_relu_does_not_overflow_and_stays_above_the_hard_one(z: float) -> None:
    point = torch.tensor([z])
    smooth = responses.SmoothReLUGaussian(omega=0.1, iota=0.25).activation(point)
    hard = functional.leaky_relu(point, 0.25)
    assert (smooth - hard >= -1e-6 * abs(z)).all()
    assert (smooth - hard <= 0.1 * math.log(2) + 1e-6 * abs(z)).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@given(exponent=st.floats(-320, -20), iota=st.floats(0, 0.9))
def test_a_smooth_relu_of_any_width_is_the_hard_one_away_from_zero(kind, exponent: float, iota: float) -> None:
    z = torch.tensor([-5.0, -1e-3, 1e-3, 5.0, 1e30], dtype=kind)
    smooth = responses.SmoothReLUGaussian(10**exponent, iota)
    torch.testing.assert_close(smooth.activation(z), functional.leaky_relu(z, iota))
    torch.testing.assert_close(smooth.information(z), torch.where(z > 0, 1.0, iota).to(kind).square())
    assert float(smooth.slope(torch.zeros((), dtype=kind))) == pytest.approx((1 + iota) / 2)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_softmax_is_stable_in_single_precision(scale: float) -> None:
    z = scale * torch.tensor([[1.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
    information = responses.Categorical().operator(z)
    assert torch.isfinite(information.dense()).all()
    assert (information.diagonal() >= 0).all()
    torch.testing.assert_close(information.apply(torch.ones(2, 3)), torch.zeros(2, 3), rtol=0, atol=1e-7)


def test_at_zero_relu_has_the_slope_of_torch() -> None:
    point = torch.zeros(1, requires_grad=True)
    (slope,) = torch.autograd.grad(functional.leaky_relu(point, 0.25), point)
    assert torch.equal(responses.ReLUGaussian(iota=0.25).slope(torch.zeros(1)), slope)


def test_an_in_place_activation_is_differentiated_like_any_other() -> None:
    z = torch.tensor([0.3, -0.2, 2.0])
    response = responses.ActivationGaussian(functional.hardtanh_)
    torch.testing.assert_close(response.information(z), torch.tensor([1.0, 1.0, 0.0]))
    torch.testing.assert_close(response.activation(z), torch.tensor([0.3, -0.2, 1.0]))
    assert torch.equal(z, torch.tensor([0.3, -0.2, 2.0]))


INVALID = {
    "sigma": [
        (responses.LinearGaussian, "sigma"),
        (responses.ReLUGaussian, "sigma"),
        (responses.SmoothReLUGaussian, "sigma"),
        (responses.ELUGaussian, "sigma"),
    ],
    "positive": [(responses.SmoothReLUGaussian, "omega"), (responses.ELUGaussian, "alpha")],
}


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
@pytest.mark.parametrize(("response", "name"), [case for cases in INVALID.values() for case in cases])
def test_scales_must_be_positive(response, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a finite number > 0, got {value}"):
        response(**{name: value})


def test_the_noise_of_any_activation_must_be_positive() -> None:
    with pytest.raises(ValueError, match="sigma must be a finite number > 0"):
        responses.ActivationGaussian(torch.sin, sigma=0.0)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
@pytest.mark.parametrize("response", [responses.ReLUGaussian, responses.SmoothReLUGaussian])
def test_iota_must_lie_below_one(response, value: float) -> None:
    with pytest.raises(ValueError, match=r"iota must lie in \[0, 1\), got"):
        response(iota=value)
