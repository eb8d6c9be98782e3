"""The average of iterates against the three sequences of Defazio et al. (2024), each kept as it stands there."""

import pytest
import torch
from builders import mlp, train
from hypothesis import given
from hypothesis import strategies as st

from relfisher import RNGD
from relfisher.optim.averaging import Averaging


@given(
    share=st.floats(0, 0.99),
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=20),
    seed=st.integers(0, 1000),
)
def test_weights_are_between_the_iterate_and_the_average(share, weights, seed):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    z, x, lead, total = y.clone(), y.clone(), torch.zeros_like(y), 0.0
    for weight in weights:
        direction = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        y = y + Averaging(share, total, weight).change(direction, 0.3, lead)
        total += weight
        z = z - 0.3 * direction
        x = x + weight / total * (z - x)
        torch.testing.assert_close(y, (1 - share) * z + share * x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(lead, total * (z - x), rtol=1e-9, atol=1e-9)


def test_iterates_of_a_growing_rate_weigh_more():
    model = mlp(sizes=(6, 5, 3))
    optimizer = RNGD(model, lr=1e-2)
    for iteration in range(3):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 + iteration)
        train(model, optimizer, 1, first=iteration)
    assert optimizer.param_groups[0]["averaged"] == pytest.approx(sum((1e-2 * k * k / 500) ** 2 for k in (1, 2, 3)))


def test_averaged_weights_are_steadier_than_the_iterates():
    distances = {}
    for averaging in (0.0, 0.9):
        model = mlp(sizes=(6, 5, 3))
        optimizer = RNGD(model, lr=0.1, averaging=averaging)
        train(model, optimizer, 100)
        before = model[0].weight.detach().clone()
        train(model, optimizer, 1, first=100)
        distances[averaging] = float((model[0].weight.detach() - before).norm())
    assert distances[0.9] < 0.3 * distances[0.0]


def test_a_layer_that_joins_later_starts_where_it_is():
    model = mlp(sizes=(6, 5, 3))
    optimizer = RNGD(model, params=list(model[0].parameters()))
    train(model, optimizer, 5)
    before = model[2].weight.detach().clone()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    train(model, optimizer, 1, first=100)
    assert 0 < float((model[2].weight.detach() - before).norm()) < 0.1
