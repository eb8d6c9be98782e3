"""Momentum and average in bfloat16: rounded by chance, without bias, in the same way whenever a run is repeated."""

import copy
import math

import pytest
import torch
from builders import taken
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from relfisher import RNGD, plan
from relfisher.optim.rounding import LOW, Rounding

DRAWS = 4000
SMALLEST = 2.0**-126  # normal number


def neighbours(value):
    """Return the numbers of bfloat16 at or below and at or above a number, by their bits alone."""
    bits = torch.tensor(value).view(torch.int32)
    towards_zero = bits & -0x10000
    ends = [each.view(torch.float32).item() for each in (towards_zero, towards_zero + 0x10000)]
    return (ends[0], ends[0]) if ends[0] == value else tuple(sorted(ends))


@given(st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda each: abs(each) >= SMALLEST), st.integers(0, 1000))
def test_a_number_becomes_a_neighbour_and_on_average_itself(value, seed):
    found = Rounding(seed).rounded(torch.full((DRAWS,), value), LOW).double()
    low, high = neighbours(value)
    assert set(found.tolist()) <= {low, high}
    assert (found - value).abs().max() < 2**-7 * abs(value)
    share = (value - low) / (high - low) if high > low else 0.0
    deviation = (high - low) * math.sqrt(share * (1 - share))
    assert deviation <= 2**-8 * abs(value)
    assert abs(found.mean() - value) <= 6 * deviation / math.sqrt(DRAWS)


def test_numbers_of_its_own_stay_and_so_does_what_is_not_finite():
    own = [0.0, 1.0, -1.5, 2.0**-133, 3.3895313892515355e38, math.inf, -math.inf]
    found = Rounding(0).rounded(torch.tensor(own), LOW)
    assert found.dtype == LOW
    assert found.tolist() == own
    assert Rounding(0).rounded(torch.tensor([math.nan]), LOW).isnan().all()
    for kept in (torch.randn(3), torch.randn(3).double(), torch.ones(3, dtype=torch.complex64)):
        assert Rounding(0).rounded(kept, kept.dtype) is kept
    low = torch.randn(3).to(LOW)
    assert Rounding(0).rounded(low, LOW) is low


def test_errors_of_different_numbers_and_draws_are_independent():
    values = torch.full((9, 999), 1 + 2**-8, dtype=torch.float64)
    rounding = Rounding(3)
    first, second = (rounding.rounded(values, LOW).double() - values for _ in range(2))
    other = Rounding(4).rounded(values, LOW).double() - values
    assert torch.equal(Rounding(3).rounded(values, LOW).double() - values, first)
    for one, two in ((first, second), (first, other), (first[:, 1:], first[:, :-1]), (first[:, 4:], first[:, :-4])):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]) < 0.05


def test_what_is_many_is_rounded_in_parts_without_bias():
    values = torch.full((1 << 22 | 5,), 1 + 2**-9)
    found = Rounding(0).rounded(values, LOW).float() - values
    assert abs(found.mean()) < 6 * 2**-9 * math.sqrt(3) / math.sqrt(len(values))
    assert not torch.equal(found[:5], found[-5:])


def network(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4)
    return nn.Sequential(*nn.Sequential(*layers).to(dtype), Phases())


class Phases(nn.Module):
    """Parameters that AdamW trains, of which one is complex."""

    def __init__(self):
        super().__init__()
        self.scale, self.phase = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x):
        return x * self.scale * self.phase.abs()


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 2, 6, generator=generator).to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        functional.cross_entropy(model(x), torch.randint(4, (12,), generator=generator)).backward()
        optimizer.step()


def distance(one, other):
    with torch.no_grad():
        pairs = list(zip(one.parameters(), other.parameters(), strict=True))
        return float(sum((a - b).abs().square().sum() for a, b in pairs).sqrt())


@pytest.mark.filterwarnings("ignore")
def test_a_rounded_average_is_that_of_the_same_iterates():
    """Without momentum nothing else is rounded; the errors of the average are a few hundredths of its lead."""
    model, exact = network(), network()
    optimizer = RNGD(model, momentum=0.0, state_dtype=LOW)
    other = RNGD(exact, momentum=0.0)
    train(model, optimizer, range(40))
    train(exact, other, range(40))
    averages = distance(model, exact)
    for own in (optimizer, other):
        own._averaging.to_iterate()
    assert distance(model, exact) < 1e-4
    lead = float(sum(other.state[p]["lead"].abs().square().sum() for p in exact.parameters()).sqrt())
    assert 1e-4 * lead < averages < 2**-5 * lead


def test_heads_do_not_drift_where_no_softmax_sees_it():
    """What is common to all classes has no gradient: rounding errors there would be steps of full length."""
    common = {}
    for dtype in (None, LOW):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 6))
        optimizer = RNGD(model, state_dtype=dtype, weight_decay=0.0)
        before = model[2].weight.detach().mean(0)
        for seed in range(150):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            functional.cross_entropy(model(x), x[:, :6].argmax(1)).backward()
            optimizer.step()
        common[dtype] = float((model[2].weight.detach().mean(0) - before).norm())
    assert common[None] < 1e-3
    assert common[LOW] < 1e-3


@pytest.mark.filterwarnings("ignore")
def test_the_state_is_in_bfloat16_where_numbers_are_real():
    model = network()
    optimizer = RNGD(model, state_dtype=LOW)
    train(model, optimizer, range(3))
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        assert state["lead"].dtype == (LOW if name != "7.phase" else torch.complex64)
        assert ("momentum" not in state) or state["momentum"].dtype == LOW
        assert all(value.dtype != LOW for key, value in state.items() if key not in ("lead", "momentum"))
    x = torch.randn(12, 2, 6)
    for options in ({}, {"state_bytes": "1.5x adam"}, {"momentum": 0.0}, {"averaging": 0.0}):
        model = network()
        planned = plan(model, x, state_dtype=LOW, **options)
        optimizer = RNGD(model, state_dtype=LOW, **options)
        model(x).square().mean().backward()
        optimizer.step()
        assert taken(optimizer) == planned.bytes
    half, whole = (plan(network(), x, state_dtype=each) for each in (LOW, None))
    assert half.momentum_bytes == whole.momentum_bytes / 2
    assert half.averaging_bytes == whole.averaging_bytes / 2 + 16  # of the complex numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", ["spectral", "normalized", "trust-region"])
@pytest.mark.filterwarnings("ignore")
def test_a_run_resumes_and_is_copied_bitwise(rule, dtype):
    model = network(dtype)
    options = {"step_rule": rule, "state_dtype": LOW, "momentum": 0.9, "averaging": 0.3}
    optimizer = RNGD(model, **options)
    train(model, optimizer, range(5))
    resumed = copy.deepcopy(model)
    loaded = RNGD(resumed, **options)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    copied, its = copy.deepcopy((model, optimizer))
    for net, own in ((model, optimizer), (resumed, loaded), (copied, its)):
        train(net, own, range(5, 12))
    assert distance(model, resumed) == 0
    assert distance(model, copied) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_state_of_the_other_precision_is_refused():
    model = network()
    low, high = RNGD(model, state_dtype=LOW), RNGD(copy.deepcopy(model))
    train(model, low, range(2))
    with pytest.raises(ValueError, match=r"the lead of '0.weight' is torch.bfloat16.*needs state_dtype=torch.bfloat16"):
        high.load_state_dict(low.state_dict())
    with pytest.raises(ValueError, match=r"is torch.float32, so that this optimizer needs state_dtype=None"):
        low.load_state_dict(high.state_dict())


@pytest.mark.parametrize("given_", [torch.float16, torch.float32, torch.int16])
def test_other_dtypes_are_refused(given_):
    with pytest.raises(ValueError, match=r"state_dtype must be torch.bfloat16, or None"):
        RNGD(nn.Linear(2, 2), state_dtype=given_)
    with pytest.raises(ValueError, match=r"state_dtype must be torch.bfloat16, or None"):
        plan(nn.Linear(2, 2), torch.ones(1, 2), state_dtype=given_)


@pytest.mark.filterwarnings("ignore")
def test_small_changes_add_up():
    """A lead that grows by a thousandth of itself a step would stand still if it were rounded to the nearest."""
    model = nn.Linear(40, 40, bias=False)
    optimizer = RNGD(model, state_dtype=LOW)
    lead = optimizer.state[model.weight]["lead"]
    lead.fill_(1.0)
    nearest, exact = lead.clone(), 1.0
    for step in range(200):
        lead.copy_(Rounding(step).rounded(lead.float() * 1.001, LOW))
        nearest = (nearest.float() * 1.001).to(LOW)
        exact *= 1.001
    assert bool((nearest == 1).all())
    assert float(lead.float().mean()) == pytest.approx(exact, rel=0.003)
