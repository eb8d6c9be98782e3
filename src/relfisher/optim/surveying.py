"""Run a model once, to find out what its layers are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from relfisher.layers import Layer, discover
from relfisher.observe import Responses, Role, check_responses, survey
from relfisher.optim.assignment import FALLBACK, choices, rule_for
from relfisher.optim.options import Inversions, MetricOptions, fit_named
from relfisher.structures import Structure
from relfisher.validation import check_callable, check_instance, check_scalar

__all__ = ["Survey", "surveyed"]


class Survey(NamedTuple):
    """What trained layers may use, their roles, sample counts of those that were reached, and reasons for refusals.

    Layers are in the order of the forward pass, followed by those that it did not reach.
    """

    choices: dict[Layer, list[Structure]]
    roles: dict[Layer, Role]
    samples: dict[Layer, int]
    refused: dict[str, str]

    @property
    def structures(self) -> dict[Layer, Structure]:
        """The structures of trained layers, if the state has no limit."""
        return {layer: found[0] for layer, found in self.choices.items()}


def surveyed(
    model: nn.Module,
    inputs: Any,
    metric: MetricOptions,
    loss: Callable[[Any], Tensor] | None,
    responses: Responses | None,
    fit: str,
) -> Survey:
    """Run a model once, with arguments as for `plan`.

    Returns:
        What its layers are.

    Raises:
        TypeError: if there are several inputs, which are not in one argument.
    """
    check_instance("model", model, nn.Module)
    if isinstance(metric, Tensor):
        raise TypeError(
            "metric must be MetricOptions, got a tensor: inputs are one argument, such as a tuple of several"
        )
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
    rules = {layer: rule_for(layer, metric.structure) for layer in layers}  # a table may have become a head
    before = choices({layer: Role(layer.own_response) for layer in layers}, rules, metric.structure_bytes, is_flat)
    unseen = {layer: Role(layer.own_response) for layer in trained if layer not in reached}
    allowed = choices(reached, rules, metric.structure_bytes, is_flat) | {layer: before[layer] for layer in unseen}
    return Survey(allowed, reached | unseen, samples, found.refused | refused)


def _score(loss: Callable[[Any], Tensor], output: Any) -> Tensor:
    value = loss(output)
    check_scalar("loss", value)
    return value
