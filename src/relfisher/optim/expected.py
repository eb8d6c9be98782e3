"""The state of an optimizer before its first step: what a checkpoint is loaded into, and steps that only create it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from relfisher.optim.curvature import Curvature
from relfisher.optim.fallback import Fallback
from relfisher.optim.groups import names_of
from relfisher.shards import held, zeros
from relfisher.validation import check_instance

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["expect", "is_trial"]


def expect(model: nn.Module, optimizer: torch.optim.Optimizer, checkpoint: Metadata | Mapping[str, Any]) -> None:
    """Let a new optimizer have the tensors that a checkpoint has of it, so that the checkpoint can be loaded into them.

    `torch.distributed.checkpoint.load` fills the tensors that it is given. An optimizer that has taken no step lacks
    some of them, or has others: the shapes of a metric follow from the activation behind the layer, which the first
    pass shows. Call this in all processes, before `get_state_dict`, `set_state_dict` and their siblings for optimizers,
    and load afterwards; what is not loaded is 0.

    Args:
        model: the model, as it is given to these functions.
        optimizer: an optimizer of it that has taken no step.
        checkpoint: what was saved of it: metadata, as `torch.distributed.checkpoint.FileSystemReader(folder)
            .read_metadata()` returns; or the state of the optimizer, as `get_optimizer_state_dict` with
            `full_state_dict=True` returned, which other processes than the first may leave empty.

    Raises:
        ValueError: if the checkpoint has nothing of the optimizer, or the optimizer has taken steps.
        TypeError: if an argument has the wrong type.
    """
    check_instance("model", model, nn.Module)
    check_instance("optimizer", optimizer, torch.optim.Optimizer)
    if any(group.get("iteration") for group in optimizer.param_groups):
        raise ValueError("optimizer must be new, but it has taken steps: load the checkpoint into it as it is")
    names = names_of(model)
    saved = _by_parameter(_told(_forms(checkpoint)), names.values())
    if not any(saved.values()):
        first = next(iter(names.values()), "")
        raise ValueError(f"checkpoint must have the optimizer's state of parameters of the model, such as {first!r}")
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if id(parameter) in names:
            _become(optimizer.state[parameter], saved[names[id(parameter)]], parameter)


class _Form(NamedTuple):
    """The shape and the dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _forms(checkpoint: Metadata | Mapping[str, Any]) -> dict[str, _Form]:
    """Return what a checkpoint has, by its path, such as "state.0.weight.metric"."""
    if not isinstance(checkpoint, Mapping):
        if not hasattr(checkpoint, "state_dict_metadata"):
            raise TypeError(f"checkpoint must be metadata or a mapping, got {type(checkpoint).__name__}")
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # takes long

        stored = checkpoint.state_dict_metadata.items()
        tensors = [(path, each) for path, each in stored if isinstance(each, TensorStorageMetadata)]
        return {path: _Form(tuple(each.size), each.properties.dtype) for path, each in tensors}
    states: Mapping[Any, Any] = checkpoint.get("state", {})
    nested = {f"state.{name}.{key}": value for name, state in states.items() for key, value in state.items()}
    found = nested if "state" in checkpoint else checkpoint
    return {path: _Form(tuple(each.shape), each.dtype) for path, each in found.items() if isinstance(each, Tensor)}


def _told(forms: dict[str, _Form]) -> dict[str, _Form]:
    """Return what the first process has."""
    told = [forms]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(told)
    return told[0]


def _by_parameter(forms: Mapping[str, _Form], names: Iterable[str]) -> dict[str, dict[str, _Form]]:
    """Return what is of an optimizer's state, by the name of the parameter and the key."""
    found: dict[str, dict[str, _Form]] = {name: {} for name in names}
    for path, form in forms.items():
        *parts, key = path.split(".")
        starts = [place + 1 for place, part in enumerate(parts) if part == "state"]
        name = next((name for start in starts if (name := ".".join(parts[start:])) in found), None)
        if name is not None:
            found[name][key] = form
    return found


def _become(state: dict[str, Any], saved: Mapping[str, _Form], parameter: Tensor) -> None:
    """Give a state the tensors that were saved, where they differ."""
    for key in state.keys() - saved.keys():
        del state[key]
    parted = {key for key, kept in Fallback.declares(tuple(parameter.shape)).items() if kept.parted}
    for key, (shape, dtype) in saved.items():
        if key in state and tuple(state[key].shape) == shape:
            continue
        device = parameter.device if shape else torch.device("cpu")
        state[key] = zeros(parameter, dtype) if key in parted else torch.zeros(shape, dtype=dtype, device=device)


def is_trial(groups: Iterable[Mapping[str, Any]], curvature: Curvature) -> bool:
    """Return whether a step is one that only creates states, with no pass before it, rates of 0 and gradients of 0.

    `torch.distributed.checkpoint` takes such a step with optimizers that have no state.

    Args:
        groups: the parameter groups.
        curvature: the metrics.
    """
    if curvature.observer.has_seen or any(float(group["lr"]) for group in groups):
        return False
    given = [held(p.grad) for group in groups for p in group["params"] if p.grad is not None]
    is_zero, ranks = not any(bool(each.any()) for each in given), curvature.ranks
    return bool(ranks.least([int(is_zero)])[0]) if ranks.in_parts else is_zero
