"""The record of one layer: its role and structure, and its parameters as one matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from relfisher.layers import Layer
from relfisher.observe import Role
from relfisher.optim.assignment import Rule
from relfisher.shapes import Float
from relfisher.structures import Structure

__all__ = ["LayerView", "Record", "dense"]


class LayerView(NamedTuple):
    """A layer as the optimizer sees it.

    Attributes:
        name: the name of the layer.
        role: its role in the model's forward pass; None before the first pass.
        structure: the structure of its metric; None before the role is known, or if the layer is refused.
        group: the index of its group in `param_groups`.
    """

    name: str
    role: Role | None
    structure: Structure | None
    group: int


class Record:
    """The data of an optimizer about one layer; only `Curvature` writes it.

    Args:
        layer: the layer.
        rule: the rule that chooses its structure.
        not_owned: the names of the parameters that are not owned by this optimizer.

    Attributes:
        role: its role in the model's forward pass; None until it is known.
        structure: the structure of its metric; None until the role is known, or if the layer is refused.
        trainable_before: the parts that were trained at the last update; None before the first update.
        told_without_metric: whether there was a warning that it has a gradient but was not seen.
        metric_in_use: the metric tensor of the state that was last found to fit the structure.
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
        """Whether the layer turned out to have no metric."""
        return self.role is not None and self.role.refused is not None

    @property
    def owned(self) -> list[Tensor]:
        """The parameters that this optimizer trains."""
        if not self.not_owned:
            return self.layer.parameters
        pairs = zip(self.layer.names, self.layer.parameters, strict=True)
        return [parameter for name, parameter in pairs if name not in self.not_owned]

    @property
    def key(self) -> Tensor:
        """The parameter whose state is the layer's: one that is owned, since torch saves no others."""
        return next(iter(self.owned), self.layer.weight) if self.not_owned else self.layer.weight

    @property
    def is_idle(self) -> bool:
        """Whether the layer is trainable, but none of its parts has a gradient."""
        free = [parameter for parameter in self.owned if parameter.requires_grad]
        return bool(free) and all(parameter.grad is None for parameter in free)

    def trainable(self) -> list[bool]:
        """Return, for each parameter, whether it is trained."""
        if not self.not_owned:
            return [parameter.requires_grad for parameter in self.layer.parameters]
        pairs = zip(self.layer.names, self.layer.parameters, strict=True)
        return [parameter.requires_grad and name not in self.not_owned for name, parameter in pairs]

    def frozen(self) -> Tensor | None:
        """Return a mask [d] of the columns that are not trained; None if all are trained."""
        trainable = [any(own) for _, own in self.layer.by_part(self.trainable())]
        if all(trainable):
            return None
        device = self.layer.weight.device
        stuck = torch.tensor([not each for each in trainable], device=device)
        return stuck.repeat_interleave(torch.tensor(self.layer.widths, device=device))

    def gradient(self) -> Float[Tensor, "*g out d"] | None:
        """Return the loss gradient as one matrix, with 0 for parts not owned; None if no part has a gradient."""
        gradients = [parameter.grad for parameter in self.layer.parameters]
        if self.not_owned:
            pairs = zip(self.layer.names, gradients, strict=True)
            gradients = [None if name in self.not_owned else gradient for name, gradient in pairs]
        if all(gradient is None for gradient in gradients):
            return None
        return self.layer.gradient([None if each is None else dense(each) for each in gradients])

    def replace_gradient(self, gradient: Float[Tensor, "*g out d"]) -> None:
        """Replace the gradients of the owned parts that have one by a matrix."""
        found: list[Tensor | None] = []
        for parameter in self.moving():
            if parameter is not None:
                parameter.grad = dense(parameter.grad)
            found.append(None if parameter is None else parameter.grad)
        for target, change in zip(self.layer.seen(found), self.layer.steps(gradient, found), strict=True):
            if target is not None:
                target.copy_(change)

    def moving(self) -> list[Any]:
        """Return the parameters, and None for those that are not owned or have no gradient."""
        pairs = zip(self.layer.names, self.layer.parameters, strict=True)
        return [
            parameter if parameter.grad is not None and name not in self.not_owned else None
            for name, parameter in pairs
        ]


def dense(gradient: Tensor | None) -> Tensor:
    """Return the gradient of a parameter that has one, not sparse."""
    assert gradient is not None
    return gradient.to_dense() if gradient.is_sparse else gradient
