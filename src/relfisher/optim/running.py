"""The running statistics of batch normalization, averaged as the weights are.

A training pass runs at the last iterate, and moves the running mean and variance by a share, the layer's momentum, to
those of its batch. Between steps the model holds the average of the iterates, whose statistics would be the average of
all in the window. So the share is lowered to that of the iterate in the average, once this is smaller.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from relfisher.optim.outcome import Outcome

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """The running means and variances of a model's normalizations that move by a fixed share.

    Where several optimizers train parts of one model, the statistics of a normalization go with its own parameters, or
    with those of the innermost module around it that has some.

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._norms: list[weakref.ref[_NormBase]] = []
        self._count = 0
        self._before: list[tuple[Tensor, Tensor, float]] = []

    def remember(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Remember what they are, before the passes of a step.

        Args:
            groups: the groups of the model's optimizer.
        """
        self._settle(groups)
        norms = [norm for each in self._norms if (norm := each()) is not None]
        kept = [(buffer, norm.momentum or 1.0) for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self._before = [(buffer, buffer.clone(), share) for buffer, share in kept if buffer is not None]

    def _settle(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Find the normalizations, if groups were added since."""
        count, model = sum(len(group["params"]) for group in groups), self._model()
        if count != self._count and model is not None:
            owned = {id(parameter) for group in groups for parameter in group["params"]}
            self._norms = [weakref.ref(norm) for norm in dict.fromkeys(_norms(model, owned, is_owned=True))]
            self._count = count

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


def _norms(module: nn.Module, owned: Collection[int], *, is_owned: bool) -> Iterator[_NormBase]:
    """Yield the normalizations in a module whose statistics go with the owned parameters.

    Args:
        module: the module.
        owned: the identities of the parameters.
        is_owned: whether those go with them in which, and around which, there are no others that are trained.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if trained:
        is_owned = any(id(parameter) in owned for parameter in trained)
    if is_owned and isinstance(module, _NormBase) and module.running_mean is not None and module.momentum:
        yield module
    for child in module.children():
        yield from _norms(child, owned, is_owned=is_owned)
