"""The choice of a step rule by name."""

from __future__ import annotations

from torch import nn

from relfisher.optim.rules.base import StepRule
from relfisher.optim.rules.normalized import Normalized
from relfisher.optim.rules.spectral import Spectral
from relfisher.optim.rules.trust_region import TrustRegion
from relfisher.registry import add_named

__all__ = ["register_rule", "rule_named"]

_AUTO = "auto"
_NAMED: dict[str, type[StepRule]] = {rule.name: rule for rule in (Normalized, Spectral, TrustRegion)}


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
    return add_named("step rule", kind, StepRule, _NAMED, (_AUTO,))


def rule_named(rule: object, model: nn.Module) -> StepRule:
    """Return a step rule by name; a rule is returned unchanged.

    Args:
        rule: a rule or its name; "auto" is "spectral" for language models and "normalized" for others.
        model: the model to train.

    Returns:
        The rule.

    Raises:
        ValueError: if there is no such rule.
    """
    if isinstance(rule, StepRule):
        return rule
    if rule == _AUTO:
        return Spectral() if _is_language_model(model) else Normalized()
    if isinstance(rule, str) and rule in _NAMED:
        return _NAMED[rule]()
    raise ValueError(f"step_rule must be one of {', '.join([_AUTO, *_NAMED])}, or a StepRule, got {rule!r}")


def _is_language_model(model: nn.Module) -> bool:
    """Return whether the last linear layer scores as many tokens as the largest embedding looks up.

    The gradients of a language model come from many targets at once and have many significant directions, which the
    spectral step follows equally. With few directions, as in a sequence classifier, it would mostly follow noise.
    """
    tokens = max((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), default=0)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return any(module.out_features == tokens > 0 for module in linear[-1:])
