"""The whole state of layers that processes share out between them, for saving it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from relfisher.optim.curvature import Curvature
from relfisher.optim.record import Record
from relfisher.shards import in_rows, is_part

__all__ = ["assembled"]

# A tensor with as few numbers is told with its form.
_FEW = 8


class _Form(NamedTuple):
    """What a tensor is that follows."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def assembled(curvature: Curvature) -> dict[Tensor, dict[str, Any]]:
    """Return the states of all parameters, with those of layers that other processes own; all must ask for it.

    If each process holds a part of the parameters, it gets some rows of each tensor. Otherwise, it gets all of them, in
    the memory of the host if they are not its own.

    Args:
        curvature: the metrics.
    """
    sharing, ranks = curvature.sharing, curvature.ranks
    found = {parameter: dict(state) for parameter, state in curvature.states.items()}
    records = [curvature.records[layer] for layer in sharing.owner]
    own = {record.name: _forms(curvature, record) for record in records if sharing.owns(record.layer)}
    forms = {name: each for told in ranks.told(own) for name, each in told.items()}
    for record in records:
        state, beside = found.setdefault(record.key, {}), curvature.ownership.keys_beside(record.layer)
        # All processes have the same order.
        whole = {key: state[key] for key in sorted(beside) if key in state}
        for key, form in forms[record.name].items():
            if isinstance(form, _Form):
                whole[key] = _sent(state.get(key), form, record, sharing.owner[record.layer], curvature)
            else:
                whole[key] = form
        found[record.key] = whole
    return found


def _forms(curvature: Curvature, record: Record) -> dict[str, Tensor | _Form]:
    """Return what a layer's state has: the form of each tensor, or itself if it is a few numbers."""
    state, beside = curvature.states[record.key], curvature.ownership.keys_beside(record.layer)
    own = {key: value for key, value in state.items() if key not in beside}
    return {
        key: value.cpu() if value.numel() <= _FEW else _Form(tuple(value.shape), value.dtype)
        for key, value in own.items()
    }


def _sent(own: Tensor | None, form: _Form, record: Record, owner: int, curvature: Curvature) -> Tensor:
    """Return a tensor of a layer that its owner sends to all."""
    ranks = curvature.ranks
    if own is None:
        sent = torch.empty(form.shape, dtype=form.dtype, device=ranks.device)
    else:
        sent = own.to(ranks.device).contiguous()
    distributed.broadcast(sent, group_src=owner, group=ranks.group)
    if is_part(record.key):
        return in_rows(sent, record.key)
    return sent.cpu() if own is None else own
