"""Limits to the samples of a layer: an even selection of all that it sees, in whatever pieces it comes."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from relfisher.layers import Rows, Sampling
from relfisher.layers.samples import Held, Reservoir


@given(n=st.integers(0, 3000), limit=st.integers(1, 300))
def test_a_limit_keeps_about_so_many(n, limit):
    (rows,) = Sampling(limit).rows(torch.arange(n).unsqueeze(1))
    if n <= limit:
        assert torch.equal(rows.flatten(), torch.arange(n))
    else:
        assert abs(len(rows) - limit) <= 3
        assert torch.equal(rows.unique(), rows.flatten())


@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6), limit=st.integers(1, 200))
def test_pieces_leave_the_sample_of_the_whole(sizes, limit):
    """Calls one after another, each thinned when it is made, and all thinned at the end."""
    numbers = torch.arange(sum(sizes), dtype=torch.float64).unsqueeze(1)
    reservoir, start = Reservoir(limit), 0
    for size in sizes:
        sampling = Sampling(limit, start=start)
        (x,) = sampling.rows(numbers[start : start + size])
        start += size
        reservoir.add(Held(Rows(x, x), start - size, size, min(1.0, limit / start)))
    (whole,) = Sampling(limit).rows(numbers)
    assert torch.equal(reservoir.rows().x, whole)


def test_calls_that_never_flow_back_leave_no_bias():
    """A call that was thinned next to them thins the others as much."""
    reservoir, ones = Reservoir(100), torch.ones(1000, 1)
    for start, count in ((0, 400), (1400, 400)):  # 1000 between them were lost
        sampling = Sampling(100, start=start)
        (x,) = sampling.rows(ones[:count] * start)
        reservoir.add(Held(Rows(x, x), start, count, min(1.0, 100 / (start + count))))
    kept = reservoir.rows().x
    assert abs(int((kept == 0).sum()) - int((kept > 0).sum())) <= 3
    assert reservoir.seen == 800


def test_many_calls_hold_few_rows():
    reservoir, held = Reservoir(20), []
    for call in range(100):
        (x,) = Sampling(20, start=20 * call).rows(torch.full((20, 2), float(call)))
        held.append(Held(Rows(x, x), 20 * call, 20, min(1.0, 20 / (20 * call + 20))))
        reservoir.add(held[-1])
        assert sum(each.rows.x.shape[0] for each in held) <= 60
    assert abs(reservoir.rows().x.shape[0] - 20) <= 3
