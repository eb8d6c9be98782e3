"""The module that owns some parameters, for loops that make an optimizer from `model.parameters()` alone."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from torch import nn

from relfisher.optim.groups import named
from relfisher.shards import class_of

__all__ = ["OwnerWarning", "model_of", "modules_in_memory"]

_Kind = TypeVar("_Kind", bound=nn.Module)


class OwnerWarning(UserWarning):
    """The model was found by its parameters; the message says which it is."""


def model_of(entries: Sequence[Any]) -> nn.Module:
    """Return the module in memory that owns all given parameters, and say so; of several models, a list of them.

    It is the one with the fewest other parameters. Of modules with the same parameters, such as a model and what wraps
    it, it is the outermost.

    Args:
        entries: parameters, named parameters, or groups of them, as for any torch optimizer.

    Returns:
        The module, or a ModuleList of several.

    Raises:
        ValueError: if no module owns a parameter, or it cannot be told which one it is.
        TypeError: if an entry is none of these.
    """
    groups = [entry.get("params", ()) if isinstance(entry, dict) else [entry] for entry in entries]
    wanted = {id(parameter) for group in groups for _, parameter in named(group, {})}
    owned = {module: {id(parameter) for parameter in module.parameters()} for module in modules_in_memory(nn.Module)}
    owned = {module: found for module, found in owned.items() if found & wanted}
    if not wanted:
        raise ValueError("params must have at least one parameter, got none: RNGD has nothing to train")
    lost = len(wanted.difference(*owned.values())) if owned else len(wanted)
    if lost:
        raise ValueError(
            f"params must be parameters of modules, but {lost} of the {len(wanted)} are in no module: RNGD needs to "
            "see the layers run; write RNGD(model)"
        )
    chosen = list(_chosen(owned, wanted))
    names = " and ".join(class_of(module).__name__ for module in chosen)
    message = f"RNGD observes {names}, which it found by the parameters; write RNGD(model) to say it"
    warnings.warn(message, OwnerWarning, stacklevel=3)
    return chosen[0] if len(chosen) == 1 else nn.ModuleList(chosen)


def modules_in_memory(kind: type[_Kind]) -> list[_Kind]:
    """Return all modules of a kind that are in use."""
    gc.collect()  # those that are no longer used may own the same parameters
    return [each for each in gc.get_objects() if issubclass(type(each), kind) and "_modules" in vars(each)]


def _chosen(owned: dict[nn.Module, set[int]], wanted: set[int]) -> Iterator[nn.Module]:
    """Yield modules until they own all, each the one that owns most of the rest, and the least besides."""
    while wanted:
        best = max(owned, key=lambda module: (len(owned[module] & wanted), -len(owned[module])))
        same = [module for module, found in owned.items() if found == owned[best]]
        inside = {module: set(module.modules()) - {module} for module in same}
        outermost = [one for one in same if not any(one in parts for parts in inside.values())]
        innermost = [one for one in same if inside[one].isdisjoint(same)]
        for found in (outermost, innermost):
            if len(found) == 1:
                yield found[0]
                break
        else:
            names = " and ".join(sorted(class_of(module).__name__ for module in innermost))
            raise ValueError(f"params are in several modules alike, {names}: write RNGD(model) with the one that runs")
        wanted = wanted - owned[best]
