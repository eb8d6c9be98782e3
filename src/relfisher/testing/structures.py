"""The check of a structure."""

from __future__ import annotations

import torch

from relfisher.responses import TanhBernoulli, UnitResponse
from relfisher.structures import Inversion, Samples, State, Structure
from relfisher.testing.comparison import same
from relfisher.testing.metrics import check_metric

__all__ = ["check_structure"]


def check_structure(
    structure: Structure, response: UnitResponse | None = None, out: int = 3, d: int = 5, rtol: float = 1e-8
) -> None:
    """Check that a structure fulfills its interface: statistics -> average -> invert -> apply.

    Its state must have the declared tensors. Statistics must add up over samples. The average of one batch must be the
    metric of that batch, whose operator must pass `check_metric`. A batch that is not finite must be left out. Factors
    must be symmetric and positive; if there is a single tensor, its factor must invert the damped operator, and roots
    must agree with it. A metric that cannot be inverted must leave the last factors in use.

    Args:
        structure: the structure to check.
        response: the response of the units; None for tanh units.
        out: the number of units.
        d: the number of augmented inputs.
        rtol: the relative tolerance.

    Raises:
        AssertionError: if a check fails; the message says which one, and by how much.
    """
    said = TanhBernoulli() if response is None else response
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * d, d, dtype=torch.float64, generator=generator)
    z = torch.randn(4 * d, out, dtype=torch.float64, generator=generator)
    samples = Samples(x, z, said)
    whole = structure.batch_statistics(samples)
    if whole.totals.keys() != set(structure.tensors):
        raise AssertionError(f"statistics must be of {structure.tensors}, got {tuple(whole.totals)}")
    parts = [structure.batch_statistics(Samples(x[rows], z[rows], said)) for rows in (slice(d), slice(d, None))]
    halves = parts[0] + parts[1]
    for name in structure.tensors:
        same(f"{name}: statistics of two parts", halves.totals[name], whole.totals[name], rtol)
    states = {root: _fresh(structure, (out, d), root=root) for root in (False, True)}
    for state in states.values():
        _check_average(structure, state, samples, rtol)
    check_metric(structure.operator(states[False], (out, d)), rtol=rtol)
    _check_factors(structure, states, (out, d), rtol)
    _check_failure(structure, states[False], (out, d), rtol)


def _fresh(structure: Structure, shape: tuple[int, ...], *, root: bool) -> State:
    state = structure.create(shape, torch.float64, torch.device("cpu"), identity=False, root=root)
    declared = {key: kept.shape for key, kept in structure.declares(shape, root=root).items()}
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != declared:
        raise AssertionError(f"the state must have the declared shapes {declared}, got {found}")
    probe = torch.ones(shape, dtype=torch.float64)
    same("a factor before the first refresh", structure.precondition(state, probe), probe, 1e-12)
    return state


def _check_average(structure: Structure, state: State, samples: Samples, rtol: float) -> None:
    bad = samples.x.clone()
    bad[0, 0] = torch.nan
    if structure.ema_update_from(state, samples._replace(x=bad), 0.9):
        raise AssertionError("a batch with NaN must not be added to the average")
    if not structure.ema_update_from(state, samples, 0.9):
        raise AssertionError("a finite batch must be added to the average")
    statistics, n = structure.batch_statistics(samples), len(samples.x)
    for name, value in structure.average(state).items():
        same(f"{name}: the average of one batch", value, statistics.totals[name] / n, rtol)
    structure.ema_update(state, statistics, 0.9)
    for name, value in structure.average(state).items():
        same(f"{name}: the average of a batch and its statistics", value, statistics.totals[name] / n, rtol)


def _check_factors(structure: Structure, states: dict[bool, State], shape: tuple[int, int], rtol: float) -> None:
    inversion = Inversion(0.5, relative_to="absolute")
    size = shape[0] * shape[1]
    eye = torch.eye(size, dtype=torch.float64).reshape(size, *shape)
    inverses = {}
    for root, state in states.items():
        if not structure.refresh(state, inversion):
            raise AssertionError("the factors of a damped metric must be good")
        inverses[root] = torch.stack([structure.precondition(state, unit).reshape(-1) for unit in eye], dim=1)
    same("the factor's transpose", inverses[False].T, inverses[False], rtol)
    same("the root's square", inverses[True], inverses[False], rtol)
    if float(torch.linalg.eigvalsh(inverses[False])[0]) <= 0:
        raise AssertionError("the factors must be positive definite")
    if len(structure.tensors) == 1 and structure.rank is None:
        damped = structure.operator(states[False], shape).to_dense() + 0.5 * torch.eye(size, dtype=torch.float64)
        same("the factor times the damped metric", inverses[False] @ damped, torch.eye(size, dtype=torch.float64), rtol)


def _check_failure(structure: Structure, state: State, shape: tuple[int, int], rtol: float) -> None:
    probe = torch.linspace(-1, 2, shape[0] * shape[1], dtype=torch.float64).reshape(shape)
    before = structure.precondition(state, probe)
    for name in structure.tensors:
        state[name].neg_()
    if structure.refresh(state, Inversion(0.0)):
        raise AssertionError("a metric that is not positive must be reported")
    same("the factor after a failed refresh", structure.precondition(state, probe), before, rtol)
