"""The metric of a layer inside a model: run the model to find the layer's inputs and response."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.evaluation import undisturbed
from relfisher.information import Joined
from relfisher.layers import Call, EmbeddingLayer, Layer, Rows, Sampling, layers_of, plain_name
from relfisher.metric import GroupedMetric, LayerMetric, Metric
from relfisher.observe.activations import Responses
from relfisher.observe.hooks import Hook, unobserved
from relfisher.observe.operations import Operations
from relfisher.observe.roles import Role, is_softmax_gradient, needs_gradient, roles_of
from relfisher.observe.tables import Tables
from relfisher.observe.trace import Trace
from relfisher.pullback import as_rows
from relfisher.responses import Response
from relfisher.validation import check_finite, check_instance

__all__ = ["Seen", "metric_of", "module_metric", "observe", "survey"]


def module_metric(model: nn.Module, name: str, inputs: Any, response: Response | None = None) -> Metric:
    """Return the relative Fisher information metric of a layer inside a model. Equations (22), (23), (25).

    The model runs once, in evaluation mode, and is left unchanged. The reference theta_f consists of all parameters but
    the layer's own, and of the inputs of each call of the layer, as this run computed them. For the time steps of a
    recurrent layer and the later calls of a layer that is called again, these inputs depend on the layer's own
    parameters. The metric leaves out this dependence: it is that of one step at a time, for given states. For the
    metric through all steps, write the unrolled pre-activations for `relative_fisher`.

    Args:
        model: the model.
        name: the module's dotted name, as in `model.named_modules()` with or without the prefixes of wrappers, or the
            name of one of its layers, such as "attention.out_proj".
        inputs: the model's inputs: a tensor, a tuple of arguments, or keyword arguments.
        response: the response of the layer's units in all calls; None for the response of the activation that follows
            each call, or a linear response if no activation is recognized.

    Returns:
        A metric of the layer's parameters [out, d], bias last, or [groups, out, d] if groups of units have different
        inputs (grouped convolutions, the channels of a normalization). Positions and repeated calls count as samples:
        the metric is a mean over all of them.

    Raises:
        ValueError: if there is no such layer, or the forward pass does not reach it.
        TypeError: if the module has no metric.
    """
    check_instance("response", response, Response, optional=True)
    layer = _named(model, name)
    seen = observe(model, {name: layer}, inputs).get(name)
    if seen is None:
        raise ValueError(f"the forward pass did not reach {name!r} with these inputs")
    seen = [replace(call, rows=layer.spelled_out(call.rows)) for call in seen]
    for kind, of_calls in (
        ("input", [call.rows.x for call in seen]),
        ("pre-activation", [call.rows.z for call in seen]),
    ):
        check_finite(f"the {kind} of {name!r}", torch.cat(of_calls, dim=-2))
    return metric_of(layer, seen, response)


def metric_of(layer: Layer, calls: Sequence[Seen], response: Response | None = None) -> Metric:
    """Return the metric of a layer over the samples of all of its calls.

    Args:
        layer: the layer.
        calls: its calls.
        response: the response of its units in all calls; None for that of each call.

    Returns:
        The metric, with one information for all samples where the calls have the same response.
    """
    said = [response or call.response for call in calls]
    if all(each == said[0] for each in said):
        rows = [torch.cat(each, dim=-2) for each in zip(*(call.rows for call in calls), strict=True)]
        return layer.metric(Rows(*rows), said[0])
    return _joined([layer.metric(call.rows, each) for call, each in zip(calls, said, strict=True)])


def _joined(metrics: Sequence[Any]) -> Metric:
    """Return the metric over the samples of several metrics of the same layer."""
    if isinstance(metrics[0], GroupedMetric):
        return GroupedMetric([_joined(group) for group in zip(*(metric.metrics for metric in metrics), strict=True)])
    sizes = tuple(metric.samples for metric in metrics)
    information = Joined(tuple(metric.information for metric in metrics), sizes)
    return LayerMetric(information, torch.cat([metric.x for metric in metrics]), bias=False)


def _named(model: nn.Module, name: str) -> Layer:
    """Return the layer with this name, which may be its own name or its module's.

    Raises:
        ValueError: if there is no module of this name, or it has several layers.
        TypeError: if the module has no layer.
    """
    check_instance("model", model, nn.Module)
    check_instance("name", name, str)
    modules = {plain_name(model, key): module for key, module in model.named_modules()}
    modules |= dict(model.named_modules())
    parent = modules.get(name.rpartition(".")[0])
    own = {found.name: found for found in layers_of(name.rpartition(".")[0], parent)} if parent is not None else {}
    if name in own:
        return own[name]
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or [key for key in modules if key][:3]
        raise ValueError(f"name must be a module of the model, such as {', '.join(map(repr, near))}; got {name!r}")
    found = layers_of(name, modules[name])
    if not found:
        raise TypeError(f"name must be that of a layer with a metric, but {name!r} is a {type(modules[name]).__name__}")
    if len(found) > 1:
        raise ValueError(f"name must be one of {', '.join(repr(each.name) for each in found)}; got {name!r}")
    return found[0]


@dataclass(frozen=True)
class Seen:
    """One call of a layer.

    Args:
        rows: its samples.
        response: the response of the layer's units in this call, as the activation after it makes it.
        is_output: whether the model returned what the call did, possibly reshaped or copied.
    """

    rows: Rows
    response: Response
    is_output: bool


def observe(model: nn.Module, layers: Mapping[str, Layer], inputs: Any) -> dict[str, list[Seen]]:
    """Run a model in evaluation mode and return the calls of some of its layers.

    Args:
        model: the model; it is left unchanged.
        layers: layers of the model, by name.
        inputs: the model's inputs: a tensor, a tuple of arguments, or keyword arguments.

    Returns:
        The calls of each layer that was reached, by name, in the order of the forward pass. At most one of them is the
        output.
    """
    calls: list[tuple[Layer, Rows, int]] = []

    def see(layer: Layer, call: Call) -> None:
        rows = layer.rows(call, Sampling())
        # Later in-place operations may overwrite both.
        z = layer.output(call.output)
        calls.append((layer, Rows(rows.x.clone(), rows.z.clone()), 0 if z is None else z.data_ptr()))

    roles, trace, output = _run(model, layers, inputs, see)
    said = {each: iter(trace.takers.responses(each)) for each in roles if each.followed}
    last = _output_among(calls, output)
    names = {layer: name for name, layer in layers.items()}
    seen: dict[str, list[Seen]] = {}
    for place, (layer, rows, _) in enumerate(calls):
        response = next(said[layer]) if layer in said else roles[layer].response
        seen.setdefault(names[layer], []).append(Seen(rows, response, place == last))
    return seen


def _output_among(calls: Sequence[tuple[Layer, Rows, int]], output: Any) -> int | None:
    """Return the place of the call that computed the model's output: the same values, at best in the same memory."""
    if not isinstance(output, Tensor):
        return None
    final = as_rows(output.detach())
    equal = [place for place, (_, rows, _) in enumerate(calls) if torch.equal(rows.z.to(final.dtype), final)]
    return max(equal, key=lambda place: (calls[place][2] == output.data_ptr(), place), default=None)


def survey(
    model: nn.Module,
    layers: Sequence[Layer],
    inputs: Any,
    loss: Callable[[Any], Tensor] | None = None,
    responses: Responses | None = None,
) -> tuple[dict[Layer, Role], dict[Layer, int]]:
    """Run a model in evaluation mode and return the roles of its layers and their sample counts.

    Args:
        model: the model; it is left unchanged.
        layers: layers of the model.
        inputs: the model's inputs: a tensor, a tuple of arguments, or keyword arguments.
        loss: maps the model's output to a scalar; its gradients show how the output layers are scored.
        responses: responses by activation.

    Returns:
        The roles of the layers that were reached or refused, and the number of samples of each layer that was reached.
    """
    named = {layer.name: layer for layer in layers}
    samples: dict[Layer, int] = {}

    def see(layer: Layer, call: Call) -> None:
        if layer.followed:
            count = layer.pre_activation(call).numel() // math.prod(layer.shape[:-1])
        else:
            count = layer.rows(call, Sampling()).z.shape[-2]
        samples[layer] = samples.get(layer, 0) + count

    def begin(layer: Layer) -> None:
        samples.pop(layer, None)

    return _run(model, named, inputs, see, loss, responses, begin)[0], samples


@torch.enable_grad()
def _run(
    model: nn.Module,
    layers: Mapping[str, Layer],
    inputs: Any,
    see: Callable[[Layer, Call], None],
    loss: Callable[[Any], Tensor] | None = None,
    responses: Responses | None = None,
    begin: Callable[[Layer], None] | None = None,
) -> tuple[dict[Layer, Role], Trace, Any]:
    """Run a model, pass on each call of a layer, and return the roles of layers, reached or refused, and more.

    Args:
        model: the model.
        layers: the layers, by name.
        inputs: as for `survey`.
        see: called with each call of a layer.
        loss: as for `survey`.
        responses: as for `survey`.
        begin: called with each table that turns out to be a head; None if none may.

    Returns:
        The roles, the trace, and the output.
    """
    arguments = list(inputs.values()) if isinstance(inputs, Mapping) else list(_tuple(inputs))
    trace = Trace(layers.values(), model, inputs=arguments, responses=responses)
    reached: dict[Layer, Tensor] = {}

    def reach(layer: Layer, call: Call, z: Tensor | None) -> None:
        if z is None:
            return
        with torch._C.DisableTorchFunction(), torch.no_grad():
            see(layer, call)
        reached[layer] = z
        if layer.followed:
            trace.show(layer, call, z)

    def hook_of(layer: Layer) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if layer.operation is None:
                reach(layer, Call(args, kwargs, output), layer.output(output))

        return hook

    inside: dict[nn.Module, list[Layer]] = {}
    for layer in layers.values():
        if layer.operation:
            inside.setdefault(layer.module, []).append(layer)
    operations = Operations(inside, lambda _: True, reach, own_thread=True)
    handles = [
        layer.module.register_forward_hook(Hook(hook_of(layer), own_thread=True), with_kwargs=True, prepend=True)
        for layer in layers.values()
        if not layer.operation
    ] + [handle for module in inside for handle in operations.watch(module)]

    def begin_head(layer: Layer) -> None:
        reached.pop(layer, None)
        if begin is not None:
            begin(layer)

    open_ = [each for each in layers.values() if isinstance(each, EmbeddingLayer) and begin]
    tables = Tables(open_, reach, trace, begin_head)
    try:
        with unobserved(), undisturbed(model), trace, tables:
            output = model(**inputs) if isinstance(inputs, Mapping) else model(*arguments)
    finally:
        trace.remove_hooks()
        for handle in handles:
            handle.remove()
    tables.finish()
    roles = roles_of(trace, [*reached, *(layer for layer in trace.misused if layer not in reached)])
    roles |= operations.missed()
    heads = [layer for layer in reached if needs_gradient(trace, layer, roles[layer]) and reached[layer].requires_grad]
    trace.forget()
    if loss is not None and heads:
        gradients = torch.autograd.grad(loss(output), [reached[layer] for layer in heads], allow_unused=True)
        for layer, gradient in zip(heads, gradients, strict=True):
            is_head = gradient is not None and is_softmax_gradient(gradient, reached[layer])
            roles[layer] = replace(roles[layer], is_head=is_head)
    return roles, trace, output


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)
