"""Predict the cost of a run before it starts, and how each parameter will be trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from relfisher.layers import Layer, discover
from relfisher.observe import Responses, Role, check_responses, survey
from relfisher.optim.assignment import FALLBACK, assign, candidates, number_bytes, rule_for, state_bytes
from relfisher.optim.averaging import averaged
from relfisher.optim.groups import names_of
from relfisher.optim.options import Inversions, MetricOptions, fit_named
from relfisher.optim.renamed import reject
from relfisher.optim.shares import Passes, Shares, shares
from relfisher.optim.tables import size, table
from relfisher.responses import Response
from relfisher.structures import Structure
from relfisher.validation import check_callable, check_instance, check_integer, check_scalar

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
            structure.label(layer.shape), state_bytes(layer, structure), cost.step, cost.refresh, cost.sample * samples
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
    """

    name: str
    shape: tuple[int, ...]
    response: Response
    samples: int
    chosen: Choice
    others: tuple[Choice, ...]


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
        """The memory of the optimizer's state by default, except for a few scalars."""
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
                type(layer.response).__name__ if layer.samples else "not reached",
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
    **unknown: Any,
) -> Plan:
    """Predict the structures and costs of `RNGD(model, metric=metric, responses=responses, fit=fit)`.

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
        **unknown: not allowed; the error for a renamed option says its new name.

    Returns:
        One row per layer with trained parameters.

    Raises:
        ValueError: if a key of `structure` matches no layer, the loss is not one finite number, or the mesh is none.
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
    found = _surveyed(model, inputs, metric, loss, responses, fit)
    rows = []
    for layer, chosen in found.structures.items():
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
            )
        )
    covered = {id(parameter) for layer in found.structures for parameter in layer.parameters}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in covered]
    averaging = sum(p.numel() * p.element_size() for p in model.parameters() if averaged(p))
    fallback = sum(2 * parameter.numel() * parameter.element_size() for parameter in rest)
    without = {id(parameter) for parameter in rest}
    following = (found.roles[layer].following for layer in found.structures)
    passes = Passes(
        [p for p in model.parameters() if p.requires_grad],
        {p: p.element_size() * (averaged(p) + 2 * (id(p) in without)) for p in model.parameters()},
        list(dict.fromkeys(layer.module for layer in following if layer is not None)),
    )
    return Plan(
        tuple(rows),
        averaging_bytes=averaging,
        momentum_bytes=sum(math.prod(layer.shape) * number_bytes(layer) for layer in found.structures),
        fallback_bytes=fallback,
        shares=shares(found.structures, world_size, passes, mesh) if world_size > 1 else None,
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
    """

    name: str
    shape: tuple[int, ...]
    by: str
    subsystem: str = ""
    response: str = ""
    structure: str = ""
    reason: str = ""


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
                each.response,
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
    found = _surveyed(model, inputs, metric, loss, responses, fit)
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
            response = type(found.roles[layer].response).__name__
            label = found.structures[layer].label(layer.shape)
            rows.append(ParameterCoverage(name, shape, "metric", layer.name, response, label))
    return Coverage(tuple(rows))


class _Survey(NamedTuple):
    """Structures and roles of trained layers, sample counts of the layers that were reached, and reasons for refusals.

    Layers are in the order of the forward pass, followed by those that it did not reach.
    """

    structures: dict[Layer, Structure]
    roles: dict[Layer, Role]
    samples: dict[Layer, int]
    refused: dict[str, str]


def _surveyed(
    model: nn.Module,
    inputs: Any,
    metric: MetricOptions,
    loss: Callable[[Any], Tensor] | None,
    responses: Responses | None,
    fit: str,
) -> _Survey:
    check_instance("model", model, nn.Module)
    check_instance("metric", metric, MetricOptions)
    if loss is not None:
        check_callable("loss", loss)
    check_responses(responses)
    usual = fit_named(fit)
    is_flat = Inversions(usual.damping, metric.power, usual.raw_power).is_flat
    found = discover(model, metric.layers)
    metric.check(found.layers)
    rules = {layer: rule_for(layer, metric.structure) for layer in found.layers}
    layers = [layer for layer in found.layers if rules[layer] != FALLBACK]
    seen, samples = survey(model, layers, inputs, loss and partial(_score, loss), responses)
    refused = {name: role.refused for layer, role in seen.items() if role.refused for name in layer.parameter_names}
    trained = [
        layer
        for layer in layers
        if not (layer in seen and seen[layer].refused)
        if any(parameter.requires_grad for parameter in layer.parameters)
    ]
    reached = {layer: seen[layer] for layer in samples if layer in trained}
    before = assign({layer: Role(layer.own_response) for layer in layers}, rules, metric.structure_bytes)
    unseen = {layer: Role(layer.own_response) for layer in trained if layer not in reached}
    structures = assign(reached, rules, metric.structure_bytes, is_flat) | {layer: before[layer] for layer in unseen}
    return _Survey(structures, reached | unseen, samples, found.refused | refused)


def _score(loss: Callable[[Any], Tensor], output: Any) -> Tensor:
    value = loss(output)
    check_scalar("loss", value)
    return value
