"""Say which parameters AdamW trains for want of a metric."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from relfisher.observe import UncoveredWarning
from relfisher.optim.groups import ADAMW, names_of

__all__ = ["tell"]

# So many names stand for all parameters of a kind.
_NAMED = 3


def tell(
    model: nn.Module, refused: Mapping[str, str], groups: Iterable[Mapping[str, Any]], told: Collection[Tensor]
) -> list[Tensor]:
    """Warn once about all parameters that have no metric, unless a `structure` leaves them to AdamW.

    Args:
        model: the model.
        refused: why parameters of the model have no metric, by name.
        groups: all groups of the optimizer.
        told: parameters that were named before.

    Returns:
        The parameters that are named now.
    """
    names, classes = names_of(model), _classes(model)
    reasons = {id(p): refused.get(name) for p in model.parameters() if (name := names[id(p)])}
    trained = [(group["kind"], p) for group in groups for p in group["params"] if p.requires_grad and p.numel()]
    left = [p for kind, p in trained if kind == ADAMW and reasons.get(id(p), _FOREIGN) is not None]
    before = {id(parameter) for parameter in told}
    new = [parameter for parameter in left if id(parameter) not in before]
    if new:
        found: dict[str, dict[str, list[str]]] = {}
        for parameter in new:
            kinds = found.setdefault(reasons.get(id(parameter), _FOREIGN) or "", {})
            name = names.get(id(parameter), f"of shape {list(parameter.shape)}")
            kinds.setdefault(classes.get(id(parameter), "no module"), []).append(name)
        share = sum(p.numel() for p in left) / sum(p.numel() for _, p in trained)
        each = "; ".join(f"{_listed(kinds)}: {reason}" for reason, kinds in found.items())
        warnings.warn(
            f"AdamW trains {len(left)} of {len(trained)} parameters, {100 * share:.2g} % of all numbers, for want of a "
            f"metric. {each}. A class of modules gets a metric by relfisher.register_layer; coverage lists everything",
            UncoveredWarning,
            stacklevel=5,
        )
    return new


_FOREIGN = "not a parameter of the model"


def _classes(model: nn.Module) -> dict[int, str]:
    """Return the class of the module of each parameter, by identity."""
    owned = ((module, p) for module in model.modules() for p in module.parameters(recurse=False))
    return {id(parameter): type(module).__name__ for module, parameter in owned}


def _listed(kinds: Mapping[str, Sequence[str]]) -> str:
    """Return the names of parameters by class in short form."""
    return " and ".join(
        f"{len(names)} of {kind} ({', '.join([*names[:_NAMED], *['...'] * (len(names) > _NAMED)])})"
        for kind, names in kinds.items()
    )
