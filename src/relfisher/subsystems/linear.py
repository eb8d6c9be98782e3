"""A `torch.nn.Linear` as a subsystem: its parameters as one matrix [out, d], bias last, and its samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relfisher.moments import augment
from relfisher.responses import LinearGaussian, UnitResponse
from relfisher.shapes import Float

__all__ = ["LinearSubsystem"]


class LinearSubsystem:
    """A linear layer inside a model, with the response of its units once that is known.

    Args:
        name: the module's dotted name in the model.
        module: the layer. A bias that is frozen when the subsystem is made belongs to the reference.
    """

    def __init__(self, name: str, module: nn.Linear) -> None:
        self.name = name
        self.module = module
        self.response: UnitResponse = LinearGaussian()
        bias = module.bias
        self.bias: Tensor | None = bias if bias is not None and bias.requires_grad else None

    @property
    def weight(self) -> Tensor:
        """The layer's weight [out, in]."""
        return self.module.weight

    @property
    def parameters(self) -> list[Tensor]:
        """The weight, and the bias where it is trained."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def out(self) -> int:
        """The number of units."""
        return self.module.out_features

    @property
    def d(self) -> int:
        """The number of augmented inputs: parameters of one unit."""
        return self.module.in_features + (self.bias is not None)

    def samples(self, x: Tensor) -> Float[Tensor, "n d"]:
        """Return x~ for the layer's input [..., in]; sequences and positions are samples."""
        rows = x.reshape(-1, x.shape[-1])
        return rows if self.bias is None else augment(rows)

    def gradient(self) -> Float[Tensor, "out d"] | None:
        """Return the loss gradient as one matrix, or None where the weight has none."""
        weight = self.weight.grad
        if weight is None or self.bias is None:
            return weight
        bias = self.bias.grad
        last = torch.zeros_like(self.bias) if bias is None else bias
        return torch.cat([weight, last.unsqueeze(1)], dim=1)

    def move(self, step: Float[Tensor, "out d"], scale: float) -> None:
        """Add `scale * step` to the parameters, in place."""
        inputs = self.module.in_features
        self.weight.add_(step[:, :inputs], alpha=scale)
        if self.bias is not None:
            self.bias.add_(step[:, inputs], alpha=scale)
