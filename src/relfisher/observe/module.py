"""The metric of a layer inside a model: run the model to find the layer's inputs and response."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.evaluation import evaluation_mode
from relfisher.layers import Call, Layer, Rows, Sampling, layers_of
from relfisher.metric import Metric
from relfisher.observe.activations import Responses
from relfisher.observe.hooks import Hook
from relfisher.observe.roles import Role, is_softmax_gradient, needs_gradient, roles_of
from relfisher.observe.trace import Trace
from relfisher.responses import Response, UnitResponse
from relfisher.validation import check_finite

__all__ = ["module_metric", "observe", "survey"]


def module_metric(model: nn.Module, name: str, inputs: Any, response: Response | None = None) -> Metric:
    """Return the relative Fisher information metric of a layer inside a model. Equations (22), (23), (25).

    The model runs once, in evaluation mode, and is left unchanged. The reference theta_f consists of all parameters but
    the layer's own.

    Args:
        model: the model.
        name: the module's dotted name, as in `model.named_modules()`, or the name of one of its layers, such as
            "attention.out_proj".
        inputs: the model's inputs: a tensor, a tuple of arguments, or keyword arguments.
        response: the response of the layer's units; None for the response of the activation that follows, or a linear
            response if no activation is recognized.

    Returns:
        A metric of the layer's parameters [out, d], bias last, or [groups, out, d] if groups of units have different
        inputs (grouped convolutions, the channels of a normalization). Positions and repeated calls count as samples.

    Raises:
        ValueError: if there is no such layer, or the forward pass does not reach it.
        TypeError: if the module has no metric.
    """
    layer = _named(model, name)
    seen = observe(model, {name: layer}, inputs).get(name)
    if seen is None:
        raise ValueError(f"the forward pass did not reach {name!r} with these inputs")
    rows, found = layer.spelled_out(seen[0]), seen[1]
    check_finite(f"the input of {name!r}", rows.x)
    return layer.metric(rows, response or found)


def _named(model: nn.Module, name: str) -> Layer:
    """Return the layer with this name, which may be its own name or its module's.

    Raises:
        ValueError: if there is no module of this name, or it has several layers.
        TypeError: if the module has no layer.
    """
    modules = dict(model.named_modules())
    parent = modules.get(name.rpartition(".")[0])
    own = {found.name: found for found in layers_of(name.rpartition(".")[0], parent)} if parent is not None else {}
    if name in own:
        return own[name]
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or [key for key in modules if key]
        raise ValueError(f"name must be a module of the model, such as {', '.join(map(repr, near))}; got {name!r}")
    found = layers_of(name, modules[name])
    if not found:
        raise TypeError(f"name must be that of a layer with a metric, but {name!r} is a {type(modules[name]).__name__}")
    if len(found) > 1:
        raise ValueError(f"name must be one of {', '.join(repr(each.name) for each in found)}; got {name!r}")
    return found[0]


def observe(model: nn.Module, layers: Mapping[str, Layer], inputs: Any) -> dict[str, tuple[Rows, UnitResponse]]:
    """Run a model in evaluation mode and return the samples and responses of some of its layers.

    Args:
        model: the model; it is left unchanged.
        layers: layers of the model, by name.
        inputs: the model's inputs: a tensor, a tuple of arguments, or keyword arguments.

    Returns:
        The samples and the response of each layer that was reached, in the order of the forward pass.
    """
    seen: dict[Layer, list[Rows]] = {}

    def see(layer: Layer, call: Call) -> None:
        rows = layer.rows(call, Sampling())
        # Later in-place operations may overwrite both.
        seen.setdefault(layer, []).append(Rows(rows.x.clone(), rows.z.clone()))

    roles = _run(model, layers, inputs, see)
    names = {layer: name for name, layer in layers.items()}
    return {
        names[layer]: (
            Rows(torch.cat([rows.x for rows in calls], dim=-2), torch.cat([rows.z for rows in calls], dim=-2)),
            roles[layer].response,
        )
        for layer, calls in seen.items()
    }


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

    return _run(model, named, inputs, see, loss, responses), samples


@torch.enable_grad()
def _run(
    model: nn.Module,
    layers: Mapping[str, Layer],
    inputs: Any,
    see: Callable[[Layer, Call], None],
    loss: Callable[[Any], Tensor] | None = None,
    responses: Responses | None = None,
) -> dict[Layer, Role]:
    """Run a model, pass on each call of a layer, and return the roles of the layers that were reached or refused."""
    arguments = list(inputs.values()) if isinstance(inputs, Mapping) else list(_tuple(inputs))
    trace = Trace(layers.values(), model, inputs=arguments, responses=responses)
    reached: dict[Layer, Tensor] = {}

    def hook_of(layer: Layer) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            z = layer.output(output)
            if z is None:
                return
            with torch._C.DisableTorchFunction(), torch.no_grad():
                see(layer, Call(args, kwargs, output))
            reached[layer] = z
            if layer.followed:
                trace.show(layer, z)

        return hook

    handles = [
        layer.module.register_forward_hook(Hook(hook_of(layer)), with_kwargs=True, prepend=True)
        for layer in layers.values()
    ]
    try:
        with evaluation_mode(model), trace:
            output = model(**inputs) if isinstance(inputs, Mapping) else model(*arguments)
    finally:
        for handle in handles:
            handle.remove()
    roles = roles_of(trace, [*reached, *(layer for layer in trace.misused if layer not in reached)])
    heads = [layer for layer in reached if needs_gradient(trace, layer, roles[layer]) and reached[layer].requires_grad]
    trace.forget()
    if loss is not None and heads:
        gradients = torch.autograd.grad(loss(output), [reached[layer] for layer in heads], allow_unused=True)
        for layer, gradient in zip(heads, gradients, strict=True):
            roles[layer] = replace(roles[layer], is_head=gradient is not None and is_softmax_gradient(gradient))
    return roles


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)
