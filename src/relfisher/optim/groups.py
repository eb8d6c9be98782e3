"""Parameter groups: check their options, name their parameters, and split them by whether these have a metric."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from operator import is_
from typing import Any

from torch import Tensor, nn

from relfisher.layers import plain_name
from relfisher.optim.options import check_moments
from relfisher.validation import check_bool, check_integer, check_interval, check_rate

__all__ = [
    "ADAMW",
    "METRIC",
    "OptionChecks",
    "check_options",
    "check_progress",
    "listed",
    "named",
    "names_of",
    "rate",
    "split",
]

#: The two kinds of groups.
METRIC, ADAMW = "metric", "adamw"

# The options that `check_options` looks at.
_CHECKED = (
    "lr",
    "fallback_lr",
    "fallback_betas",
    "fallback_eps",
    "momentum",
    "averaging",
    "weight_decay",
    "damping",
    "total_steps",
)


def check_options(group: Mapping[str, Any], *, running: bool = False) -> None:
    """Raise unless the options of a group are in range.

    Args:
        group: the group.
        running: True allows a learning rate of 0, which schedulers set.

    Raises:
        ValueError: if an option is out of range.
        TypeError: if an option has the wrong type.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1 or lr.device.type != "cpu" or lr.is_complex():
            raise TypeError(
                "lr must be a number, or a tensor of one real number on the CPU, which a step reads without waiting "
                f"for a device; got a tensor of the shape {list(lr.shape)} and the dtype {lr.dtype} on {lr.device}"
            )
        lr = float(lr)
    if not (running and lr == 0):
        check_rate("lr", lr)
    check_rate("fallback_lr", group["fallback_lr"])
    check_moments("fallback_betas", group["fallback_betas"], "fallback_eps", group["fallback_eps"])
    check_interval("momentum", group["momentum"], 0, 1)
    check_interval("averaging", group["averaging"], 0, 1, closed="both")
    for name in ("weight_decay", "damping"):
        check_interval(name, group[name], 0, math.inf)
    check_interval("lr * weight_decay", lr * group["weight_decay"], 0, 1, closed="both")
    if group["total_steps"] is not None:
        check_integer("total_steps", group["total_steps"])


class OptionChecks:
    """Checks the options of groups wherever they were set anew since the last check."""

    def __init__(self) -> None:
        self._seen: list[list[Any]] = []

    def check(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Check the options of all groups, of which the learning rate may be 0; as `check_options`."""
        found = [[group[name] for name in _CHECKED] for group in groups]
        known = len(found) == len(self._seen) and all(
            all(map(is_, own, before)) for own, before in zip(found, self._seen, strict=True)
        )
        if not known or any(isinstance(group["lr"], Tensor) for group in groups):  # a tensor may change in place
            self._seen = []
            for group in groups:
                check_options(group, running=True)
            self._seen = found


def check_progress(group: Mapping[str, Any]) -> None:
    """Raise unless a group, with what it keeps of the run so far, can go on; as `check_options`."""
    check_options(group, running=True)
    for name in ("iteration", "averaged"):
        check_integer(name, group[name], 0)
    for name in ("peak_lr", "fallback_ratio"):
        check_interval(name, group[name], 0, math.inf)
    for name in ("at_iterate", "decays_heads"):
        check_bool(name, group[name])


def rate(group: Mapping[str, Any]) -> float:
    """Return the learning rate of a group's next step: `lr`, decayed by a cosine if the length of the run is known."""
    lr, total = float(group["lr"]), group["total_steps"]
    return lr if total is None else lr * (1 + math.cos(math.pi * min(1.0, group["iteration"] / total))) / 2


def names_of(model: nn.Module) -> dict[int, str]:
    """Return the names of a model's parameters by identity, without the prefixes of wrappers."""
    return {id(parameter): plain_name(model, name) for name, parameter in model.named_parameters()}


def split(group: dict[str, Any], with_metric: Collection[int], names: Mapping[int, str]) -> list[dict[str, Any]]:
    """Split a group into one with metrics and one without, either of which may be missing.

    Args:
        group: the group: "params", with or without names, and any options.
        with_metric: the identities of the parameters that have a metric.
        names: names for parameters that are given without, by identity.

    Returns:
        The groups, with named parameters. The group without metrics uses `fallback_lr` as its learning rate, unless all
        parameters of the given group are without a metric and it has its own learning rate.

    Raises:
        TypeError: if the group is invalid.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"a parameter group must be a dict with 'params', got {group!r}")
    params = named(group["params"], names)
    halves: dict[str, list[tuple[str, Tensor]]] = {METRIC: [], ADAMW: []}
    for name, parameter in params:
        halves[METRIC if id(parameter) in with_metric else ADAMW].append((name, parameter))
    mixed = all(halves.values())
    found = []
    for kind, half in halves.items():
        if half or (kind == METRIC and not params):  # a group without parameters stays one, as in torch
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            if kind == ADAMW and mixed:
                options.pop("lr", None)
            unnamed: dict[str, Any] = {} if half else {"param_names": []}  # torch finds names in the parameters alone
            found.append({**options, **unnamed, "params": half, "kind": kind})
    return found


def listed(params: object, what: str = "params must be tensors or groups of them") -> list[Any]:
    """Return the parameters or groups of an iterable, or raise TypeError if they are none or have no order.

    Args:
        params: the iterable.
        what: what it must be, for the error.

    Returns:
        Its entries; those that are groups have a list of parameters, also if they came with an iterator.

    Raises:
        TypeError: if it is no iterable of entries in order.
    """
    if isinstance(params, set):
        raise TypeError("the parameters of a group must have an order, got a set")
    if not isinstance(params, Iterable) or isinstance(params, Tensor | str | bytes):
        raise TypeError(f"{what}, got {params!r:.200}")
    return [_with_list(entry) if isinstance(entry, dict) and "params" in entry else entry for entry in params]


def _with_list(group: dict[str, Any]) -> dict[str, Any]:
    given = group["params"]
    return {**group, "params": listed([given] if isinstance(given, Tensor) else given)}


def named(params: Any, names: Mapping[int, str]) -> list[tuple[str, Tensor]]:
    """Return the parameters of a group with their names.

    Args:
        params: a parameter, or an iterable of parameters with or without names.
        names: names for parameters that are given without, by identity.

    Returns:
        Pairs of a name and a parameter.

    Raises:
        TypeError: if the parameters are unordered or not tensors.
    """
    given = listed([params] if isinstance(params, Tensor) else params)
    pairs = [entry if isinstance(entry, tuple) else (None, entry) for entry in given]
    for _, parameter in pairs:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"a parameter of the model must be a tensor, got {type(parameter).__name__}")
    return [
        (name or names.get(id(parameter), f"a parameter of shape {list(parameter.shape)}"), parameter)
        for name, parameter in pairs
    ]
