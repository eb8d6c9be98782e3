"""The running statistics of batch normalization, averaged as the weights are.

A training pass runs at the last iterate, and moves the running mean and variance by a share, the layer's momentum, to
those of its batch. Between steps the model holds the average of the iterates, whose statistics would be the average of
all in the window. So the share is lowered to that of the iterate in the average, once this is smaller.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from relfisher.optim.outcome import Outcome

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """The running means and variances of a model's normalizations that move by a fixed share.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = (module for module in model.modules() if isinstance(module, _NormBase))
        self._norms = [weakref.ref(norm) for norm in norms if norm.running_mean is not None and norm.momentum]
        self._before: list[tuple[Tensor, Tensor, float]] = []

    def remember(self) -> None:
        """Remember what they are, before the passes of a step."""
        norms = [norm for each in self._norms if (norm := each()) is not None]
        kept = [(buffer, norm.momentum or 1.0) for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self._before = [(buffer, buffer.clone(), share) for buffer, share in kept if buffer is not None]

    def restore(self) -> None:
        """Undo what the passes of a step have moved."""
        for buffer, before, _ in self._before:
            buffer.copy_(before)
        self._before = []

    @torch.no_grad()
    def average(self, outcome: Outcome, new: float) -> None:
        """Lower the share by which the passes of a step moved them; a step that is not taken moves nothing.

        Args:
            outcome: whether the step is taken.
            new: the share of the new iterate in the average.
        """
        for buffer, before, share in self._before:
            outcome.restore(buffer.lerp_(before, 1 - min(1.0, new / share)), before)
        self._before = []
