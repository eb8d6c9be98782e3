"""Predict the cost of a run before it starts, and how each parameter will be trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.layers import Layer
from relfisher.observe import Responses
from relfisher.optim.assignment import candidates
from relfisher.optim.assignment import state_bytes as bytes_of
from relfisher.optim.budget import beside, check_state_bytes, fit_into, numbers_beside
from relfisher.optim.groups import names_of
from relfisher.optim.leads import Lead
from relfisher.optim.options import MetricOptions
from relfisher.optim.renamed import reject
from relfisher.optim.rounding import check_state_dtype
from relfisher.optim.shares import Passes, Shares, shares
from relfisher.optim.surveying import surveyed
from relfisher.optim.tables import size, table
from relfisher.responses import Response
from relfisher.structures import Structure
from relfisher.validation import check_integer, check_interval

__all__ = ["Coverage", "LayerPlan", "ParameterCoverage", "Plan", "coverage", "plan"]


@dataclass(frozen=True)
class Choice:
    """A structure and its cost for one layer.

    Attributes:
        structure: the name of the structure.
        bytes: the memory of the metric and the inverse.
        step: the floating-point operations of a step.
        refresh: the floating-point operations of a refresh of the inverse.
        statistics: the floating-point operations of one batch's statistics.
    """

    structure: str
    bytes: int
    step: int
    refresh: int
    statistics: int

    @classmethod
    def of(cls, layer: Layer, structure: Structure, samples: int) -> Choice:
        """Return the cost of a structure for a layer with the given number of samples per batch."""
        cost = structure.cost(layer.shape)
        return cls(
            structure.label(layer.shape), bytes_of(layer, structure), cost.step, cost.refresh, cost.sample * samples
        )


@dataclass(frozen=True)
class LayerPlan:
    """A layer, its structure, and the costs of other structures.

    Attributes:
        name: the name of the layer.
        shape: the shape [*groups, out, d] of its parameters.
        response: the response of its units.
        samples: the number of samples per batch, positions included; 0 if the inputs do not reach the layer, so that
            its structure is provisional.
        chosen: its structure.
        others: the other structures that it supports.
        is_head: whether its outputs were seen to be the logits of a softmax, which needs the loss.
    """

    name: str
    shape: tuple[int, ...]
    response: Response
    samples: int
    chosen: Choice
    others: tuple[Choice, ...]
    is_head: bool = False


@dataclass(frozen=True)
class Plan:
    """One `LayerPlan` per layer, and the memory of the average, the momentum and AdamW; prints as a table.

    Attributes:
        layers: the layers with a metric, in the order of the forward pass, followed by those that it did not reach.
        averaging_bytes: the memory of the average of iterates, one number per parameter; none with `averaging=0`.
        momentum_bytes: the memory of the momentum, one number per parameter with a metric; none with `momentum=0`.
        fallback_bytes: the memory of the two moments of all parameters without a metric.
        shares: what each of several processes does; None for one process.
    """

    layers: tuple[LayerPlan, ...]
    averaging_bytes: int
    momentum_bytes: int
    fallback_bytes: int
    shares: Shares | None = None

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    @property
    def bytes(self) -> int:
        """The memory of the optimizer's state, except for a few scalars."""
        return (
            sum(layer.chosen.bytes for layer in self.layers)
            + self.averaging_bytes
            + self.momentum_bytes
            + self.fallback_bytes
        )

    def __str__(self) -> str:
        rows = [("layer", "shape", "response", "structure", "state", "step", "refresh", "statistics", "instead")]
        rows.extend(
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                _named(type(layer.response).__name__, layer.is_head) if layer.samples else "not reached",
                layer.chosen.structure,
                size(layer.chosen.bytes, "B", 1024),
                size(layer.chosen.step, "FLOP"),
                size(layer.chosen.refresh, "FLOP"),
                size(layer.chosen.statistics, "FLOP"),
                ", ".join(f"{other.structure} {size(other.bytes, 'B', 1024)}" for other in layer.others),
            )
            for layer in self.layers
        )
        total, averaging, momentum, fallback = (
            size(value, "B", 1024)
            for value in (self.bytes, self.averaging_bytes, self.momentum_bytes, self.fallback_bytes)
        )
        return (
            f"{table(rows)}\nstate: {total}, {averaging} of it for the average (none with averaging=0), {momentum} "
            f"for the momentum (none with momentum=0), {fallback} for AdamW on parameters without a metric"
        ) + ("" if self.shares is None else f"\n{self.shares}")


def plan(
    model: nn.Module,
    inputs: Any,
    metric: MetricOptions = MetricOptions(),  # noqa: B008  # immutable
    loss: Callable[[Any], Tensor] | None = None,
    responses: Responses | None = None,
    fit: str = "generalize",
    world_size: int = 1,
    mesh: tuple[int, ...] | None = None,
    *,
    momentum: float | None = None,
    averaging: float | None = None,
    state_bytes: float | str | None = None,
    state_dtype: torch.dtype | None = None,
    **unknown: Any,
) -> Plan:
    """Predict the structures and costs of `RNGD(model, metric=metric, responses=responses, fit=fit, ...)`.

    Args:
        model: the model; it runs once, in evaluation mode, and is left unchanged.
        inputs: one batch of the model's inputs: a tensor, a tuple of arguments, or keyword arguments.
        metric: as for `RNGD`.
        loss: maps the model's output to a scalar. It is needed to identify a head whose softmax is outside the model,
            as RNGD does from the first gradients. Under any other loss, such as a binary cross-entropy, RNGD takes the
            units of the head as linear.
        responses: as for `RNGD`.
        fit: as for `RNGD`; it says whether the metric is needed where raw inputs are read.
        world_size: the number of processes that share out the work, as with `RNGD(model, replicate=False)`.
        mesh: for `fully_shard`, the shape of the mesh of processes: (N,), or (copies, parts) where groups of processes
            hold the same parts; None for `DistributedDataParallel`. The number of processes follows from it.
        momentum: as for `RNGD`; 0 for a state without it.
        averaging: as for `RNGD`; 0 for a state without it.
        state_bytes: as for `RNGD`; for all processes together.
        state_dtype: as for `RNGD`.
        **unknown: not allowed; the error for a renamed option says its new name.

    Returns:
        One row per layer with trained parameters.

    Raises:
        ValueError: if a key of `structure` matches no layer, the loss is not one finite number, the mesh is none, or
            the state cannot be as small as `state_bytes`.
        TypeError: if an argument or the loss has the wrong type, or an argument is unknown.
    """
    reject("plan", unknown)
    check_integer("world_size", world_size)
    if mesh is not None:
        if len(mesh) not in (1, 2) or world_size not in (1, math.prod(mesh)):
            raise ValueError(f"mesh must be (N,) or (copies, parts) of world_size processes, got {mesh}")
        for count in mesh:
            check_integer("mesh", count)
        world_size = math.prod(mesh)
    check_state_bytes(state_bytes)
    check_state_dtype(state_dtype)
    for name, share in (("momentum", momentum), ("averaging", averaging)):
        if share is not None:
            check_interval(name, share, 0, 1, closed="both" if name == "averaging" else "left")
    found = surveyed(model, inputs, metric, loss, responses, fit)
    groups = [{"params": list(model.parameters()), "momentum": momentum != 0, "averaging": averaging != 0}]
    place = dict.fromkeys(found.choices, 0)
    lead = Lead(state_dtype)
    rest = beside(groups, place, lead)
    structures = found.structures if state_bytes is None else fit_into(found.choices, state_bytes, groups, place, lead)
    rows = []
    for layer, chosen in structures.items():
        count, role = found.samples.get(layer, 0), found.roles[layer]
        counted = count if metric.stats_samples is None else min(count, metric.stats_samples)
        others = [each for each in candidates(layer, role) if each.label(layer.shape) != chosen.label(layer.shape)]
        rows.append(
            LayerPlan(
                layer.name,
                layer.shape,
                role.response,
                count,
                Choice.of(layer, chosen, counted),
                tuple(Choice.of(layer, other, counted) for other in others),
                bool(role.is_head),
            )
        )
    following = (found.roles[layer].following for layer in structures)
    passes = Passes(
        [p for p in model.parameters() if p.requires_grad],
        numbers_beside(groups, place, lead),
        list(dict.fromkeys(layer.module for layer in following if layer is not None)),
    )
    return Plan(
        tuple(rows),
        averaging_bytes=rest.averaging,
        momentum_bytes=rest.momentum,
        fallback_bytes=rest.fallback,
        shares=shares(structures, world_size, passes, mesh, state_dtype) if world_size > 1 else None,
    )


@dataclass(frozen=True)
class ParameterCoverage:
    """How one parameter is trained.

    Attributes:
        name: the name of the parameter.
        shape: its shape.
        by: "metric", "adamw" or "frozen".
        subsystem: the name of its layer, or "".
        response: the response of the layer's units, or "".
        structure: the structure of the layer's metric, or "".
        reason: the reason why it is not trained with a metric, or "".
        is_head: whether the layer's outputs were seen to be the logits of a softmax, which needs the loss.
    """

    name: str
    shape: tuple[int, ...]
    by: str
    subsystem: str = ""
    response: str = ""
    structure: str = ""
    reason: str = ""
    is_head: bool = False


@dataclass(frozen=True)
class Coverage:
    """One `ParameterCoverage` per parameter, in the order of the model; prints as a table."""

    parameters: tuple[ParameterCoverage, ...]

    def __iter__(self) -> Iterator[ParameterCoverage]:
        return iter(self.parameters)

    def __str__(self) -> str:
        rows = [("parameter", "shape", "by", "subsystem", "response", "structure", "reason")]
        rows.extend(
            (
                each.name,
                "x".join(map(str, each.shape)),
                each.by,
                each.subsystem,
                _named(each.response, each.is_head),
                each.structure,
                each.reason,
            )
            for each in self.parameters
        )
        return table(rows)


def coverage(
    model: nn.Module,
    inputs: Any,
    metric: MetricOptions = MetricOptions(),  # noqa: B008  # immutable
    loss: Callable[[Any], Tensor] | None = None,
    responses: Responses | None = None,
    fit: str = "generalize",
    **unknown: Any,
) -> Coverage:
    """Return how `RNGD(model, metric=metric, responses=responses, fit=fit)` will train each parameter.

    Args:
        model: the model; it runs once, in evaluation mode, and is left unchanged.
        inputs: the model's inputs: a tensor, a tuple of arguments, or keyword arguments.
        metric: as for `RNGD`.
        loss: maps the model's output to a scalar. It is needed to identify a head whose softmax is outside the model,
            as RNGD does from the first gradients. Under any other loss, such as a binary cross-entropy, RNGD takes the
            units of the head as linear.
        responses: as for `RNGD`.
        fit: as for `RNGD`; it says whether the metric is needed where raw inputs are read.
        **unknown: not allowed; the error for a renamed option says its new name.

    Returns:
        One row per parameter. If the inputs do not reach its layer, AdamW trains the parameter until they do.

    Raises:
        ValueError: if a key of `structure` matches no layer, or the loss is not one finite number.
        TypeError: if an argument or the loss has the wrong type, or an argument is unknown.
    """
    reject("coverage", unknown)
    found = surveyed(model, inputs, metric, loss, responses, fit)
    home = {id(parameter): layer for layer in found.structures for parameter in layer.parameters}
    names = names_of(model)
    rows = []
    for parameter in model.parameters():
        name, shape, layer = names[id(parameter)], tuple(parameter.shape), home.get(id(parameter))
        if not parameter.requires_grad:
            rows.append(ParameterCoverage(name, shape, "frozen"))
        elif layer is None:
            reason = found.refused.get(name, "left to AdamW by the given structure")
            rows.append(ParameterCoverage(name, shape, "adamw", reason=reason))
        elif layer not in found.samples:
            rows.append(ParameterCoverage(name, shape, "adamw", layer.name, reason="not reached by these inputs"))
        else:
            role = found.roles[layer]
            response, label = type(role.response).__name__, found.structures[layer].label(layer.shape)
            is_head = bool(role.is_head)
            rows.append(ParameterCoverage(name, shape, "metric", layer.name, response, label, is_head=is_head))
    return Coverage(tuple(rows))


def _named(response: str, is_head: bool) -> str:
    """Return the name of a response in a table."""
    return f"{response}, softmax head" if is_head else response
