"""What a layer is to those around it: what activation follows, which layer takes its units, whether it is a head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from relfisher.subsystems.base import Subsystem
from relfisher.subsystems.linear import LinearSubsystem
from relfisher.subsystems.watch import ActivationWatch

__all__ = ["could_be_head", "is_softmax_gradient", "refuse", "tell_roles"]

# What rounding may make of the sum of a row of gradients, in half precision and in others: a share of the largest row.
_HALF, _FULL = 0.05, 1e-3


def tell_roles(watch: ActivationWatch, layers: Iterable[Subsystem], linear: Iterable[nn.Module]) -> None:
    """Set what a watched forward pass has told of layers.

    Args:
        watch: it was shown the outputs of the layers that are followed.
        layers: to be told.
        linear: modules that may take units of theirs.
    """
    owners = {
        id(weight): module
        for module in linear
        if isinstance(module, nn.Linear)
        if (weight := module._parameters.get("weight")) is not None  # it is parametrized, and not kept as it is
    }
    for layer in layers:
        if not layer.followed:
            continue
        layer.response = watch.response(layer.name)
        if isinstance(layer, LinearSubsystem):
            layer.following = owners.get(id(watch.following(layer.name)))
            if not watch.is_output(layer.name):
                layer.is_head = watch.is_softmax(layer.name)


def refuse(watch: ActivationWatch) -> list[Subsystem]:
    """Take their metric from layers whose parameters were seen at work outside their module, and return them."""
    for layer, function in watch.misused.items():
        layer.refused = f"tied: {function} uses its parameters outside its own calls"
        layer.structure = None
    return list(watch.misused)


def could_be_head(watch: ActivationWatch, layer: Subsystem) -> bool:
    """Return whether only the gradients of a layer's outputs can tell what scores them, since they are the model's."""
    unknown = layer.is_head is None and layer.out > 1
    return unknown and isinstance(layer, LinearSubsystem) and watch.is_output(layer.name)


def is_softmax_gradient(gradient: Tensor) -> bool:
    """Return whether a loss depends on outputs through their softmax alone, given its gradient [*, out].

    Such a loss stays as it is when all outputs of a sample grow alike, so that the gradient of each sample sums to 0;
    that of a squared error does not.
    """
    rows = gradient.detach().to(torch.float64)
    tolerance = _HALF if gradient.dtype in (torch.float16, torch.bfloat16) else _FULL
    largest = rows.abs().sum(-1).max()
    return bool(largest > 0) and bool((rows.sum(-1).abs() <= tolerance * largest).all())
