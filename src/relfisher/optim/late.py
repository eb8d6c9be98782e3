"""Models that are sharded after their optimizer was made, as by Accelerate: they have other parameters then."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from relfisher.optim.curvature import Curvature
from relfisher.optim.groups import names_of

__all__ = ["replaced"]


def replaced(groups: Sequence[dict[str, Any]], curvature: Curvature) -> bool:
    """Let groups have the parameters of a model, if it was sharded since.

    Args:
        groups: the groups of an optimizer, with the names of the parameters in the model.
        curvature: its metrics.

    Returns:
        Whether the model was sharded since.

    Raises:
        ValueError: if the optimizer has taken steps or has loaded a state, which is of the parameters of before.
    """
    if not curvature.ranks.is_late():
        return False
    model = curvature.model()
    assert model is not None  # it was looked at
    if any(group["iteration"] for group in groups):
        raise ValueError(
            "the model was sharded after its optimizer took steps or loaded a state: call fully_shard first"
        )
    curvature.ranks.look_again()
    names = names_of(model)
    found = {names[id(parameter)]: parameter for parameter in model.parameters()}
    for group in groups:
        pairs: Iterable[tuple[str, Tensor]] = zip(group["param_names"], group["params"], strict=True)
        group["params"] = [found.get(name, parameter) for name, parameter in pairs]
    return True
