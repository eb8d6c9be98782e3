"""Work that is shared out between processes: each layer has an owner, which keeps its metric and computes its step.

The owner of a layer has its metric, the factors of it, the momentum, and what the step rule keeps; the others have none
of these. Owners follow from the names, shapes and structures of the layers, which are the same in all processes, so
that nothing has to be sent for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.optim.assignment import momentum_bytes, state_bytes
from relfisher.optim.events import Events
from relfisher.optim.exchange import Message, SharedRule
from relfisher.optim.ranks import Ranks
from relfisher.optim.record import Record, is_computed
from relfisher.optim.routes import from_owners
from relfisher.optim.rules import StepRule
from relfisher.shards import held
from relfisher.structures import Structure
from relfisher.validation import check_bool

__all__ = ["Load", "Sharing", "assigned", "check_replicate", "load_of"]


class Load(NamedTuple):
    """What layers cost their owner.

    Attributes:
        bytes: the memory of metrics, their factors and the momentum.
        refresh: the floating-point operations of a refresh of all.
        sent: the bytes of their steps.
    """

    bytes: int = 0
    refresh: int = 0
    sent: int = 0

    def plus(self, other: Load) -> Load:
        """Return the sum."""
        return Load(*(one + two for one, two in zip(self, other, strict=True)))


def load_of(layer: Layer, structure: Structure, state_dtype: torch.dtype | None) -> Load:
    """Return what a layer with a structure costs its owner, with its momentum in a dtype, or in that of its metric."""
    kept = state_bytes(layer, structure) + momentum_bytes(layer, state_dtype)
    return Load(kept, structure.cost(layer.shape).refresh, momentum_bytes(layer))


def assigned(loads: Mapping[Layer, Load], so_far: Sequence[Load]) -> tuple[dict[Layer, int], list[Load]]:
    """Return the owners of layers, and what each process has then.

    The largest layers come first, each to the process that then has the least: the rule of the longest processing time
    (Graham 1969). A process has as much as the largest of its shares of all memory, all refreshes and all steps.

    Args:
        loads: the layers to share out, in any order.
        so_far: what each process has already.
    """
    whole = Load(*(max(sum(each), 1) for each in zip(*loads.values(), *so_far, strict=True)))

    def share(load: Load) -> tuple[float, float]:
        shares = [own / every for own, every in zip(load, whole, strict=True)]
        return max(shares), sum(shares)

    found, carried = {}, list(so_far)
    named = sorted(loads, key=lambda layer: layer.name)
    for layer in sorted(named, key=lambda layer: share(loads[layer]), reverse=True):
        with_it = [own.plus(loads[layer]) for own in carried]
        found[layer] = least = min(range(len(carried)), key=lambda rank: share(with_it[rank]))
        carried[least] = with_it[least]
    return found, carried


def check_replicate(replicate: bool | None, rule: StepRule) -> bool | None:
    """Return whether work is replicated, for a step rule; see `Sharing`.

    Raises:
        ValueError: if the steps of a layer depend on other layers, and work is to be shared out.
        TypeError: if it is neither a bool nor None.
    """
    if replicate is not None:
        check_bool("replicate", replicate)
    if rule.is_layerwise:
        return replicate
    if replicate is False:
        raise ValueError(
            f"replicate must be True or None for {type(rule).__name__}, unless it declares is_layerwise = True: that "
            "the step of a layer depends on no other layer"
        )
    return True


class Sharing:
    """Which process owns which layer; none is owned where all processes do all of the work.

    Args:
        ranks: the processes.
        replicate: True if each process keeps and computes everything, False if the work is shared out, and None to
            share it out where processes hold parts of the parameters.
        state_dtype: the dtype of the momentum; None for that of the metric.

    Attributes:
        owner: the process that owns a layer, by its rank.
    """

    def __init__(self, ranks: Ranks, replicate: bool | None, state_dtype: torch.dtype | None = None) -> None:
        self.owner: dict[Layer, int] = {}
        self._ranks = ranks
        self._replicate = replicate
        self._state_dtype = state_dtype
        self._loads: list[Load] = []
        self._form: Message | None = None
        self._returned: dict[Layer, int] | None = None

    @property
    def wanted(self) -> bool:
        """Whether the work is shared out if several processes train the model."""
        return self._ranks.in_parts if self._replicate is None else not self._replicate

    @property
    def active(self) -> bool:
        """Whether the work is shared out."""
        return self.wanted and bool(self._ranks.together) and self._ranks.world > 1

    def owns(self, layer: Layer) -> bool:
        """Return whether this process keeps the metric of a layer; all do if the work is not shared out."""
        owner = self.owner.get(layer)
        return owner is None or owner == self._ranks.rank

    @property
    def returned(self) -> dict[Layer, int]:
        """The owners of layers of which each process holds a part, and gets its part of the steps.

        Of other layers, all processes get whole steps; also of those whose matrix is computed from parameters, for
        which all of them must be made whole.
        """
        if self._returned is None:
            layers = self.owner if self._ranks.in_parts else ()
            self._returned = {layer: self.owner[layer] for layer in layers if not is_computed(layer)}
        return self._returned

    def parts(self, steps: Sequence[tuple[Record, Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Return what this process holds of the parameters of layers, and its changes.

        Args:
            steps: of all `returned` layers that move, with the changes of their matrices in their owners.
        """
        if not steps:
            return [], []
        found: list[tuple[Tensor, Tensor | None, int]] = []
        for record, step in steps:
            moving, owner = record.moving(), self.owner[record.layer]
            own = record.whole_changes(step) if owner == self._ranks.rank else [None for _ in moving]
            found += [(p, change, owner) for p, change in zip(moving, own, strict=True) if p is not None]
        parameters, changes, owners = zip(*found, strict=True)
        return [held(p) for p in parameters], from_owners(changes, parameters, owners, self._ranks.group)

    def rule(self, rule: StepRule, events: Events) -> StepRule:
        """Return a step rule that takes the steps of all layers, also of those that other processes own.

        Args:
            rule: the rule.
            events: what happened to the layers that this process owns; counts what happened to all.
        """
        if not self.active:
            return rule
        if self._form is None:
            self._form = Message(self.owner, self._ranks.world, self.returned)
        return SharedRule(rule, self._ranks, self._form, events)

    def assign(self, structures: Mapping[Layer, Structure]) -> None:
        """Choose owners of the layers that have none yet.

        Raises:
            ValueError: if the layers have owners among another number of processes.
        """
        lonely = {layer: each for layer, each in structures.items() if layer not in self.owner}
        new = {layer: load_of(layer, each, self._state_dtype) for layer, each in lonely.items()}
        world, self._form, self._returned = self._ranks.world, None, None
        self._loads = self._loads or [Load()] * world
        if len(self._loads) != world:
            raise ValueError(
                f"this optimizer is a copy of one that {len(self._loads)} processes share out between them, which "
                f"{world} cannot go on with: load the state_dict() of that one into a new one"
            )
        found, self._loads = assigned(new, self._loads)
        self.owner |= {layer: found[layer] for layer in new}  # in the order of the model, as batches are

    def forget(self, layer: Layer) -> None:
        """Let a layer that has no metric after all have no owner."""
        self.owner.pop(layer, None)
        self._form = self._returned = None

    def end(self) -> None:
        """Let no layer have an owner."""
        self.owner, self._loads, self._form, self._returned = {}, [], None, None
