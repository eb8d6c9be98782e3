"""Saving, loading and copying. Names and shapes are checked before anything is changed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from relfisher.optim.assembly import assembled
from relfisher.optim.curvature import Curvature
from relfisher.optim.groups import check_progress
from relfisher.optim.health import all_finite
from relfisher.optim.record import Record
from relfisher.optim.rounding import LOW
from relfisher.shards import held, is_part, parted, whole
from relfisher.structures import Kept

__all__ = ["loading", "moved", "saving"]


@contextmanager
def saving(optimizer: torch.optim.Optimizer, curvature: Curvature) -> Iterator[None]:
    """Let an optimizer have the states of all layers, also those that other processes keep, which send them."""
    own = optimizer.state
    if curvature.sharing.active:
        optimizer.state = defaultdict(dict, assembled(curvature))
    try:
        yield
    finally:
        optimizer.state = own


@contextmanager
def loading(optimizer: torch.optim.Optimizer, curvature: Curvature, state_dict: object) -> Iterator[None]:
    """Check a state that is loaded inside this context, and take over its metrics.

    It is checked after the hooks that run before loading, which may complete it. Its dtypes are restored before the
    hooks that run afterwards.

    Args:
        optimizer: the optimizer that loads.
        curvature: its metrics.
        state_dict: the state.

    Raises:
        ValueError: if the state does not fit; nothing is changed then.
    """
    if not isinstance(state_dict, dict):
        raise ValueError(f"state_dict must be that of an RNGD optimizer, got {state_dict!r:.200}")
    curvature.ranks.settle()
    found: dict[str, Any] = {}
    kept = declared(optimizer.param_groups, curvature)

    def before(_: object, state_dict: dict[str, Any]) -> None:
        saved = check(optimizer.param_groups, state_dict, declared(optimizer.param_groups, curvature, structures=False))
        _check_complete(curvature, state_dict, saved)
        for record in curvature.records.values():
            _check_layer(curvature, record, saved.get(record.key, {}))
        found.update(state_dict)

    def after(_: object) -> None:
        curvature.states = optimizer.state
        restore(optimizer.state, found, kept)
        curvature.recall()
        curvature.unload(curvature.sharing.owner)
        curvature.advance(int(optimizer.param_groups[0]["iteration"]))

    handles = [
        optimizer.register_load_state_dict_pre_hook(before),
        optimizer.register_load_state_dict_post_hook(after, prepend=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def declared(
    groups: Iterable[Mapping[str, Any]], curvature: Curvature, *, structures: bool = True
) -> dict[Tensor, dict[str, Kept]]:
    """Return the declared tensors of each parameter, in the order of the groups, with or without structures'."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    found = {
        parameter: {
            key: kept
            for owner in curvature.ownership.beside_layers
            for key, kept in owner.declares(tuple(parameter.shape)).items()
        }
        for parameter in parameters
    }
    for record in curvature.records.values():
        found[record.key] |= curvature.ownership.declares(record, structures=structures)
    return found


def check(
    groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any], kept: Mapping[Tensor, Mapping[str, Kept]]
) -> dict[Tensor, Mapping[str, Any]]:
    """Raise ValueError unless a state can be loaded into an optimizer; return what it has for each parameter.

    Args:
        groups: the groups of the optimizer.
        state_dict: the state to load.
        kept: the declared tensors of each parameter, in the order of the groups.

    Returns:
        The saved state by parameter.

    Raises:
        ValueError: if anything is missing or different; the message says what.
    """
    _check_groups(groups, state_dict)
    saved = state_dict["param_groups"]
    _check_states(state_dict["state"])
    _check_names(groups, saved)
    _check_shapes(groups, saved, state_dict["state"], kept)
    places = [place for group in saved for place in group["params"]]
    strange = [place for place in state_dict["state"] if place not in places]
    if strange:
        raise ValueError(f"state_dict has a state of parameter {strange[0]!r}, which is in none of its groups")
    pairs = zip(kept, places, strict=False)  # torch says so if there are more of either
    return {parameter: state_dict["state"].get(place, {}) for parameter, place in pairs}


def restore(
    states: MutableMapping[Tensor, dict[str, Any]],
    state_dict: Mapping[str, Any],
    kept: Mapping[Tensor, Mapping[str, Kept]],
) -> None:
    """Restore the saved dtypes: torch casts a state to the dtype of its parameter, but metrics have their own dtype.

    Args:
        states: the optimizer's states, by parameter.
        state_dict: the loaded state.
        kept: the declared tensors of each parameter, in the order of the groups.
    """
    places = [place for group in state_dict["param_groups"] for place in group["params"]]
    for place, (parameter, each) in zip(places, kept.items(), strict=True):
        if place in state_dict["state"]:
            states[parameter].update(moved(state_dict["state"][place], parameter, each))


def moved(saved: Mapping[str, Any], like: Tensor, kept: Mapping[str, Kept]) -> dict[str, Any]:
    """Return a copy of a parameter's saved state on its device; tensors for the host stay on the host.

    Args:
        saved: the saved tensors, in their own dtypes.
        like: the parameter.
        kept: the declared tensors of the parameter.
    """
    hosted = {key for key, each in kept.items() if each.on_host}
    found = {
        key: value.to("cpu" if key in hosted else like.device, copy=True) if isinstance(value, Tensor) else value
        for key, value in saved.items()
    }
    in_parts = {key for key, each in kept.items() if each.parted} if is_part(like) else set()
    return {
        key: parted(value, like) if key in in_parts else whole(value) if isinstance(value, Tensor) else value
        for key, value in found.items()
    }


def _check_complete(curvature: Curvature, state_dict: Mapping[str, Any], saved: Mapping[Tensor, Any]) -> None:
    """Raise ValueError if a state of an optimizer that has taken steps has nothing of any layer that is trained.

    `torch.distributed.checkpoint.load` leaves out what an optimizer does not have.

    Args:
        curvature: the metrics.
        state_dict: the state.
        saved: what it has for each parameter.

    Raises:
        ValueError: with what to do.
    """
    steps = max((group["iteration"] for group in state_dict["param_groups"]), default=0)
    states = [saved.get(record.key) or {} for record in curvature.records.values() if any(record.trainable())]
    if steps and states and not any({"updates", "exp_avg"} & state.keys() for state in states):
        raise ValueError(
            f"state_dict is of {steps} steps, but has no metric of any layer: torch.distributed.checkpoint loads only "
            "what an optimizer has, so call relfisher.expect(model, optimizer, metadata) before"
        )


def _check_layer(curvature: Curvature, record: Record, saved: Mapping[str, Any]) -> None:
    """Raise ValueError unless a layer can go on with what was saved of it; nothing is changed.

    Args:
        curvature: the metrics.
        record: of the layer.
        saved: its state.

    Raises:
        ValueError: with what is missing, or what differs.
    """
    ownership, layer, role = curvature.ownership, record.layer, record.role
    ownership.check(record, saved)
    if role is None or role.is_head is None or not ownership.holds_statistics(saved):
        return
    allowed = curvature.allowed({layer: replace(role, is_head=bool(saved["is_head"]))})[layer]
    if role.is_head != bool(saved["is_head"]) and not any(ownership.fits(layer, each, saved) for each in allowed):
        raise ownership.mismatch(record, allowed, saved)


def _check_groups(mine: Iterable[Mapping[str, Any]], state_dict: object) -> None:
    """Raise ValueError unless a state is from an RNGD optimizer.

    Args:
        mine: the groups of an optimizer.
        state_dict: the state to load.

    Raises:
        ValueError: if anything is missing; the message says what.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"state_dict must be that of an RNGD optimizer, got {type(state_dict).__name__} without groups"
        )
    given = state_dict["param_groups"]
    for saved in given if isinstance(given, list | tuple) else [given]:
        if not isinstance(saved, Mapping) or not isinstance(saved.get("params"), list):
            raise ValueError(f"state_dict must have a list of groups, each with its 'params', got {saved!r:.200}")
    for own, saved in zip(mine, given, strict=False):
        missing = sorted(own.keys() - saved.keys() - {"param_names"})
        if missing:
            names = ", ".join(map(repr, missing))
            raise ValueError(f"state_dict must be that of an RNGD optimizer, but its groups lack {names}")
        if saved["kind"] != own["kind"]:
            raise ValueError(
                f"state_dict has a group of the kind {saved['kind']!r} where this optimizer has one of the kind "
                f"{own['kind']!r}: load it into an optimizer with the same structures"
            )
        try:
            check_progress(saved)
        except (TypeError, ValueError) as error:
            raise ValueError(f"state_dict has a group that cannot go on: {error}") from None


def _check_states(states: object) -> None:
    """Raise ValueError unless the saved states are finite tensors by name, for each parameter."""
    if not isinstance(states, Mapping):
        raise ValueError(f"state_dict must have a state by parameter, got {states!r:.200}")
    for place, state in states.items():
        if not isinstance(state, Mapping):
            raise ValueError(f"the saved state of parameter {place} must be tensors by name, got {state!r:.200}")
        for key, value in state.items():
            if isinstance(value, Tensor) and value.is_floating_point() and not all_finite([held(value)]):
                raise ValueError(f"the saved {key} of parameter {place} must be finite, got NaN or infinite values")


def _check_names(mine: Iterable[Mapping[str, Any]], saved: Iterable[Mapping[str, Any]]) -> None:
    """Raise ValueError unless two lists of groups have the same parameter names; groups without names match any.

    Args:
        mine: the groups of an optimizer.
        saved: the groups of the state to load.

    Raises:
        ValueError: with the names that are missing on either side.
    """
    have = [name for group in mine for name in group["param_names"]]
    give = [name for group in saved for name in group.get("param_names", ())]
    if give and have != give:
        missing, unknown = [name for name in have if name not in give], [name for name in give if name not in have]
        raise ValueError(
            "state_dict does not match the parameters: "
            + (f"it lacks {', '.join(missing)}; " if missing else "")
            + (f"it has {', '.join(unknown)} in addition; " if unknown else "")
            + ("" if missing or unknown else "the order or the groups differ; ")
            + "load it into an optimizer of the same model"
        )


def _check_shapes(
    mine: Iterable[Mapping[str, Any]],
    saved: Iterable[Mapping[str, Any]],
    states: Mapping[Any, Mapping[str, Any]],
    wanted: Mapping[Tensor, Mapping[str, Kept]],
) -> None:
    """Raise ValueError unless the saved state of each parameter has the declared shapes.

    Args:
        mine: the groups of an optimizer.
        saved: the groups of the state to load.
        states: the state of each parameter, by its place in the saved groups, an index or a name.
        wanted: the declared tensors of each parameter.

    Raises:
        ValueError: with the name of the first parameter that has a tensor of another shape.
    """
    have = [pair for group in mine for pair in zip(group["param_names"], group["params"], strict=True)]
    places = [place for group in saved for place in group["params"]]
    for (name, parameter), place in zip(have, places, strict=False):
        for key, kept in wanted[parameter].items():
            tensor = states.get(place, {}).get(key)
            if tensor is not None and not isinstance(tensor, Tensor):
                raise ValueError(f"the saved {key} of {name!r} must be a tensor, got {tensor!r:.200}")
            if tensor is not None and tuple(tensor.shape) != kept.shape:
                raise ValueError(
                    f"state_dict does not match the parameters: the {key} of {name!r} has the shape "
                    f"{list(tensor.shape)}, but this optimizer needs {list(kept.shape)}"
                )
            low = kept.dtype == LOW and parameter.is_floating_point()
            if tensor is not None and (tensor.dtype == LOW) != low:
                raise ValueError(
                    f"state_dict does not match: the {key} of {name!r} is {tensor.dtype}, so that this optimizer needs "
                    f"state_dtype={LOW if tensor.dtype == LOW else None}"
                )
