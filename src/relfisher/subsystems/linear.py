"""A `torch.nn.Linear` as a subsystem: its parameters as one matrix [out, d], bias last, and its samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from relfisher.moments import augment
from relfisher.responses import LinearGaussian, UnitResponse
from relfisher.shapes import Float
from relfisher.structures import Structure

__all__ = ["LinearSubsystem"]


class LinearSubsystem:
    """A linear layer inside a model.

    Args:
        name: the module's dotted name in the model.
        module: the layer.

    Attributes:
        response: what its units say; linear until the activation that follows is known.
        structure: how its running metric is kept; None until it is chosen.
    """

    def __init__(self, name: str, module: nn.Linear) -> None:
        self.name = name
        self.module = module
        self.weight: Tensor = module.weight
        self.bias: Tensor | None = module.bias
        self.response: UnitResponse = LinearGaussian()
        self.structure: Structure | None = None

    @property
    def parameters(self) -> list[Tensor]:
        """The weight, and the bias where there is one."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def out(self) -> int:
        """The number of units."""
        return self.weight.shape[0]

    @property
    def d(self) -> int:
        """The number of augmented inputs: parameters of one unit."""
        return self.weight.shape[1] + (self.bias is not None)

    def samples(self, x: Tensor) -> Float[Tensor, "n d"]:
        """Return x~ for the layer's input [..., in]; sequences and positions are samples."""
        rows = x.reshape(-1, x.shape[-1])
        return rows if self.bias is None else augment(rows)

    def gradient(self) -> Float[Tensor, "out d"] | None:
        """Return the loss gradient as one matrix, or None where the weight has none."""
        weight = self.weight.grad
        if weight is None or self.bias is None:
            return weight
        bias = torch.zeros_like(self.bias) if self.bias.grad is None else self.bias.grad
        return torch.cat([weight, bias.unsqueeze(1)], dim=1)

    def move(self, step: Float[Tensor, "out d"], scale: float) -> None:
        """Add `scale * step` to the parameters that have a gradient, in place."""
        inputs = self.weight.shape[1]
        self.weight.add_(step[:, :inputs], alpha=scale)
        if self.bias is not None and self.bias.grad is not None:
            self.bias.add_(step[:, inputs], alpha=scale)
