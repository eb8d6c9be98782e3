"""The lead z - x of the iterate z over the average x, which is what an optimizer stores of the two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.optim.outcome import Outcome
from relfisher.optim.rounding import Rounding
from relfisher.structures import Kept

__all__ = ["Averages", "Lead", "averaged", "iterate", "share_of_last"]


def averaged(parameter: Tensor) -> bool:
    """Return whether a parameter is averaged: if it is trained, and not in half precision, too coarse for it."""
    return parameter.requires_grad and torch.finfo(parameter.dtype).bits > 16


def iterate(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """Return what a parameter is at the last iterate, given that the model holds the average."""
    lead = optimizer.state[parameter].get("lead") if parameter in optimizer.state else None
    return parameter.detach() if lead is None else parameter.detach() + lead


class Lead:
    """The lead of z over x of each averaged parameter.

    Args:
        dtype: the dtype of the leads of real parameters; None for that of the parameter.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def declares(self, shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the lead for a parameter of this shape."""
        return {"lead": Kept(shape, dtype=self.dtype, parted=True)}

    def dtype_for(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype of the lead of a parameter."""
        return self.dtype if self.dtype is not None and parameter.is_floating_point() else parameter.dtype

    def complete(self, group: Mapping[str, Any], states: Mapping[Tensor, dict[str, Any]]) -> None:
        """Create the missing leads of a group's parameters."""
        for parameter in group["params"] if group["averaging"] else ():
            if "lead" not in states.get(parameter, {}) and averaged(parameter):
                states[parameter]["lead"] = torch.zeros_like(parameter, dtype=self.dtype_for(parameter))


class Averages(NamedTuple):
    """Averaged parameters of a group, of those in parts what this process holds, and their leads in the state.

    The leads are all in the precision of their parameters, or all in a lower one.
    """

    group: dict[str, Any]
    parameters: list[Tensor]
    leads: list[Tensor]

    @property
    def is_low(self) -> bool:
        """Whether the leads are in a lower precision."""
        return self.leads[0].dtype != self.parameters[0].dtype

    def negated(self) -> list[Tensor]:
        """Return -x, given that the parameters hold z, in place of the leads if they have the precision."""
        if self.is_low:
            return list(torch._foreach_sub(self.leads, self.parameters))
        torch._foreach_sub_(self.leads, self.parameters)
        return self.leads

    def update(self, means: list[Tensor], outcomes: Sequence[Outcome], rounding: Rounding) -> None:
        """Average the new z, which the parameters hold, into x, and let the parameters hold that.

        Args:
            means: -x before, which is replaced.
            outcomes: those of the step.
            rounding: how leads are rounded.
        """
        torch._foreach_add_(means, self.parameters)
        for outcome in outcomes:
            outcome.multiply(means, 1 - share_of_last(self.group))
            if self.is_low:
                self._store(means, outcome, rounding)
        torch._foreach_sub_(self.parameters, self.leads)

    def _store(self, leads: list[Tensor], outcome: Outcome, rounding: Rounding) -> None:
        """Round new leads; if the step is not taken, the old ones stay."""
        for places in _alike(leads):
            old = [self.leads[place] for place in places]
            new = rounding.rounded(torch.cat([leads[place].flatten() for place in places]), old[0].dtype)
            outcome.restore(new, torch.cat([each.flatten() for each in old]))
            parts = torch.split(new, [each.numel() for each in old])
            torch._foreach_copy_(old, [part.view(each.shape) for part, each in zip(parts, old, strict=True)])


def _alike(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of tensors of each device and dtype."""
    places: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, tensor in enumerate(tensors):
        places.setdefault((tensor.device, tensor.dtype), []).append(place)
    return list(places.values())


def share_of_last(group: Mapping[str, Any]) -> float:
    """Return the share of the last iterate of a group in its average."""
    return min(1.0, 1 / float(group["averaging"] * group["averaged"]))
