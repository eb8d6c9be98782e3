"""Parameters of which each process holds a part, as `torch.distributed.fsdp.fully_shard` leaves them.

Torch calls such a tensor a DTensor, and the module that gathers its own ones for a forward or backward pass an
FSDPModule. What these classes are is looked up only where there is one, since their import takes long.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

__all__ = [
    "all_whole",
    "class_of",
    "held",
    "in_rows",
    "is_part",
    "made_whole",
    "parted",
    "reshard",
    "sharding",
    "whole",
    "zeros",
]


def is_part(tensor: Tensor) -> bool:
    """Return whether a process holds a part of a tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """Return all of a tensor; if processes hold parts of it, all of them must ask for it."""
    found: Tensor = tensor.full_tensor() if is_part(tensor) else tensor
    return found


def all_whole(tensors: Sequence[Any]) -> list[Tensor]:
    """Return all of several tensors, of which processes of one mesh hold parts, with one message for each dtype."""
    found: dict[int, Tensor] = {}
    alike: dict[torch.dtype, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.placements[-1].is_shard(0):
            alike.setdefault(tensor.dtype, []).append(place)
        else:
            found[place] = whole(tensor)
    for places in alike.values():
        found |= zip(places, _gathered([tensors[place] for place in places]), strict=True)
    return [found[place] for place in range(len(tensors))]


def _gathered(tensors: Sequence[Any]) -> Iterator[Tensor]:
    """Yield all of tensors of one dtype, of which each process holds as many rows, or the rest, or nothing."""
    group = tensors[0].device_mesh.get_group(-1)
    count = group.size()
    rows = [-(-len(tensor) // count) for tensor in tensors]
    sizes = [own * math.prod(tensor.shape[1:]) for own, tensor in zip(rows, tensors, strict=True)]
    mine = torch.zeros(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
    for part, tensor in zip(torch.split(mine, sizes), tensors, strict=True):
        local = held(tensor)
        part[: local.numel()].copy_(local.flatten())
    every = mine.new_empty(count * len(mine))
    distributed.all_gather_into_tensor(every, mine, group)
    for columns, tensor in zip(torch.split(every.view(count, -1), sizes, dim=1), tensors, strict=True):
        yield columns.reshape(-1, *tensor.shape[1:])[: len(tensor)]


def held(tensor: Any) -> Tensor:
    """Return what this process holds of a tensor, in the same memory; it may be empty."""
    found: Tensor = tensor.to_local() if is_part(tensor) else tensor
    return found


def parted(tensor: Tensor, like: Any) -> Tensor:
    """Return a whole tensor, which all processes have, in parts like those of another one; nothing is sent."""
    if not is_part(like) or is_part(tensor):
        return tensor
    return _divided(tensor, like.device_mesh, like.placements)


def in_rows(tensor: Tensor, like: Any) -> Tensor:
    """Return a whole tensor, which all processes have, in rows that are shared out to those with parts of another one.

    Nothing is sent.
    """
    from torch.distributed.tensor import Replicate, Shard  # takes long

    mesh = like.device_mesh
    return _divided(tensor, mesh, [*[Replicate()] * (mesh.ndim - 1), Shard(0)])


def _divided(tensor: Tensor, mesh: Any, placements: Sequence[Any]) -> Tensor:
    from torch.distributed.tensor import DTensor, Replicate  # takes long

    replicated = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return replicated.redistribute(placements=placements)


def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return zeros of the shape of a parameter, in parts if it is."""
    if is_part(like):
        return torch.zeros_like(like, dtype=dtype)
    return torch.zeros(like.shape, dtype=dtype, device=like.device)


def sharding(model: nn.Module) -> list[Any]:
    """Return the modules of a model that gather their parameters for a pass: those that `fully_shard` was called on."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [] if fsdp is None else [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Let the modules of a model have their parts, which the optimizer moves, also if a pass has left them whole."""
    for module in sharding(model):
        if _is_gathering(module):
            module.unshard()  # waits
        module.reshard()


def _is_gathering(module: Any) -> bool:
    """Return whether a module has begun to gather its parameters, as by `unshard(async_op=True)`."""
    groups = getattr(module._get_fsdp_state(), "_fsdp_param_groups", ())
    return any(getattr(group, "_all_gather_result", None) is not None for group in groups)


def class_of(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module; `fully_shard` puts one of its own in front of it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    wrapped = fsdp is not None and isinstance(module, fsdp.FSDPModule)
    return type(module).__mro__[2] if wrapped else type(module)


@contextmanager
def made_whole(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let modules have whole parameters, which are copies; all processes must do so.

    Args:
        modules: the modules, without those inside of them.

    Yields:
        Nothing.
    """
    found: dict[int, nn.Parameter] = {}  # a parameter of several modules stays one
    replaced = []
    try:
        for module in modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and is_part(parameter):
                    replaced.append((module, name, parameter))
                    if id(parameter) not in found:
                        copied = whole(parameter.detach())
                        found[id(parameter)] = nn.Parameter(copied, requires_grad=parameter.requires_grad)
                    module._parameters[name] = found[id(parameter)]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter
