"""Refreshes of the layers that are due in a step: those of a kind together, and one answer for all."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.optim.batches import how_many
from relfisher.optim.record import Record
from relfisher.structures import Inversion, State, Structure, refresh_together

__all__ = ["Refresh", "failed"]


class Refresh(NamedTuple):
    """The refresh of a layer with statistics and a trained part."""

    record: Record
    structure: Structure
    state: State
    inversion: Inversion

    @property
    def kind(self) -> Hashable:
        """What is equal for refreshes that are computed together."""
        layer, structure = self.record.layer, self.structure
        alone = None if self.record.frozen() is None else layer
        form = layer.shape, layer.dtype, layer.weight.device, "root" in self.state
        return structure.alike, form, self.inversion, alone


def failed(refreshes: Sequence[Refresh]) -> list[Layer]:
    """Carry out refreshes, and return the layers with a block that failed. The host waits once for each device."""
    kinds: dict[Hashable, list[Refresh]] = defaultdict(list)
    found: list[Layer] = []
    for each in refreshes:
        if type(each.structure).refresh is not Structure.refresh:
            if not each.structure.refresh(each.state, each.inversion, each.record.frozen()):
                found.append(each.record.layer)
        else:
            kinds[each.kind].append(each)
    flags: dict[torch.device, list[tuple[list[Refresh], Tensor]]] = defaultdict(list)
    for alike in kinds.values():
        first, layer = alike[0], alike[0].record.layer
        most = how_many(first.structure.numbers(layer.shape), layer.weight.device)
        for start in range(0, len(alike), most):
            own = alike[start : start + most]
            good = refresh_together(
                first.structure, [each.state for each in own], first.inversion, first.record.frozen()
            )
            flags[good.device].append((own, good))
    for answers in flags.values():
        if not bool(torch.cat([good for _, good in answers]).all()):
            pairs = [(each, one) for own, good in answers for each, one in zip(own, good.tolist(), strict=True)]
            found += [each.record.layer for each, one in pairs if not one]
    return found
