"""What a layer is to those around it: what activation follows, which layer takes its units, whether it is a head."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from relfisher.subsystems.base import Subsystem
from relfisher.subsystems.linear import LinearSubsystem
from relfisher.subsystems.watch import ActivationWatch

__all__ = ["could_be_head", "is_softmax_gradient", "tell_roles"]

# Of the rounding of the sum of a row of gradients, in units of its dtype's, and never more than so much of the row.
_ROUNDING, _LOOSEST = 64, 0.05


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
            layer.is_head = watch.is_softmax(layer.name)


def could_be_head(watch: ActivationWatch, layer: Subsystem) -> bool:
    """Return whether a layer's outputs are the model's, so that only their gradients tell what scores them."""
    return isinstance(layer, LinearSubsystem) and layer.out > 1 and watch.is_output(layer.name)


def is_softmax_gradient(gradient: Tensor) -> bool:
    """Return whether a loss depends on outputs through their softmax alone, given its gradient [*, out].

    Such a loss stays as it is when all outputs of a sample grow alike, so that the gradient of each sample sums to 0;
    that of a squared error does not.
    """
    rows = gradient.detach().to(torch.float64)
    tolerance = min(_ROUNDING * torch.finfo(gradient.dtype).eps, _LOOSEST)
    sizes = rows.abs().sum(-1)
    return bool(sizes.any()) and bool((rows.sum(-1).abs() <= tolerance * sizes).all())
