"""A refresh: the factors of layers from their moving averages, of layers of equal shape together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from relfisher.structures.inverse import Inversion
from relfisher.structures.state import State, factor_key, scale_key

if TYPE_CHECKING:
    from relfisher.structures.base import Structure

__all__ = ["refresh_together"]


def refresh_together(
    structure: Structure, states: Sequence[State], inversion: Inversion, frozen: Tensor | None = None
) -> Tensor:
    """Recompute the factors of layers; a block that fails keeps its last good factor.

    Args:
        structure: a structure that is like that of each layer.
        states: the states of the layers, which have statistics, in tensors of equal shape, dtype and device.
        inversion: the damping and power.
        frozen: True for columns [d] that are frozen and hence excluded from the metric, not for all of them.

    Returns:
        Whether all blocks of a layer are good, [layers], for which nothing has waited.
    """
    root, several = "root" in states[0], len(states) > 1
    inversion = replace(inversion if len(structure.tensors) == 1 else inversion.halved(), rank=structure.rank)
    found: list[tuple[str, Tensor, Tensor]] = []
    known: list[Tensor] = []
    for name in structure.tensors:
        key = factor_key(name, root=root)
        averages = [state[name] / float(state["ema_weight"]) for state in states]
        metric = torch.stack(averages) if several else averages[0]
        diagonals = structure.diagonals(metric)
        if frozen is not None and name == "metric":
            diagonals = diagonals[..., ~frozen]
            metric = metric if scale_key(key) in states[0] else structure.without(metric, frozen)
        known.append(diagonals.flatten(1).any(1) if several else diagonals.any())
        if several:  # each layer has a mean eigenvalue of its own
            amounts = torch.stack([inversion.amounts(own) for own in diagonals.unbind(0)])
        else:
            amounts = inversion.amounts(diagonals)
        if scale_key(key) in states[0]:
            stuck = frozen if name == "metric" else None
            low, good = inversion.leading(metric, amounts, root=root, frozen=stuck)
            found += [(key, low.basis, good), (scale_key(key), low.scale, good)]
        else:
            found.append((key, *structure.inverted(metric, amounts, inversion, root=root)))
    # No information yet: the next layer's weights are 0, or no unit was active.
    is_known = torch.stack(known).all(0)
    good = found[0][2]
    for _, _, each in found[1:]:
        good = good & each  # factors of the same block are replaced together
    flags, informed = (good.unbind(0), is_known.unbind(0)) if several else ((good,), (is_known,))
    for key, factor, _ in found:
        factors = factor.unbind(0) if several else (factor,)
        for state, own, its, is_informed in zip(states, factors, flags, informed, strict=True):
            usable = (its & is_informed)[(..., *(None,) * (own.ndim - its.ndim))]
            torch.where(usable, own, state[key], out=state[key])
    return torch.stack([(its | ~each).all() for its, each in zip(flags, informed, strict=True)])
