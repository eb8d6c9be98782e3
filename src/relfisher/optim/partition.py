"""Which processes hold parts of a model's parameters, and whether in a way that can be optimized."""

from __future__ import annotations

from typing import Any

from torch import distributed, nn

from relfisher.shards import is_part, reshard, sharding

__all__ = ["mesh_of"]

_TENSOR_PARALLEL = "train it without tensor parallelism, with fully_shard or DistributedDataParallel"


def mesh_of(model: nn.Module) -> Any:
    """Return the mesh of the processes of which each holds a part of every parameter; None if all hold all of them.

    Args:
        model: the model.

    Returns:
        A mesh of one dimension, or of two if several groups of processes hold the same parts.

    Raises:
        ValueError: if they hold parts in another way than after `fully_shard`; the message says what to use instead.
    """
    reshard(model)
    flat = any(type(each).__name__ == "FullyShardedDataParallel" for each in model.modules())
    parts: dict[str, Any] = {name: each for name, each in model.named_parameters() if is_part(each)}
    if flat or any(type(each).__name__ == "FlatParameter" for each in model.parameters()):
        raise ValueError(
            "model must have parameters that are layers', but FullyShardedDataParallel flattens them: use fully_shard "
            "of torch.distributed.fsdp, or DistributedDataParallel"
        )
    if _is_of_deepspeed(model):
        raise ValueError(
            "model must have whole gradients in each process, but DeepSpeed keeps them: use fully_shard of "
            "torch.distributed.fsdp, or DistributedDataParallel"
        )
    if not parts:
        return None
    gathered = {id(each) for module in sharding(model) for each in module.parameters()}
    first, mesh = next((name, each.device_mesh) for name, each in parts.items())
    for name, each in parts.items():
        problem = _problem(each, mesh, first, is_gathered=id(each) in gathered)
        if problem is not None:
            raise ValueError(f"model must be sharded by fully_shard alone, but {name} {problem}")
    rest = (name for name, each in model.named_parameters() if each.requires_grad and name not in parts)
    alone = next(rest, None)
    if alone is not None:
        raise ValueError(
            f"model must be sharded as a whole, but {alone} is not, so that its gradients are not averaged: call "
            "fully_shard(model) after its parts, without ignored parameters that are trained"
        )
    return mesh


def _is_of_deepspeed(model: nn.Module) -> bool:
    """Return whether DeepSpeed trains a model: by its engine, or with parameters that it has marked."""
    engines = (type(each).__module__.partition(".")[0] for each in model.modules())
    return "deepspeed" in engines or any(hasattr(each, "ds_id") for each in model.parameters())


def _problem(parameter: Any, mesh: Any, first: str, *, is_gathered: bool) -> str | None:
    """Return why the parts of a parameter cannot be optimized; None if they can.

    Args:
        parameter: the parameter.
        mesh: the mesh of the first one.
        first: the name of the first one.
        is_gathered: whether `fully_shard` was called on a module that has it.
    """
    kinds = [type(each).__name__ for each in parameter.placements]
    if not is_gathered or kinds not in (["Shard"], ["Replicate", "Shard"]):
        return f"is in parts of the kind {parameter.placements}, as of tensor parallelism: {_TENSOR_PARALLEL}"
    if parameter.device_mesh != mesh:
        return f"is held by other processes than {first}: use one mesh for all of it"
    if mesh.size() != distributed.get_world_size() and mesh.ndim > 1:
        return "is held by some of all processes in two dimensions: use a mesh of all of them"
    if parameter.device.type != mesh.device_type:
        return f"is kept on {parameter.device.type}, as by CPUOffloadPolicy: leave it on {mesh.device_type}"
    return None
