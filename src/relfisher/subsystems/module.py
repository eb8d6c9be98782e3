"""The metric of a layer inside a model: its inputs and its response are found by running the model."""

from __future__ import annotations

import difflib
from typing import Any

import torch
from torch import Tensor, nn

from relfisher.evaluation import evaluation_mode
from relfisher.metric import LayerMetric
from relfisher.responses import Response
from relfisher.subsystems.discover import ActivationWatch
from relfisher.validation import check_finite

__all__ = ["module_metric", "observe"]


def module_metric(model: nn.Module, name: str, inputs: Any, response: Response | None = None) -> LayerMetric:
    """Return the relative Fisher information metric of a linear layer inside a model. Equations (22), (23), (25).

    The model runs once, in evaluation mode, and is left as it was. The reference theta_f is everything but the layer's
    own weight and bias.

    Args:
        model: the model.
        name: the layer's dotted name, as in `model.named_modules()`.
        inputs: what the model is called with: a tensor, or a tuple of arguments.
        response: what the layer's units say; None for the response of the activation that follows, or a linear one
            where none is recognised.

    Returns:
        A metric of the layer's parameters [out, in + 1], bias last. Positions and repeated calls are samples.

    Raises:
        ValueError: if there is no such layer, or the forward pass did not reach it.
        TypeError: if the module is not a linear layer.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        near = difflib.get_close_matches(name, modules, n=3, cutoff=0.5) or [key for key in modules if key]
        raise ValueError(f"name must be a module of the model, such as {', '.join(map(repr, near))}; got {name!r}")
    module = modules[name]
    if not isinstance(module, nn.Linear):
        raise TypeError(f"name must be that of a torch.nn.Linear, but {name!r} is a {type(module).__name__}")
    x, z, found = observe(model, {name: module}, inputs).get(name, (None, None, None))
    if x is None or z is None or found is None:
        raise ValueError(f"the forward pass did not reach {name!r} with these inputs")
    check_finite(f"the input of {name!r}", x)
    return LayerMetric((response or found).operator(z), x, bias=module.bias is not None)


@torch.enable_grad()
def observe(model: nn.Module, layers: dict[str, nn.Linear], inputs: Any) -> dict[str, tuple[Tensor, Tensor, Response]]:
    """Run a model in evaluation mode and return what some of its linear layers saw and said.

    Args:
        model: the model, left as it was.
        layers: linear layers inside it, by name.
        inputs: what the model is called with: a tensor, or a tuple of arguments.

    Returns:
        For each layer that was reached its inputs [n, in], pre-activations [n, out] and response.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
    watch = ActivationWatch()

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], z: Tensor) -> None:
            x = args[0] if args else kwargs["input"]
            # Both may be overwritten by what works in place, later in the forward pass.
            rows = (x.detach().reshape(-1, x.shape[-1]).clone(), z.detach().reshape(-1, z.shape[-1]).clone())
            seen.setdefault(name, []).append(rows)
            watch.show(name, z)

        return hook

    handles = [layer.register_forward_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with evaluation_mode(model), watch:
            model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for handle in handles:
            handle.remove()
        watch.forget()
    return {
        name: (torch.cat([x for x, _ in calls]), torch.cat([z for _, z in calls]), watch.response(name))
        for name, calls in seen.items()
    }
