"""Predict what each of several processes keeps, computes and sends if they share out the work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from relfisher.layers import Layer
from relfisher.optim.assignment import number_bytes
from relfisher.optim.exchange import Message
from relfisher.optim.sharing import Load, assigned, load_of
from relfisher.optim.tables import size
from relfisher.structures import Structure

__all__ = ["Shares", "shares"]


@dataclass(frozen=True)
class Shares:
    """What each of several processes does with `RNGD(model, replicate=False)`.

    Bytes are those that a process sends on average, in rings: 2 (N - 1) / N of a sum that all get, (N - 1) / N of one
    for a single process or of what is gathered from all.

    Attributes:
        world_size: the number of processes N.
        owners: the process that keeps the metric of a layer, by the layer's name.
        metric_bytes: the memory of the metrics, their inverses and the momentum, in the process with most of it.
        mean_bytes: the same on average.
        beside_bytes: the memory of the average and of AdamW: in each process in `DistributedDataParallel`, and shared
            out after `fully_shard`.
        refresh: the floating-point operations of a refresh of all its layers, for the process with most of them.
        mean_refresh: the same on average.
        gradients_sent: the bytes that `DistributedDataParallel` sends a step.
        steps_sent: the bytes that a step sends in addition.
        statistics_sent: the bytes that one update of all metrics sends in addition.
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

    def __str__(self) -> str:
        """Return what the busiest process does in a few lines."""
        kept = self.metric_bytes / (self.mean_bytes or 1)
        refresh = self.refresh / (self.mean_refresh or 1)
        sent = self.steps_sent / (self.gradients_sent or 1)
        return (
            f"{self.world_size} processes that share out the work: the busiest keeps "
            f"{size(self.metric_bytes, 'B', 1024)} of metrics and momentum ({kept:.2f} of the mean) and refreshes with "
            f"{size(self.refresh, 'FLOP')} ({refresh:.2f} of the mean);\n"
            f"each sends {size(self.steps_sent, 'B')} a step ({sent:.2f} of what the gradients take), and "
            f"{size(self.statistics_sent, 'B')} an update of all metrics"
        )


def shares(structures: Mapping[Layer, Structure], world_size: int, beside: int, gradients: int) -> Shares:
    """Return what each process does.

    Args:
        structures: the structures of all layers with a metric.
        world_size: the number of processes.
        beside: the bytes of the average and of AdamW.
        gradients: the bytes of all gradients.
    """
    loads = {layer: load_of(layer, structure) for layer, structure in structures.items()}
    owner, carried = assigned(loads, [Load()] * world_size)
    totals = sum(
        math.prod(shape) * number_bytes(layer)
        for layer, structure in structures.items()
        for shape in structure.shapes(layer.shape).values()
    )
    others = (world_size - 1) / world_size
    flag, counts = 4, 8 * len(structures)
    return Shares(
        world_size,
        {layer.name: rank for layer, rank in owner.items()},
        metric_bytes=max(load.bytes for load in carried),
        mean_bytes=sum(load.bytes for load in carried) / world_size,
        beside_bytes=beside,
        refresh=max(load.refresh for load in carried),
        mean_refresh=sum(load.refresh for load in carried) / world_size,
        gradients_sent=2 * others * gradients,
        steps_sent=Message(owner, world_size).sent() + 2 * others * flag,
        statistics_sent=others * totals + 2 * others * counts,
    )
