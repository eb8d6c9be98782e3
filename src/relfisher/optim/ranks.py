"""Several processes that train one model together: what they find out, decide and sum in common.

Each process of `DistributedDataParallel` holds the whole model and sees a part of the batch. Gradients are averaged
before the optimizer steps. The metric needs the same: the statistics of all samples, and their number. Collectives
follow a schedule that every process knows: one of a single number per step, one more while the role of a layer is
unknown, and two where statistics are due.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.utils import get_total_norm

from relfisher.layers import Layer, Rows
from relfisher.observe import Reading, Role
from relfisher.optim.health import HealthWarning
from relfisher.structures import Statistics

__all__ = ["Ranks", "check_whole"]

_T = TypeVar("_T")

# Norms in processes that train one model differ by rounding only, if at all.
_SAME = 1e-4


class Ranks:
    """The processes that train a model together.

    They are those of the model's `DistributedDataParallel`, or else of the default group, if all of them have the same
    weights and, at the first step, the same gradients. Otherwise each process trains a model of its own.

    Args:
        model: the model.

    Attributes:
        together: whether several processes train the model; None as long as that is not known.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.together: bool | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what is known, and the model."""
        return {**vars(self), "_model": self._model()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on with the copied model."""
        vars(self).update({**state, "_model": weakref.ref(state["_model"])})

    def join(self, names: Sequence[str]) -> bool:
        """Return whether several processes train the model; the first steps find it out.

        Args:
            names: the names of its layers.

        Raises:
            ValueError: if processes have different layers, or parts of the weights.
        """
        model = self._model()
        if self.together is None and model is not None and distributed.is_available() and distributed.is_initialized():
            check_whole(model)
            self.together = self._found(list(names), list(model.parameters()))
        return bool(self.together)

    def least(self, numbers: Sequence[int]) -> list[int]:
        """Return the least of each number over all processes."""
        least = torch.tensor(numbers, dtype=torch.int32, device=self._device)
        distributed.all_reduce(least, distributed.ReduceOp.MIN, self._group)
        found: list[int] = least.tolist()
        return found

    def roles(self, new: dict[Layer, Role], unknown: Sequence[Layer], layers: Iterable[Layer]) -> dict[Layer, Role]:
        """Return the roles that any process has found out, the same in all.

        A layer that any process refuses is refused. Otherwise the first process that knows a role tells the others.

        Args:
            new: the roles that this process has found out.
            unknown: the layers whose roles were not returned so far.
            layers: all layers.
        """
        if not self.together:
            return new
        if not unknown or not any(self.least([-int(layer in new) for layer in unknown])):
            return {}
        by_name = {layer.name: layer for layer in layers}
        own = {layer.name: _told(new[layer]) for layer in unknown if layer in new}
        found: dict[str, tuple[Role, str | None]] = {}
        for each in self._gathered(own):
            found |= {name: told for name, told in each.items() if name not in found or told[0].refused is not None}
        return {
            by_name[name]: replace(role, following=by_name.get(following or ""))
            for name, (role, following) in found.items()
        }

    def statistics(
        self, own: Mapping[Layer, Rows | Statistics], readings: Mapping[Layer, Reading]
    ) -> Mapping[Layer, Rows | Statistics]:
        """Return the statistics of the samples of all processes.

        Args:
            own: the samples or statistics of this process.
            readings: how statistics are made, for all layers whose statistics are due.
        """
        if not self.together or not readings:
            return own
        found = [_summed(layer, own.get(layer), reading) for layer, reading in readings.items()]
        counts = torch.tensor([each.samples for each in found], device=self._device)
        distributed.all_reduce(counts, group=self._group)
        totals = [total for each in found for total in each.totals.values()]
        flat = torch.cat([total.flatten().to(self._device) for total in totals])
        distributed.all_reduce(flat, group=self._group)
        for total, part in zip(totals, torch.split(flat, [total.numel() for total in totals]), strict=True):
            total.copy_(part.view_as(total))
        numbers = zip(readings, found, counts.tolist(), strict=True)
        return {layer: each._replace(samples=count) for layer, each, count in numbers if count}

    @property
    def _group(self) -> distributed.ProcessGroup | None:
        """The group of the model; None for the default group."""
        model = self._model()
        return model.process_group if isinstance(model, nn.parallel.DistributedDataParallel) else None

    @property
    def _device(self) -> torch.device:
        model = self._model()
        return torch.device("cpu") if model is None else next(model.parameters()).device

    def _gathered(self, own: _T) -> list[_T]:
        """Return the objects of all processes, by rank."""
        others = [own] * distributed.get_world_size(self._group)
        distributed.all_gather_object(others, own, self._group)
        return others

    def _found(self, names: list[str], parameters: list[Tensor]) -> bool | None:
        """Return whether all processes train one model; None if their gradients do not show it yet."""
        count = distributed.get_world_size(self._group)
        if count == 1:
            return False
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        own = names, [float(get_total_norm(each)) for each in (parameters, gradients)]
        others = self._gathered(own)
        for other, _ in others:
            if other != names:
                odd = ", ".join(sorted(set(names) ^ set(other)))
                raise ValueError(f"all processes must train the same layers, but not all of them have {odd}")
        sizes = [each for _, each in others]
        if not all(math.isfinite(size) for each in sizes for size in each) or not any(each[1] for each in sizes):
            return None
        same = all(math.isclose(a, b, rel_tol=_SAME) for each in sizes for a, b in zip(each, sizes[0], strict=True))
        if not same:
            message = (
                f"{count} processes have different weights or gradients, so that each trains a model of its own: to "
                "train one model, wrap it in DistributedDataParallel, or average the gradients before the step"
            )
            warnings.warn(message, HealthWarning, stacklevel=5)
        return same


def _summed(layer: Layer, batch: Rows | Statistics | None, reading: Reading) -> Statistics:
    """Return the statistics of a batch, which may have no samples."""
    if batch is None:
        shapes = reading.structure.shapes(layer.shape)
        zeros = {
            name: torch.zeros(size, dtype=layer.dtype, device=layer.weight.device) for name, size in shapes.items()
        }
        return Statistics(zeros, 0)
    return reading.statistics(layer, batch) if isinstance(batch, Rows) else batch


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if processes hold parts of the model's weights: the metric needs all of a layer."""
    kinds = ("DTensor", "FlatParameter")  # of fully_shard and tensor parallelism, of FullyShardedDataParallel
    parts = (name for name, each in model.named_parameters() if type(each).__name__ in kinds)
    found = next(parts, None)
    if found is None and any(type(each).__name__ == "FullyShardedDataParallel" for each in model.modules()):
        found = "its FullyShardedDataParallel"
    if found is not None:
        raise ValueError(
            "model must have whole weights in each process, as with DistributedDataParallel; fully_shard, "
            f"FullyShardedDataParallel and tensor parallelism leave parts of them: {found}"
        )


def _told(role: Role) -> tuple[Role, str | None]:
    """Return a role as other processes can read it: with the name of the layer that follows."""
    return replace(role, following=None), None if role.following is None else role.following.name
