"""The choice of a step rule by name."""

from __future__ import annotations

from relfisher.optim.rules.base import StepRule
from relfisher.optim.rules.normalized import Normalized
from relfisher.optim.rules.spectral import Spectral
from relfisher.optim.rules.trust_region import TrustRegion
from relfisher.registry import add_named

__all__ = ["register_rule", "rule_named"]

_NAMED: dict[str, type[StepRule]] = {rule.name: rule for rule in (Spectral, Normalized, TrustRegion)}


def register_rule(kind: type[StepRule]) -> type[StepRule]:
    """Register a step rule under its name, for all optimizers; it can be used as a decorator.

    `RNGD(step_rule=kind())` does the same for a single optimizer.

    Args:
        kind: a subclass of `StepRule` with a `name`, whose constructor needs no arguments.

    Returns:
        The rule, unchanged.

    Raises:
        TypeError: if `kind` is not such a subclass.
        ValueError: if its name is taken.
    """
    return add_named("step rule", kind, StepRule, _NAMED, ())


def rule_named(rule: object) -> StepRule:
    """Return a step rule by name; a rule is returned unchanged.

    Raises:
        ValueError: if there is no such rule.
    """
    if isinstance(rule, StepRule):
        return rule
    if isinstance(rule, str) and rule in _NAMED:
        return _NAMED[rule]()
    raise ValueError(f"step_rule must be one of {', '.join(_NAMED)}, or a StepRule, got {rule!r}")
