"""Which rule a name stands for."""

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
    """Let a step rule of your own be chosen by its name everywhere; `RNGD(step_rule=kind())` does so for one optimizer.

    Args:
        kind: a subclass of `StepRule` with a new `name`, made without arguments; it may be decorated by this function.

    Returns:
        The rule.

    Raises:
        TypeError: if it is no such subclass.
        ValueError: if its name is taken.
    """
    return add_named("step rule", kind, StepRule, _NAMED, (_AUTO,))


def rule_named(rule: object, model: nn.Module) -> StepRule:
    """Return the rule that is asked for.

    Args:
        rule: the rule itself, or its name; "auto" is "spectral" for language models and "normalized" for others.
        model: what is trained.

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

    Its gradients then come from many targets at once and have many directions, all of which the spectral step follows
    alike. With few directions, as in a classifier of sequences, it would mostly follow noise.
    """
    tokens = max((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), default=0)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return any(module.out_features == tokens > 0 for module in linear[-1:])
