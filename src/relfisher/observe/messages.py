"""What the observer of a model warns about."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from relfisher.layers import Layer

__all__ = [
    "MaskWarning",
    "ResponseWarning",
    "TiedWarning",
    "UncoveredWarning",
    "tell_misfit",
    "tell_refused",
    "tell_unscored",
]

# Shifted targets leave out one position of each sequence: no reason for a warning.
_FEW = 0.2


class ResponseWarning(UserWarning):
    """The activation after a layer is not known, so that the layer has the linear response."""


class TiedWarning(UserWarning):
    """The weights of a layer are also used outside its module, so that the layer has no metric."""


class UncoveredWarning(UserWarning):
    """Parameters have no metric."""


class MaskWarning(UserWarning):
    """A mask does not fit the samples of a layer, or samples that the loss leaves out count for want of a mask."""


def tell_refused(refused: Mapping[Layer, str], kind: type[UserWarning]) -> None:
    """Warn that layers have no metric after all, with the reasons."""
    if refused:
        named = "; ".join(f"{layer.name}, {reason}" for layer, reason in refused.items())
        warnings.warn(f"no metric for some layers: {named}", kind, stacklevel=3)


def tell_misfit(layer: Layer, mask: Tensor, samples: Sequence[int]) -> None:
    """Warn that a mask was not applied to a layer with samples of this shape."""
    message = f"the mask {list(mask.shape)} was not applied to {layer.name}, whose samples are {list(samples)}"
    warnings.warn(f"{message}: all of them count", MaskWarning, stacklevel=3)


def tell_unscored(layer: Layer, gradient: Tensor) -> None:
    """Warn if the loss leaves out many samples of an output layer, given its gradient [*, out]."""
    unscored = (gradient == 0).all(-1)
    count = int(unscored.sum())
    if count > _FEW * unscored.numel():
        message = (
            f"the loss leaves out {count} of {unscored.numel()} samples of {layer.name}, which count in the metrics"
        )
        warnings.warn(f"{message}: run the model inside `masked` to leave them out", MaskWarning, stacklevel=2)
