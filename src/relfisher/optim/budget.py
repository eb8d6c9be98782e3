"""The bytes of a whole state, and a limit of them, into which the structures of the metrics are fitted."""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.observe import Role
from relfisher.optim.assignment import fitted, momentum_bytes, state_bytes
from relfisher.optim.binding import Binding
from relfisher.optim.fallback import precise
from relfisher.optim.leads import Lead, averaged
from relfisher.optim.ownership import Ownership
from relfisher.optim.record import Record
from relfisher.structures import Structure
from relfisher.validation import check_positive

__all__ = ["Beside", "Budget", "LimitError", "beside", "check_state_bytes", "fit_into", "numbers_beside"]

_ADAM = re.compile(r"(\d+(?:\.\d+)?) ?x adam")

#: Bytes, or a multiple of the bytes of Adam's two moments, such as "1x adam".
Limit = float | str

Groups = Sequence[Mapping[str, Any]]


class LimitError(ValueError):
    """The state of a model takes more bytes than it may."""


class Beside(NamedTuple):
    """The bytes of a state beside the metrics and their inverses: of averages, of momenta, and of AdamW's moments."""

    averaging: int
    momentum: int
    fallback: int


def check_state_bytes(given: object) -> None:
    """Raise ValueError or TypeError unless this is a limit of bytes, or None."""
    if isinstance(given, str):
        match = _ADAM.fullmatch(given)
        if match is None or float(match[1]) == 0:
            raise ValueError(f"state_bytes must be a number of bytes, or such as '1x adam', got {given!r}")
    elif given is not None:
        check_positive("state_bytes", given)


def beside(groups: Groups, place: Mapping[Layer, int], lead: Lead) -> Beside:
    """Return what a state has beside the metrics.

    Args:
        groups: the groups, each with its "params", "momentum" and "averaging".
        place: the layers with a metric, each with the index of its group.
        lead: how averages are kept; the momentum is kept alike.
    """
    averages, moments = _bytes_of_numbers(groups, place, lead)
    return Beside(
        sum(parameter.numel() * size for parameter, size in averages.items()),
        sum(momentum_bytes(layer, lead.dtype) for layer, own in place.items() if groups[own]["momentum"]),
        sum(parameter.numel() * size for parameter, size in moments.items()),
    )


def numbers_beside(groups: Groups, place: Mapping[Layer, int], lead: Lead) -> dict[Tensor, int]:
    """Return the bytes of average and AdamW's moments for a number of each parameter; arguments as for `beside`."""
    averages, moments = _bytes_of_numbers(groups, place, lead)
    every = [parameter for group in groups for parameter in group["params"]]
    return {parameter: averages.get(parameter, 0) + moments.get(parameter, 0) for parameter in every}


def _bytes_of_numbers(
    groups: Groups, place: Mapping[Layer, int], lead: Lead
) -> tuple[dict[Tensor, int], dict[Tensor, int]]:
    """Return the bytes for a number of averaged parameters, and those of parameters that AdamW trains."""
    covered = {id(parameter) for layer in place for parameter in layer.parameters}
    leading = [p for p in _trained(group for group in groups if group["averaging"]) if averaged(p)]
    rest = [p for p in _trained(groups) if id(p) not in covered]
    return {p: lead.dtype_for(p).itemsize for p in leading}, {p: 2 * precise(p).itemsize for p in rest}


def fit_into(
    given: Mapping[Layer, Sequence[Structure]],
    limit: Limit,
    groups: Groups,
    place: Mapping[Layer, int],
    lead: Lead,
) -> dict[Layer, Structure]:
    """Choose structures with which the whole state, but for a few scalars, takes at most so many bytes.

    Args:
        given: the structures that each layer with a metric may use, the best first and the smallest last.
        limit: the bytes.
        groups: the groups of the parameters.
        place: the index of each layer's group.
        lead: how averages are kept; the momentum is kept alike.

    Returns:
        One structure per layer.

    Raises:
        LimitError: if there are none; the message says how many bytes it takes at least.
    """
    adam = sum(2 * parameter.numel() * parameter.element_size() for parameter in _trained(groups))
    most = _bytes(limit, adam)
    others = beside(groups, {layer: place[layer] for layer in given}, lead)
    smallest = sum(state_bytes(layer, found[-1]) for layer, found in given.items())
    least = sum(others) + smallest
    if least > most:
        times = f" ({math.ceil(least / adam * 1000) / 1000}x adam)" if adam else ""
        raise LimitError(
            f"state_bytes must be at least {least}{times} for this model, got {limit!r}"
            + (f", which is {most}" if isinstance(limit, str) else "")
            + f": the average takes {others.averaging}, the momentum {others.momentum}, AdamW {others.fallback}, and "
            f"the smallest metrics {smallest}"
        )
    return fitted(given, most - sum(others))


class Budget:
    """The limit of an optimizer's state.

    Args:
        optimizer: the optimizer.
        binding: the places of its layers.
        limit: the bytes.
        lead: how averages are kept; the momentum is kept alike.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, binding: Binding, limit: Limit, lead: Lead) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._binding = binding
        self._limit = limit
        self._lead = lead

    def assigned(
        self,
        roles: Mapping[Layer, Role],
        records: Mapping[Layer, Record],
        allowed: Callable[[Mapping[Layer, Role]], Mapping[Layer, Sequence[Structure]]],
        ownership: Ownership,
        states: Mapping[Tensor, Mapping[str, Any]],
    ) -> dict[Layer, Structure]:
        """Return the structures of all layers, with those of layers that have one already as they are.

        Args:
            roles: the roles of layers that have no structure yet.
            records: the records of all layers.
            allowed: returns the structures that layers with some roles may use, as `choices`.
            ownership: the owners of the tensors in the layers' states.
            states: the states; layers with statistics, such as loaded ones, go on with the structure of these.

        Returns:
            One structure for each layer that is trained, also if it has yet to run.

        Raises:
            LimitError: if the state takes more bytes with any.
        """
        rest = [record for layer, record in records.items() if layer not in roles and not record.is_refused]
        unseen = {record.layer: Role(record.layer.own_response) for record in rest if record.structure is None}
        given = {record.layer: [record.structure] for record in rest if record.structure is not None}
        for layer, found in {**allowed(roles), **allowed(unseen)}.items():
            if records[layer].role is not None or any(parameter.requires_grad for parameter in layer.parameters):
                given[layer] = ownership.in_use(records[layer], found, states.get(records[layer].key, {}))
        optimizer = self._optimizer()
        assert optimizer is not None  # it is its optimizer that asks
        return fit_into(given, self._limit, optimizer.param_groups, self._binding.place, self._lead)


def _bytes(limit: Limit, adam: int) -> int:
    """Return a limit in bytes."""
    match = _ADAM.fullmatch(limit) if isinstance(limit, str) else None
    return int(limit) if match is None else int(float(match[1]) * adam)


def _trained(groups: Iterable[Mapping[str, Any]]) -> list[Tensor]:
    return [parameter for group in groups for parameter in group["params"] if parameter.requires_grad]
