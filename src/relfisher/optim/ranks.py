"""Several processes that train one model together: what they find out, decide and sum in common.

Each process sees a part of the batch, and holds the whole model, as with `DistributedDataParallel`, or parts of its
parameters, as with `fully_shard`. Gradients are averaged before the optimizer steps. The metric needs the same: the
statistics of all samples, and their number. Collectives follow a schedule that every process knows: one of a single
number per step, one more while the role of a layer is unknown, and two where statistics are due; and, for parameters in
parts, one for all gradients, and one for each whole weight that statistics need.
"""

from __future__ import annotations

import pickle
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from relfisher.layers import Layer, Rows
from relfisher.observe import Observer, Reading, Role, messages
from relfisher.optim.health import HealthWarning
from relfisher.optim.owners import modules_in_memory
from relfisher.optim.partition import mesh_of
from relfisher.responses import UnitResponse
from relfisher.shards import made_whole, reshard
from relfisher.structures import Statistics

__all__ = ["Ranks"]

_T = TypeVar("_T")


def _may_be_several() -> bool:
    """Return whether this process is one of several that know each other."""
    return distributed.is_available() and distributed.is_initialized()


class Ranks:
    """The processes that train a model together: those of `DistributedDataParallel`, or those that hold parts of it.

    Args:
        model: the model.

    Attributes:
        together: whether several processes train the model, or hold parts of it; None before the first step.

    Raises:
        ValueError: if processes hold parts of the parameters in another way than after `fully_shard`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._mesh = mesh_of(model)
        self._parallel: weakref.ref[DistributedDataParallel] | None = None
        self._held: dict[Layer, Role] = {}  # roles that wait for other processes
        self.together: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the model, and the roles that wait; a copy looks for processes of its own."""
        return {"model": self._model(), "held": self._held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on with the copied model."""
        self.__init__(state["model"])  # type: ignore[misc]  # the processes are found anew
        self._held = state["held"]

    def join(self, parts: Callable[[], list[str]]) -> bool:
        """Return whether several processes train the model.

        Args:
            parts: returns what must be the same in all of them: what layers train, and which have statistics.

        Raises:
            ValueError: if it is not, if processes hold parts of the weights, or if the step is inside of
                `DistributedDataParallel.join`.
        """
        if self.together is None and not _may_be_several():
            return False
        model = self._model()
        self.settle()
        if self.together is None and model is not None:
            if self.is_late():
                raise ValueError(
                    "the model was sharded after the optimizer was made, which has other parameters: call fully_shard "
                    "first"
                )
            self.together = self._found(model, parts)
        parallel = None if self._parallel is None else self._parallel()
        if self.together and getattr(getattr(parallel, "_join_config", None), "enable", False):
            raise ValueError(
                "inside of DistributedDataParallel.join, RNGD cannot step: give all processes equally many steps"
            )
        return bool(self.together)

    @property
    def in_parts(self) -> bool:
        """Whether each process holds a part of the parameters."""
        return self._mesh is not None

    def is_late(self) -> bool:
        """Return whether the model was sharded since this was made, before the first step."""
        if self.together is not None or not _may_be_several():
            return False
        model = self._model()
        return model is not None and bool(mesh_of(model) != self._mesh)

    def look_again(self) -> None:
        """Find out anew which processes hold parts of the model."""
        model = self._model()
        self._mesh = None if model is None else mesh_of(model)

    def settle(self) -> None:
        """Let the model have the parts that are optimized, also if a pass has left its parameters whole."""
        model = self._model()
        if self.in_parts and model is not None:
            reshard(model)

    def least(self, numbers: Sequence[int]) -> list[int]:
        """Return the least of each number over all processes."""
        least = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        distributed.all_reduce(least, distributed.ReduceOp.MIN, self.group)
        found: list[int] = least.tolist()
        return found

    def roles(self, new: dict[Layer, Role], unknown: Sequence[Layer], layers: Iterable[Layer]) -> dict[Layer, Role]:
        """Return the roles that any process has found out, and that all can use.

        A layer that any process refuses is refused. Otherwise, processes that have not seen the layer are told its
        role. Where that cannot be told, since its response has parameters or its form is not known before it runs, the
        role waits until all have seen the layer.

        Args:
            new: the roles that this process has found out.
            unknown: the layers whose roles were not returned so far.
            layers: all layers.
        """
        self._held |= {layer: self._kept(layer, role) for layer, role in new.items() if layer in unknown}
        if not unknown or not any(self.least([-int(layer in self._held) for layer in unknown])):
            return {}
        by_name = {layer.name: layer for layer in layers}
        several = self.told({layer.name: _told(layer, role) for layer, role in self._held.items()})
        agreed = {}
        for name in dict.fromkeys(name for each in several for name in each):
            found = [each[name] for each in several if name in each]
            first = next((told for told in found if told.refused is not None), found[0])
            if first.refused is None and len(found) < len(several) and first.response is None:
                continue
            layer = by_name[name]
            own = self._held.pop(layer, None)
            if own is None:
                own = Role(layer.own_response if first.response is None else first.response)
            following = by_name.get(first.following or "")  # processes may have seen others, such as other experts
            agreed[layer] = replace(
                own,
                following=following,
                is_head=first.is_head,
                reads_input=first.reads_input,
                refused=first.refused,
            )
        return agreed

    def pending(self, observer: Observer, owner: Mapping[Layer, int]) -> Mapping[Layer, Rows | Statistics]:
        """Return the samples since the last step, of all processes; see `statistics`."""
        if not self.together:
            return observer.take()
        # In the same order in all processes: that in which roles became known.
        readings = {layer: each for layer, each in observer.readings.items() if observer.is_due(layer)}
        following = (observer.roles[layer].following for layer, each in readings.items() if each.waits)
        with made_whole(layer.module for layer in following if layer is not None):
            return self.statistics(observer.take(), readings, owner)

    def statistics(
        self,
        own: Mapping[Layer, Rows | Statistics],
        readings: Mapping[Layer, Reading],
        owner: Mapping[Layer, int],
    ) -> Mapping[Layer, Rows | Statistics]:
        """Return the statistics of the samples of all processes; only their number, for layers of other owners.

        Args:
            own: the samples or statistics of this process.
            readings: how statistics are made, for all layers whose statistics are due.
            owner: the process that needs the statistics of a layer; for others, all need them.
        """
        if not readings:
            return own
        found = [_summed(layer, own.get(layer), reading) for layer, reading in readings.items()]
        counts = torch.tensor([each.samples for each in found], device=self.device)
        distributed.all_reduce(counts, group=self.group)
        totals: dict[int | None, list[Tensor]] = {}
        for layer, each in zip(readings, found, strict=True):
            totals.setdefault(owner.get(layer), []).extend(each.totals.values())
        sums = [(own_totals, self._summed(own_totals, rank)) for rank, own_totals in totals.items()]
        for own_totals, (flat, work) in sums:
            work.wait()
            for total, part in zip(own_totals, torch.split(flat, [total.numel() for total in own_totals]), strict=True):
                total.copy_(part.view_as(total))
        numbers = zip(readings, found, counts.tolist(), strict=True)
        return {layer: each._replace(samples=count) for layer, each, count in numbers if count}

    def _summed(self, tensors: Sequence[Tensor], owner: int | None) -> tuple[Tensor, Any]:
        """Start to sum tensors over all processes, in one message; return the sums, and what to wait for."""
        flat = torch.cat([tensor.flatten().to(self.device) for tensor in tensors])
        if owner is None:
            return flat, distributed.all_reduce(flat, group=self.group, async_op=True)
        return flat, distributed.reduce(flat, group_dst=owner, group=self.group, async_op=True)

    def _kept(self, layer: Layer, role: Role) -> Role:
        """Return a role, refused if its response has parameters that are whole only during a pass."""
        if not self.in_parts or role.refused is not None or not _has_tensors(role.response):
            return role
        refused = {layer: f"its response, {role.response}, has parameters in parts, which are whole only in a pass"}
        messages.tell_refused(refused, messages.UncoveredWarning)
        return replace(role, refused=refused[layer])

    @property
    def group(self) -> distributed.ProcessGroup | None:
        """The group of the model's `DistributedDataParallel`, or of those that hold its parts."""
        if self._mesh is not None:
            return self._mesh.get_group() if self._mesh.ndim == 1 else None
        parallel = None if self._parallel is None else self._parallel()
        return None if parallel is None else parallel.process_group

    @property
    def world(self) -> int:
        """The number of processes."""
        return distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """The rank of this process."""
        return distributed.get_rank(self.group)

    @property
    def device(self) -> torch.device:
        """The device of what the processes send each other."""
        model = self._model()
        return torch.device("cpu") if model is None else next(model.parameters()).device

    def told(self, own: _T) -> list[_T]:
        """Return the objects of all processes, by rank."""
        others = [own] * self.world
        distributed.all_gather_object(others, own, self.group)
        return others

    def _found(self, model: nn.Module, parts: Callable[[], list[str]]) -> bool:
        """Return whether several processes train the model, or hold parts of it."""
        parallel = None if self.in_parts else _parallel(model)
        if parallel is None and not self.in_parts:
            if (count := distributed.get_world_size()) > 1:
                message = (
                    f"the model is in no DistributedDataParallel, so that each of {count} processes trains a model of "
                    "its own, with a metric of its own samples"
                )
                warnings.warn(message, HealthWarning, stacklevel=5)
            return False
        self._parallel = None if parallel is None else weakref.ref(parallel)
        if self.world == 1:
            return self.in_parts
        own = parts()
        for other in self.told(own):
            if other != own:
                odd = ", ".join(sorted(set(own) ^ set(other))) or "the same order"
                raise ValueError(
                    f"all processes must start with the same layers and state, but not all have {odd}; instead of "
                    "ZeroRedundancyOptimizer, which gives them different layers, use fully_shard"
                )
        return True


def _parallel(model: nn.Module) -> DistributedDataParallel | None:
    """Return the wrapper that a model is, or is in; it is looked for in memory, since it may be made after us."""
    if isinstance(model, DistributedDataParallel):
        return model
    own = set(model.parameters())
    wrappers = modules_in_memory(DistributedDataParallel)
    return next((wrapper for wrapper in wrappers if not own.isdisjoint(wrapper.parameters())), None)


def _summed(layer: Layer, batch: Rows | Statistics | None, reading: Reading) -> Statistics:
    """Return the statistics of a batch, which may have no samples."""
    if batch is None:
        shapes = reading.structure.shapes(layer.shape)
        zeros = {
            name: torch.zeros(size, dtype=layer.dtype, device=layer.weight.device) for name, size in shapes.items()
        }
        return Statistics(zeros, 0)
    return reading.statistics(layer, batch) if isinstance(batch, Rows) else batch


class _Told(NamedTuple):
    """A role as other processes read it: with the name of the layer that follows, without a response that has state."""

    response: UnitResponse | None
    following: str | None
    is_head: bool | None
    reads_input: bool
    refused: str | None


def _told(layer: Layer, role: Role) -> _Told:
    following = None if role.following is None else role.following.name
    response = None if layer.operation or not _is_plain(role.response) else role.response
    return _Told(response, following, role.is_head, role.reads_input, role.refused)


def _is_plain(response: UnitResponse) -> bool:
    """Return whether a copy of a response is as good as itself."""
    if _has_tensors(response):
        return False
    try:
        pickle.dumps(response)
    except (AttributeError, TypeError, pickle.PicklingError):
        return False
    return True


def _has_tensors(value: object) -> bool:
    """Return whether a response, or what it is made of, has tensors or modules."""
    if isinstance(value, Tensor | nn.Module):
        return True
    if isinstance(value, type | ModuleType) or not hasattr(value, "__dict__"):
        return isinstance(value, tuple) and any(map(_has_tensors, value))
    return any(map(_has_tensors, vars(value).values()))
