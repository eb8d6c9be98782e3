"""Say which parameters AdamW trains for want of a metric, or refuse to train so many."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from relfisher.observe import UncoveredWarning
from relfisher.optim.groups import ADAMW, names_of
from relfisher.shards import class_of

__all__ = ["Uncovered", "tell", "uncovered"]

# So many names stand for all parameters of a kind.
_NAMED = 3

# A smaller share of all numbers is not worth a warning.
_FEW = 0.01

_FOREIGN = "not a parameter of the model"


class Uncovered(NamedTuple):
    """The parameters that AdamW trains for want of a metric.

    Attributes:
        model: the model.
        parameters: the parameters, with the reasons.
        trained: the number of all trained parameters.
        share: the share of their numbers.
    """

    model: nn.Module
    parameters: list[tuple[Tensor, str]]
    trained: int
    share: float

    def described(self, parameters: Iterable[tuple[Tensor, str]]) -> str:
        """Return the share, and some of the parameters by class and reason."""
        names, classes = names_of(self.model), _classes(self.model)
        found: dict[str, dict[str, list[str]]] = {}
        for parameter, reason in parameters:
            name = names.get(id(parameter), f"of shape {list(parameter.shape)}")
            kind = classes.get(id(parameter), "no module")
            found.setdefault(reason, {}).setdefault(kind, []).append(name)
        each = "; ".join(f"{_listed(kinds)}: {reason}" for reason, kinds in found.items())
        counts = f"{len(self.parameters)} of {self.trained} parameters, {100 * self.share:.3g} % of all numbers"
        how = "A class of modules gets a metric by relfisher.register_layer; coverage lists everything"
        return f"{counts}, for want of a metric. {each}. {how}"


def uncovered(
    model: nn.Module, refused: Mapping[str, str], groups: Iterable[Mapping[str, Any]], others: Collection[int] = ()
) -> Uncovered:
    """Return the parameters in the groups that have no metric, unless a `structure` leaves them to AdamW.

    Args:
        model: the model.
        refused: why parameters of the model have no metric, by name.
        groups: all groups of the optimizer.
        others: the identities of parameters that have a metric after all, or may turn out to have one.
    """
    names = names_of(model)
    reasons = {id(p): refused.get(name) for p in model.parameters() if (name := names[id(p)])}
    trained = [(group["kind"], p) for group in groups for p in group["params"] if p.requires_grad and p.numel()]
    left = [
        (p, reason)
        for kind, p in trained
        if (reason := reasons.get(id(p), _FOREIGN if kind == ADAMW else None)) is not None and id(p) not in others
    ]
    total = sum(p.numel() for _, p in trained)
    return Uncovered(model, left, len(trained), sum(p.numel() for p, _ in left) / total if total else 0.0)


def tell(found: Uncovered, told: Collection[Tensor]) -> list[Tensor]:
    """Warn once about all parameters that have no metric, unless they are few.

    Args:
        found: the parameters.
        told: parameters that were named before.

    Returns:
        The parameters that are named now.
    """
    before = {id(parameter) for parameter in told}
    new = [(parameter, reason) for parameter, reason in found.parameters if id(parameter) not in before]
    if not new or found.share <= _FEW:
        return []
    warnings.warn(f"AdamW trains {found.described(new)}", UncoveredWarning, stacklevel=5)
    return [parameter for parameter, _ in new]


def _classes(model: nn.Module) -> dict[int, str]:
    """Return the class of the module of each parameter, by identity."""
    owned = ((module, p) for module in model.modules() for p in module.parameters(recurse=False))
    return {id(parameter): class_of(module).__name__ for module, parameter in owned}


def _listed(kinds: Mapping[str, Sequence[str]]) -> str:
    """Return the names of parameters by class in short form."""
    return " and ".join(
        f"{len(names)} of {kind} ({', '.join([*names[:_NAMED], *['...'] * (len(names) > _NAMED)])})"
        for kind, names in kinds.items()
    )
