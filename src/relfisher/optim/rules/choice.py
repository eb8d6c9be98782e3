"""Which rule a name stands for."""

from __future__ import annotations

from torch import nn

from relfisher.optim.rules.base import StepRule
from relfisher.optim.rules.normalized import Normalized
from relfisher.optim.rules.spectral import Spectral
from relfisher.optim.rules.trust_region import TrustRegion

__all__ = ["DEFAULT_BOUND", "rule_named"]

#: On the squared metric length of a layer's step, by the trust region.
DEFAULT_BOUND = 2e-3

_AUTO = "auto"
_RULES = (_AUTO, Normalized.name, Spectral.name, TrustRegion.name)


def rule_named(rule: str | StepRule, bound: float | None, model: nn.Module) -> StepRule:
    """Return the rule that is asked for.

    Args:
        rule: the rule itself, or its name; "auto" is "spectral" for language models and "normalized" for others.
        bound: of the trust region.
        model: what is trained.

    Returns:
        The rule.

    Raises:
        ValueError: if there is no such rule, or a bound is given that it has no place for.
    """
    if bound != DEFAULT_BOUND and rule != TrustRegion.name:
        raise ValueError(f"trust_region must be left out where step_rule is not {TrustRegion.name!r}, got {bound}")
    if rule == _AUTO:
        rule = Spectral.name if _is_language_model(model) else Normalized.name
    match rule:
        case StepRule():
            return rule
        case TrustRegion.name:
            return TrustRegion(bound)
        case Normalized.name:
            return Normalized()
        case Spectral.name:
            return Spectral()
    raise ValueError(f"step_rule must be one of {', '.join(_RULES)}, or a StepRule, got {rule!r}")


def _is_language_model(model: nn.Module) -> bool:
    """Return whether the last linear layer scores as many tokens as the largest embedding looks up.

    Its gradients then come from many targets at once and have many directions, all of which the spectral step follows
    alike. Where they have few, as those of a classifier of sequences, it would mostly follow noise.
    """
    tokens = max((module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)), default=0)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return any(module.out_features == tokens > 0 for module in linear[-1:])
