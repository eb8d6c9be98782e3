"""Predict what each of several processes keeps, computes and sends if they share out the work."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from relfisher.layers import Layer, keepers
from relfisher.optim.assignment import number_bytes
from relfisher.optim.exchange import Message
from relfisher.optim.record import is_computed
from relfisher.optim.sharing import Load, assigned, load_of
from relfisher.optim.tables import size
from relfisher.structures import Structure

__all__ = ["Passes", "Shares", "shares"]


@dataclass(frozen=True)
class Shares:
    """What each of several processes does with `RNGD(model, replicate=False)`, or by default after `fully_shard`.

    Bytes are those that a process sends on average, in rings: 2 (N - 1) / N of a sum that all get, (N - 1) / N of one
    for a single process or of what is gathered from all.

    Attributes:
        world_size: the number of processes N.
        owners: the process that keeps the metric of a layer, by the layer's name.
        metric_bytes: the memory of the metrics, their inverses and the momentum, in the process with most of it.
        mean_bytes: the same on average.
        beside_bytes: the memory of the average and of AdamW, in the process with most of it.
        refresh: the floating-point operations of a refresh of all its layers, for the process with most of them.
        mean_refresh: the same on average.
        gradients_sent: the bytes that `DistributedDataParallel` sends a step, or `fully_shard` at most, which gathers
            the parameters for the forward and the backward pass.
        steps_sent: the bytes that a step sends in addition.
        statistics_sent: the bytes that one update of all metrics sends in addition.
        mesh: the shape of the mesh of `fully_shard`; None for `DistributedDataParallel`.
    """

    world_size: int
    owners: Mapping[str, int]
    metric_bytes: int
    mean_bytes: float
    beside_bytes: int
    refresh: int
    mean_refresh: float
    gradients_sent: float
    steps_sent: float
    statistics_sent: float
    mesh: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """Return what the busiest process does in a few lines."""
        kept = self.metric_bytes / (self.mean_bytes or 1)
        refresh = self.refresh / (self.mean_refresh or 1)
        sent = self.steps_sent / (self.gradients_sent or 1)
        return (
            f"{self.world_size} processes that share out the work: the busiest keeps "
            f"{size(self.metric_bytes, 'B', 1024)} of metrics and momentum ({kept:.2f} of the mean) and refreshes with "
            f"{size(self.refresh, 'FLOP')} ({refresh:.2f} of the mean);\n"
            f"each sends {size(self.steps_sent, 'B')} a step ({sent:.2f} of what {self._others} take), and "
            f"{size(self.statistics_sent, 'B')} an update of all metrics"
        )

    @property
    def _others(self) -> str:
        return "the gradients" if self.mesh is None else "parameters and gradients"


class Passes(NamedTuple):
    """What processes hold and send of the parameters themselves.

    Args:
        trained: the trained parameters.
        beside: the bytes of the average and of AdamW for a number of each parameter.
        following: the modules whose weights statistics need.
    """

    trained: Sequence[Tensor]
    beside: Mapping[Tensor, int]
    following: Sequence[nn.Module]


def shares(
    structures: Mapping[Layer, Structure],
    world_size: int,
    passes: Passes,
    mesh: tuple[int, ...] | None = None,
    state_dtype: torch.dtype | None = None,
) -> Shares:
    """Return what each process does.

    Args:
        structures: the structures of all layers with a metric.
        world_size: the number of processes.
        passes: what they hold and send of the parameters.
        mesh: the shape of the mesh of processes that hold parts of the parameters; None if each holds all of them.
        state_dtype: the dtype of the momentum; None for that of the metrics.
    """
    loads = {layer: load_of(layer, structure, state_dtype) for layer, structure in structures.items()}
    owner, carried = assigned(loads, [Load()] * world_size)
    totals = sum(
        math.prod(shape) * number_bytes(layer)
        for layer, structure in structures.items()
        for shape in structure.shapes(layer.shape).values()
    )
    others = (world_size - 1) / world_size
    flag, counts = 4, 8 * len(structures)
    gradients = sum(_bytes(parameter) for parameter in passes.trained)
    returned = {layer for layer in owner if mesh is not None and not is_computed(layer)}
    parts = _Parts(mesh or (1,))
    return Shares(
        world_size,
        {layer.name: rank for layer, rank in owner.items()},
        metric_bytes=max(load.bytes for load in carried),
        mean_bytes=sum(load.bytes for load in carried) / world_size,
        beside_bytes=sum(parts.largest(parameter) * each for parameter, each in passes.beside.items()),
        refresh=max(load.refresh for load in carried),
        mean_refresh=sum(load.refresh for load in carried) / world_size,
        gradients_sent=2 * others * gradients if mesh is None else parts.passes(passes.trained),
        steps_sent=Message(owner, world_size, returned).sent()
        + 2 * others * flag
        + others * parts.exchanged(returned)
        + parts.computed(layer for layer in owner if layer not in returned),
        statistics_sent=others * totals + 2 * others * counts + parts.gathered(_own(passes.following)),
        mesh=mesh,
    )


class _Parts:
    """What processes send that hold rows of all parameters; nothing if there is but one part.

    Args:
        mesh: the number of processes with parts, maybe after the number of groups of these with the same parts.
    """

    def __init__(self, mesh: tuple[int, ...]) -> None:
        self._count, self._copies = mesh[-1], math.prod(mesh[:-1])
        self._others = (self._count - 1) / self._count

    def largest(self, parameter: Tensor) -> int:
        """Return the numbers of the largest part of a parameter."""
        rows = len(parameter) if parameter.ndim else 1
        return -(-rows // self._count) * (parameter.numel() // max(rows, 1))

    def gathered(self, parameters: Iterable[Tensor]) -> float:
        """Return the bytes that a process sends for all to have whole parameters, whose parts are made equal."""
        sizes = (self.largest(parameter) * parameter.element_size() for parameter in parameters)
        return self._others * self._count * sum(sizes)

    def passes(self, trained: Sequence[Tensor]) -> float:
        """Return the bytes of a forward and a backward pass, which both gather, and of the sums of gradients."""
        between = 2 * (self._copies - 1) / self._copies * sum(map(_bytes, trained)) / self._count
        return 3 * self.gathered(trained) + between

    def exchanged(self, layers: Iterable[Layer]) -> float:
        """Return the mean bytes of the parts of gradients that owners get, and of those of steps that they return."""
        moving = [parameter for layer in layers for parameter in layer.parameters if parameter.requires_grad]
        steps = sum(parameter.numel() * max(parameter.element_size(), 4) for parameter in moving)
        return sum(map(_bytes, moving)) / (self._count * self._copies) + steps / self._count

    def computed(self, layers: Iterable[Layer]) -> float:
        """Return the bytes of the gradients and, twice, of the parameters from which matrices are computed."""
        if self._count == 1:
            return 0.0
        found = list(layers)
        moving = [parameter for layer in found for parameter in layer.parameters if parameter.requires_grad]
        values = [parameter for layer in found for parameter in _own(keepers(layer.module))]
        return self.gathered(moving) + 2 * self.gathered(values)


def _own(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Return the parameters that modules have themselves, each once."""
    return list({parameter for module in modules for parameter in module.parameters(recurse=False)})


def _bytes(parameter: Tensor) -> int:
    return parameter.numel() * parameter.element_size()
