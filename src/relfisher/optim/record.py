"""The running record of one layer: its role and structure, and its parameters as one matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.observe import Role
from relfisher.optim.assignment import Rule
from relfisher.shapes import Float
from relfisher.structures import Structure

__all__ = ["LayerView", "Record"]


class LayerView(NamedTuple):
    """A layer as an optimizer sees it.

    Attributes:
        name: of the layer.
        role: as the model's forward pass told it; None before the first one.
        structure: how its metric is kept; None before that, and if it has none.
        group: the place of its group in `param_groups`.
    """

    name: str
    role: Role | None
    structure: Structure | None
    group: int


class Record:
    """What an optimizer knows of one layer; `Curvature` alone writes it.

    Args:
        layer: the layer.
        rule: by which its structure is chosen.
        not_owned: the attributes of parts that this optimizer does not train.

    Attributes:
        role: as the model's forward pass told it; None before.
        structure: how its metric is kept; None until the role is known, and if the layer is refused.
        trainable_before: which parts were trained at the last update; None before the first one.
        told_without_metric: whether it was said that it has a gradient, but was not seen.
        metric_in_use: the tensor of a state that was found to fit the structure.
    """

    def __init__(self, layer: Layer, rule: Rule, not_owned: frozenset[str]) -> None:
        self.layer = layer
        self.rule = rule
        self.not_owned = not_owned
        self.role: Role | None = None
        self.structure: Structure | None = None
        self.trainable_before: list[bool] | None = None
        self.told_without_metric = False
        self.metric_in_use: Tensor | None = None

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    @property
    def is_refused(self) -> bool:
        """Whether the layer has no metric after all."""
        return self.role is not None and self.role.refused is not None

    @property
    def owned(self) -> list[Tensor]:
        """The parameters that this optimizer trains."""
        if not self.not_owned:
            return self.layer.parameters
        pairs = zip(self.layer.parts, self.layer.parameters, strict=True)
        return [parameter for part, parameter in pairs if part.attribute not in self.not_owned]

    @property
    def key(self) -> Tensor:
        """The parameter that the layer's state is kept with: one that is owned, since torch saves no others."""
        return next(iter(self.owned), self.layer.weight) if self.not_owned else self.layer.weight

    @property
    def is_idle(self) -> bool:
        """Whether the layer is to be trained, but no part of it has a gradient."""
        free = [parameter for parameter in self.owned if parameter.requires_grad]
        return bool(free) and all(parameter.grad is None for parameter in free)

    def trainable(self) -> list[bool]:
        """Return for each part whether it is trained."""
        if not self.not_owned:
            return [parameter.requires_grad for parameter in self.layer.parameters]
        pairs = zip(self.layer.parts, self.layer.parameters, strict=True)
        return [parameter.requires_grad and part.attribute not in self.not_owned for part, parameter in pairs]

    def frozen(self) -> Tensor | None:
        """Return True for the columns [d] that are not trained; None if there is no such column."""
        trainable = self.trainable()
        if all(trainable):
            return None
        device = self.layer.weight.device
        stuck = torch.tensor([not each for each in trainable], device=device)
        return stuck.repeat_interleave(torch.tensor(self.layer.widths, device=device))

    def gradient(self) -> Float[Tensor, "*g out d"] | None:
        """Return the loss gradient as one matrix, or None if no part has one; a part that is not owned counts as 0."""
        parameters = self.layer.parameters
        gradients = [parameter.grad for parameter in parameters]
        if self.not_owned:
            parts = zip(self.layer.parts, gradients, strict=True)
            gradients = [None if part.attribute in self.not_owned else gradient for part, gradient in parts]
        if all(gradient is None for gradient in gradients):
            return None
        pairs = zip(parameters, gradients, strict=True)
        return self.layer.join([torch.zeros_like(like) if each is None else _dense(each) for like, each in pairs])

    def add_(self, step: Float[Tensor, "*g out d"], scale: float) -> None:
        """Add `scale * step` to the parts that have a gradient and are owned, in place."""
        for part, parameter, columns in self._moving(step):
            part.view(parameter).add_(columns, alpha=scale)

    def replace_gradient(self, gradient: Float[Tensor, "*g out d"]) -> None:
        """Write a matrix over the gradients of the parts that have one and are owned."""
        for part, parameter, columns in self._moving(gradient):
            parameter.grad = _dense(parameter.grad)
            part.view(parameter.grad).copy_(columns)

    def _moving(self, matrix: Tensor) -> list[tuple[Any, Any, Tensor]]:
        """Return part, parameter and columns of a matrix for the parts that have a gradient and are owned."""
        each = zip(self.layer.parts, self.layer.parameters, self.layer.split(matrix), strict=True)
        return [
            (part, parameter, columns)
            for part, parameter, columns in each
            if parameter.grad is not None and part.attribute not in self.not_owned
        ]


def _dense(gradient: Tensor) -> Tensor:
    return gradient.to_dense() if gradient.is_sparse else gradient
