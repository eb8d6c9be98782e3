"""The check of a step rule."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from relfisher.optim import RNGD, HealthWarning, MetricOptions
from relfisher.optim.fallback import Fallback
from relfisher.optim.leads import Lead
from relfisher.optim.momentum import Momentum
from relfisher.optim.rules import StepRule
from relfisher.structures import KroneckerFactors
from relfisher.testing.comparison import same

__all__ = ["check_rule"]


def check_rule(make: Callable[[], StepRule], steps: int = 4, rtol: float = 1e-10) -> None:
    """Check that a step rule moves a small network, and that its state survives saving, loading and copying.

    Every state must have the tensors that the rule declares, under keys of its own. Each step must move all weights and
    keep them finite. A gradient that is not finite must leave the weights and the rule's state unchanged. A copied
    optimizer, and one into which the state is loaded, must continue with the same steps. If the rule declares
    `is_layerwise`, it must take the same steps for one layer at a time.

    Args:
        make: the rule's class, or a function that returns a new rule.
        steps: the number of steps before and after saving.
        rtol: the relative tolerance.

    Raises:
        AssertionError: if a check fails; the message says which one, and by how much.
    """
    shape = (3, 5)
    rule = make()
    taken = {"trainable", "is_head"} | KroneckerFactors().declares(shape, root=rule.needs_root).keys()
    taken |= Lead().declares(shape).keys() | Momentum().declares(shape).keys() | Fallback.declares(shape).keys()
    clash = sorted(rule.declares(shape).keys() & taken)
    if clash:
        raise AssertionError(f"the rule must declare keys of its own, but {', '.join(clash)} are others'")
    model = _model()
    optimizer = _optimizer(model, rule)
    _run(model, optimizer, 0, steps)
    if rule.is_layerwise:
        _check_alone(model, make(), steps, rtol)
    _check_state(optimizer, rule)
    _check_not_finite(model, optimizer, rule)
    pair: tuple[nn.Module, RNGD] = copy.deepcopy((model, optimizer))
    loaded = _model()
    loaded.load_state_dict(model.state_dict())
    resumed = _optimizer(loaded, make())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _run(model, optimizer, steps, steps)
    for label, (other, its) in {"copied": pair, "loaded": (loaded, resumed)}.items():
        _run(other, its, steps, steps)
        for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            same(f"{name} after {steps} steps of the {label} optimizer", theirs.detach(), mine.detach(), rtol)
        its.close()
    optimizer.close()


def _model() -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2)
    return model


def _optimizer(model: nn.Module, rule: StepRule) -> RNGD:
    return RNGD(model, step_rule=rule, momentum=0.5, metric=MetricOptions(stats_interval=1, refresh_interval=2))


def _run(model: nn.Module, optimizer: RNGD, first: int, count: int) -> None:
    for seed in range(first, first + count):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(12, 4, dtype=torch.float64, generator=generator)
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), torch.arange(12) % 2)
        torch.autograd.backward(loss)
        optimizer.step()
        for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
            if not bool(torch.isfinite(parameter).all()) or torch.equal(parameter, old):
                raise AssertionError(f"a step must move {name} and keep it finite, got {parameter.detach()}")


def _check_alone(model: nn.Module, rule: StepRule, count: int, rtol: float) -> None:
    steps, alone = rule.steps, _model()
    rule.steps = lambda moves: [step for move in moves for step in steps([move])]  # type: ignore[method-assign]
    with _optimizer(alone, rule) as optimizer:
        _run(alone, optimizer, 0, count)
    for (name, mine), theirs in zip(alone.named_parameters(), model.parameters(), strict=True):
        same(f"{name} after steps of one layer at a time", mine.detach(), theirs.detach(), rtol)


def _kept(optimizer: RNGD, rule: StepRule) -> dict[str, Tensor]:
    """Return the rule's tensors for each layer of the small network."""
    found: dict[str, Tensor] = {}
    for parameter, shape in zip(optimizer.param_groups[0]["params"][::2], [(3, 5), (2, 4)], strict=True):
        state: dict[str, Any] = optimizer.state[parameter]
        for key, kept in rule.declares(shape).items():
            if key not in state or tuple(state[key].shape) != kept.shape:
                raise AssertionError(f"the rule declares {key} of the shape {kept.shape}, got {state.get(key)}")
            found[f"{key} of {shape}"] = state[key].clone()
    return found


def _check_state(optimizer: RNGD, rule: StepRule) -> None:
    for key, value in _kept(optimizer, rule).items():
        if not bool(torch.isfinite(value).all()):
            raise AssertionError(f"{key} must be finite, got {value}")


def _check_not_finite(model: nn.Module, optimizer: RNGD, rule: StepRule) -> None:
    weights, kept = [parameter.detach().clone() for parameter in model.parameters()], _kept(optimizer, rule)
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", HealthWarning)
        optimizer.step()
        if optimizer.health.skipped_steps != 1:
            raise AssertionError("a step with a gradient that is not finite must be skipped")
    for (name, parameter), old in zip(model.named_parameters(), weights, strict=True):
        same(f"{name} after a gradient that is not finite", parameter.detach(), old, 0.0)
    for key, value in _kept(optimizer, rule).items():
        same(f"{key} after a gradient that is not finite", value, kept[key], 0.0)
