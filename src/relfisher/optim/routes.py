"""Ways of tensors in parts to the processes that own them, and of parts of what these make of them back to all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, distributed

from relfisher.shards import held

__all__ = ["from_owners", "to_owners"]

Shape = tuple[int, ...]


def to_owners(tensors: Sequence[Any], owners: Sequence[int], group: Any) -> list[Tensor | None]:
    """Return all of the tensors that this process owns, and None for others, with one message for each dtype.

    Args:
        tensors: tensors of which the processes of one mesh hold parts.
        owners: the owner of each, by its rank.
        group: the group of all these processes.
    """
    found: list[Tensor | None] = [None] * len(tensors)
    for places in _alike([tensor.dtype for tensor in tensors]):
        mesh, rank = tensors[places[0]].device_mesh, distributed.get_rank(group)
        where, count = _positions(mesh), mesh.size(-1)
        row = where[rank][0]
        by_owner = [[place for place in places if owners[place] == each] for each in range(len(where))]
        leaving = [
            [held(tensors[place]) for place in mine] if where[target][0] == row else []
            for target, mine in enumerate(by_owner)
        ]
        coming = [
            [_part(tensors[place], column, count) for place in by_owner[rank]] if own_row == row else []
            for own_row, column in where
        ]
        got = _exchanged(leaving, coming, held(tensors[places[0]]), group)
        parts = [got[source] for source in sorted(range(len(where)), key=where.__getitem__) if where[source][0] == row]
        for place, *several in zip(by_owner[rank], *parts, strict=True):
            found[place] = torch.cat(several, tensors[place].placements[-1].dim)
    return found


def from_owners(
    changes: Sequence[Tensor | None], likes: Sequence[Any], owners: Sequence[int], group: Any
) -> list[Tensor]:
    """Return the parts of tensors that owners have made, with one message for each dtype.

    Args:
        changes: the tensors that this process has made, and None for others; in single precision at least.
        likes: tensors of the same shapes, of which the processes of one mesh hold parts.
        owners: the owner of each, by its rank.
        group: the group of all these processes.
    """
    found: dict[int, Tensor] = {}
    dtypes = [torch.promote_types(like.dtype, torch.float32) for like in likes]
    for places in _alike(dtypes):
        mesh, rank = likes[places[0]].device_mesh, distributed.get_rank(group)
        where, count = _positions(mesh), mesh.size(-1)
        by_owner = [[place for place in places if owners[place] == each] for each in range(len(where))]
        mine = [_divided(changes[place], likes[place], count) for place in by_owner[rank]]
        leaving = [[parts[column] for parts in mine] for _, column in where]
        coming = [[_part(likes[place], where[rank][1], count) for place in theirs] for theirs in by_owner]
        like = held(likes[places[0]]).new_empty(0, dtype=dtypes[places[0]])
        for theirs, parts in zip(by_owner, _exchanged(leaving, coming, like, group), strict=True):
            found |= zip(theirs, parts, strict=True)
    return [found[place] for place in range(len(likes))]


def _alike(dtypes: Sequence[torch.dtype]) -> list[list[int]]:
    """Return the places of equal dtypes."""
    found: dict[torch.dtype, list[int]] = {}
    for place, dtype in enumerate(dtypes):
        found.setdefault(dtype, []).append(place)
    return list(found.values())


def _positions(mesh: Any) -> list[tuple[int, int]]:
    """Return which copy of the parameters a process holds a part of, and which part, by its rank."""
    if mesh.ndim == 1:
        return [(0, rank) for rank in range(mesh.size())]
    where = {int(rank): (row, column) for row, own in enumerate(mesh.mesh) for column, rank in enumerate(own)}
    return [where[rank] for rank in range(mesh.size())]


def _part(tensor: Any, column: int, count: int) -> Shape:
    """Return the shape of a part of a tensor."""
    dim = tensor.placements[-1].dim
    most = -(-tensor.shape[dim] // count)
    own = min(max(tensor.shape[dim] - column * most, 0), most)
    return (*tensor.shape[:dim], own, *tensor.shape[dim + 1 :])


def _divided(whole: Tensor | None, like: Any, count: int) -> Sequence[Tensor]:
    """Return the parts of a whole tensor."""
    assert whole is not None  # this process owns it
    dim = like.placements[-1].dim
    return torch.split(whole, [_part(like, column, count)[dim] for column in range(count)], dim)


def _exchanged(
    leaving: Sequence[Sequence[Tensor]], coming: Sequence[Sequence[Shape]], like: Tensor, group: Any
) -> list[list[Tensor]]:
    """Send each process some tensors, and return those that each has sent."""
    sizes = [[math.prod(shape) for shape in shapes] for shapes in coming]
    flat = torch.cat([like.new_empty(0), *(tensor.flatten() for tensors in leaving for tensor in tensors)])
    got = like.new_empty(sum(map(sum, sizes)))
    sent = [sum(tensor.numel() for tensor in tensors) for tensors in leaving]
    distributed.all_to_all_single(got, flat, [sum(own) for own in sizes], sent, group)
    found = iter(torch.split(got, [size for own in sizes for size in own]))
    return [[next(found).view(shape) for shape in shapes] for shapes in coming]
