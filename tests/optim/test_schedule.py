"""When layers are refreshed: each once an interval, and not all in the same step."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from relfisher.optim.schedule import Schedule


@given(interval=st.integers(1, 50), layers=st.integers(1, 60), stats=st.integers(1, 10))
def test_each_layer_is_refreshed_once_an_interval(interval, layers, stats):
    schedule = Schedule(stats, interval, ())
    for place in range(layers):
        due = [iteration for iteration in range(4 * interval) if schedule.refresh_due(iteration, place, layers)]
        assert len(due) == 4
        assert all(after - before == interval for before, after in itertools.pairwise(due))


@given(interval=st.integers(1, 50), layers=st.integers(1, 50))
def test_refreshes_are_spread_over_the_interval(interval, layers):
    schedule = Schedule(1, interval, ())
    counts = [sum(schedule.refresh_due(each, place, layers) for place in range(layers)) for each in range(interval)]
    assert max(counts) <= -(-layers // interval)


@given(interval=st.integers(1, 50), layers=st.integers(1, 50))
def test_updates_are_spread_over_the_interval(interval, layers):
    schedule = Schedule(interval, 100, ())
    counts = [sum(schedule.statistics_due(each, place, layers) for place in range(layers)) for each in range(interval)]
    assert sum(counts) == layers
    assert max(counts) <= -(-layers // interval)


def test_no_step_of_a_small_model_has_both_an_update_and_a_refresh():
    schedule = Schedule(20, 200, ())
    for iteration in range(200):
        updates = sum(schedule.statistics_due(iteration, place, 4) for place in range(4))
        assert updates + sum(schedule.refresh_due(iteration, place, 4) for place in range(4)) <= 1


def test_warmup_refreshes_are_of_all_layers():
    schedule = Schedule(20, 200, (0, 5))
    assert all(schedule.refresh_due(iteration, place, 7) for iteration in (0, 5) for place in range(7))
    assert [schedule.statistics_due(iteration) for iteration in (0, 5, 19, 20, 21)] == [True, True, False, True, False]


def test_without_staggering_all_layers_are_refreshed_together():
    schedule = Schedule(1, 100, (), staggered=False)
    assert all(schedule.refresh_due(iteration, place, 4) for iteration in (0, 100, 200) for place in range(4))
    assert not any(schedule.refresh_due(50, place, 4) for place in range(4))
    every_third = Schedule(3, 100, (), staggered=False)
    assert [every_third.statistics_due(iteration, 1, 2) for iteration in range(4)] == [True, False, False, True]


@pytest.mark.parametrize("name", ["stats_interval", "refresh_interval"])
def test_intervals_are_whole_numbers(name):
    options = {"stats_interval": 1, "refresh_interval": 1, "warmup_refreshes": (), name: 0}
    with pytest.raises(ValueError, match=f"{name} must be a whole number >= 1, got 0"):
        Schedule(**options)
