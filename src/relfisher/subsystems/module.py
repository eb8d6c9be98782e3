"""The metric of a layer inside a model: its inputs and its response are found by running the model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.evaluation import evaluation_mode
from relfisher.metric import Metric
from relfisher.responses import Response, UnitResponse
from relfisher.subsystems.base import Call, Subsystem
from relfisher.subsystems.discover import subsystems_of
from relfisher.subsystems.roles import could_be_head, is_softmax_gradient, refuse, tell_roles
from relfisher.subsystems.samples import Rows, Sampling
from relfisher.subsystems.watch import ActivationWatch
from relfisher.validation import check_finite

__all__ = ["module_metric", "observe", "survey"]


def module_metric(model: nn.Module, name: str, inputs: Any, response: Response | None = None) -> Metric:
    """Return the relative Fisher information metric of a layer inside a model. Equations (22), (23), (25).

    The model runs once, in evaluation mode, and is left as it was. The reference theta_f is everything but the layer's
    own parameters.

    Args:
        model: the model.
        name: the layer's dotted name, as in `model.named_modules()`, or the name of one of its subsystems, such as
            "attention.out_proj".
        inputs: what the model is called with: a tensor, a tuple of arguments, or keyword arguments.
        response: what the layer's units say; None for the response of the activation that follows, or a linear one
            where none is recognised.

    Returns:
        A metric of the layer's parameters [out, d], bias last, or [groups, out, d] where groups of units have inputs of
        their own (grouped convolutions, the channels of a normalisation). Positions and repeated calls are samples.

    Raises:
        ValueError: if there is no such layer, or the forward pass did not reach it.
        TypeError: if the module has no metric of its own.
    """
    layer = _named(model, name)
    seen = observe(model, {name: layer}, inputs).get(name)
    if seen is None:
        raise ValueError(f"the forward pass did not reach {name!r} with these inputs")
    rows, found = layer.spelled_out(seen[0]), seen[1]
    check_finite(f"the input of {name!r}", rows.x)
    return layer.metric(rows, response or found)


def _named(model: nn.Module, name: str) -> Subsystem:
    """Return the one subsystem with this name, its own or its module's.

    Raises:
        ValueError: if there is no module with this name, or it has several subsystems.
        TypeError: if the module has none.
    """
    modules = dict(model.named_modules())
    parent = modules.get(name.rpartition(".")[0])
    own = {found.name: found for found in subsystems_of(name.rpartition(".")[0], parent)} if parent is not None else {}
    if name in own:
        return own[name]
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or [key for key in modules if key]
        raise ValueError(f"name must be a module of the model, such as {', '.join(map(repr, near))}; got {name!r}")
    found = subsystems_of(name, modules[name])
    if not found:
        raise TypeError(f"name must be that of a layer with a metric, but {name!r} is a {type(modules[name]).__name__}")
    if len(found) > 1:
        raise ValueError(f"name must be one of {', '.join(repr(each.name) for each in found)}; got {name!r}")
    return found[0]


def observe(model: nn.Module, layers: Mapping[str, Subsystem], inputs: Any) -> dict[str, tuple[Rows, UnitResponse]]:
    """Run a model in evaluation mode and return what some of its layers saw and said.

    Args:
        model: the model, left as it was.
        layers: subsystems of it, by name.
        inputs: what the model is called with: a tensor, a tuple of arguments, or keyword arguments.

    Returns:
        For each layer that was reached its samples and response, in the order in which they were reached.
    """
    seen: dict[str, list[Rows]] = {}

    def see(name: str, call: Call) -> None:
        rows = layers[name].rows(call, Sampling())
        # Both may be overwritten by what works in place, later in the forward pass.
        seen.setdefault(name, []).append(Rows(rows.x.clone(), rows.z.clone()))

    _run(model, layers, inputs, see)
    return {
        name: (
            Rows(torch.cat([rows.x for rows in calls], dim=-2), torch.cat([rows.z for rows in calls], dim=-2)),
            layers[name].response,
        )
        for name, calls in seen.items()
    }


def survey(
    model: nn.Module, layers: Sequence[Subsystem], inputs: Any, loss: Callable[[Any], Tensor] | None = None
) -> dict[Subsystem, int]:
    """Run a model in evaluation mode, tell its layers what they are to each other and count the samples of each.

    Args:
        model: the model, left as it was.
        layers: subsystems of it.
        inputs: what the model is called with: a tensor, a tuple of arguments, or keyword arguments.
        loss: of what the model returns; it tells what scores the output layers.

    Returns:
        For each layer that was reached the number of its samples.
    """
    named = {layer.name: layer for layer in layers}
    samples: dict[str, int] = {}

    def see(name: str, call: Call) -> None:
        units = math.prod(named[name].shape[:-1]) if named[name].followed else named[name].out
        samples[name] = samples.get(name, 0) + named[name].said(call).numel() // units

    _run(model, named, inputs, see, loss)
    return {named[name]: count for name, count in samples.items()}


@torch.enable_grad()
def _run(
    model: nn.Module,
    layers: Mapping[str, Subsystem],
    inputs: Any,
    see: Callable[[str, Call], None],
    loss: Callable[[Any], Tensor] | None = None,
) -> None:
    """Run a model, show each call of a layer, and tell the layers that were reached what they are."""
    watch = ActivationWatch(layers.values())
    reached: dict[str, Tensor] = {}

    def hook_of(name: str, layer: Subsystem) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            z = layer.output(output)
            if z is None:
                return
            with torch._C.DisableTorchFunction(), torch.no_grad():
                see(name, Call(args, kwargs, output))
            reached[name] = z
            if layer.followed:
                watch.show(name, z)

        return hook

    handles = [
        layer.module.register_forward_hook(hook_of(name, layer), with_kwargs=True, prepend=True)
        for name, layer in layers.items()
    ]
    try:
        with evaluation_mode(model), watch:
            output = model(**inputs) if isinstance(inputs, Mapping) else model(*_tuple(inputs))
    finally:
        for handle in handles:
            handle.remove()
    refuse(watch)
    tell_roles(watch, [layers[name] for name in reached], [layer.module for layer in layers.values()])
    heads = [name for name in reached if could_be_head(watch, layers[name]) and reached[name].requires_grad]
    watch.forget()
    if loss is not None and heads:
        gradients = torch.autograd.grad(loss(output), [reached[name] for name in heads], allow_unused=True)
        for name, gradient in zip(heads, gradients, strict=True):
            layers[name].is_head = gradient is not None and is_softmax_gradient(gradient)


def _tuple(inputs: Any) -> tuple[Any, ...]:
    return inputs if isinstance(inputs, tuple) else (inputs,)
