"""Parameter groups: their options, the names in them, and the halves with a metric and without."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from relfisher.subsystems.discover import plain_name
from relfisher.validation import check_interval, check_positive

__all__ = ["ADAMW", "METRIC", "check_names", "check_options", "check_shapes", "named", "names_of", "split"]

#: The two kinds of groups.
METRIC, ADAMW = "metric", "adamw"


def check_options(group: Mapping[str, Any]) -> None:
    """Raise ValueError unless the options of a group are in their ranges."""
    for name in ("lr", "fallback_lr"):
        check_positive(name, float(group[name]))
    betas = tuple(group["fallback_betas"])
    if len(betas) != 2:
        raise ValueError(f"fallback_betas must be two numbers, got {betas}")
    shares = [(name, group[name]) for name in ("momentum", "averaging")]
    for name, share in [*shares, *[("fallback_betas", beta) for beta in betas]]:
        check_interval(name, share, 0, 1)
    for name in ("weight_decay", "damping"):
        check_interval(name, group[name], 0, math.inf)


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the names of a model's parameters by their identity, without what wrappers put in front."""
    return {id(parameter): plain_name(model, name) for name, parameter in model.named_parameters()}


def split(group: dict[str, Any], with_metric: Collection[int], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return a group as one of parameters with a metric and one of others, either of which may be left out.

    Args:
        group: with "params", with or without names, and any options.
        with_metric: the identities of parameters that have a metric.
        names: of parameters that come without.

    Returns:
        The groups, with named parameters. The one without a metric has `fallback_lr` for its learning rate, unless it
        is all of a group that has a learning rate of its own.

    Raises:
        TypeError: if what is given is no group.
    """
    if not isinstance(group, dict):
        raise TypeError(f"a parameter group must be a dict, got {type(group).__name__}")
    params = named(group["params"], names)
    halves: dict[str, list[tuple[str, Tensor]]] = {METRIC: [], ADAMW: []}
    for name, parameter in params:
        halves[METRIC if id(parameter) in with_metric else ADAMW].append((name, parameter))
    mixed = all(halves.values())
    found = []
    for kind, half in halves.items():
        if half:
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            if kind == ADAMW and mixed:
                options.pop("lr", None)
            found.append({**options, "params": half, "kind": kind})
    return found


def named(params: Any, names: Mapping[int, str]) -> list[tuple[str, Tensor]]:
    """Return the parameters of a group with their names.

    Args:
        params: a parameter, or an iterable of parameters with or without names.
        names: of parameters that come without, by identity.

    Returns:
        Pairs of a name and a parameter.

    Raises:
        TypeError: if they have no order, or are no tensors.
    """
    if isinstance(params, Tensor):
        params = [params]
    if isinstance(params, set):
        raise TypeError("the parameters of a group must have an order, got a set")
    given: Iterable[Any] = params
    pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in given]
    for _, parameter in pairs:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"a parameter must be a tensor, got {type(parameter).__name__}")
    return [
        (name or names.get(id(parameter), f"a parameter of shape {list(parameter.shape)}"), parameter)
        for name, parameter in pairs
    ]


def check_names(mine: Iterable[Mapping[str, Any]], saved: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError unless two lists of groups are of parameters of the same names; those without names may be any.

    Args:
        mine: the groups of an optimizer.
        saved: the groups of a state that is to be loaded into it.

    Raises:
        ValueError: with the names that are missing on either side.
    """
    have = [name for group in mine for name in group["param_names"]]
    give = [name for group in saved for name in group.get("param_names", ())]
    if give and have != give:
        missing, unknown = [name for name in have if name not in give], [name for name in give if name not in have]
        raise ValueError(
            "state_dict is of other parameters than these: "
            + (f"it lacks {', '.join(missing)}; " if missing else "")
            + (f"it has {', '.join(unknown)} besides; " if unknown else "")
            + ("" if missing or unknown else "the same ones in another order or in other groups; ")
            + "load it into an optimizer of the same model"
        )


def check_shapes(
    mine: Iterable[Mapping[str, Any]],
    saved: Iterable[Mapping[str, Any]],
    states: Mapping[int, Mapping[str, Any]],
    layers: Mapping[Tensor, Sequence[int]],
) -> None:
    """Raise ValueError unless the moments, momentum and lead in a state have the shapes of what they are of.

    Args:
        mine: the groups of an optimizer.
        saved: the groups of a state that is to be loaded into it.
        states: the state of each parameter by its place in the saved groups.
        layers: the shape of each layer with a metric, by the parameter that its state is kept with.

    Raises:
        ValueError: with the name of the first parameter where one has another shape.
    """
    have = [pair for group in mine for pair in zip(group["param_names"], group["params"], strict=True)]
    places = [place for group in saved for place in group["params"]]
    for (name, parameter), place in zip(have, places, strict=False):
        own = tuple(parameter.shape)
        wanted = {"exp_avg": own, "exp_avg_sq": own}
        if parameter in layers:
            wanted |= dict.fromkeys(("momentum", "lead"), tuple(layers[parameter]))
        for key, shape in wanted.items():
            moment = states.get(place, {}).get(key)
            if moment is not None and tuple(moment.shape) != shape:
                raise ValueError(
                    f"state_dict is of other parameters than these: the {key} of {name!r} has the shape "
                    f"{list(moment.shape)}, but here it would have {list(shape)}"
                )
