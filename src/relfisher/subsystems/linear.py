"""Linear and bilinear layers: one matrix [out, in + 1], bias last."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from relfisher.moments import augment
from relfisher.subsystems.base import Call, Kinds, Part, Subsystem
from relfisher.subsystems.samples import Rows, Sampling

__all__ = ["BilinearSubsystem", "LinearSubsystem", "TransposedLinearSubsystem", "column", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself: a weight that has the subsystem's shape already."""
    return tensor


def column(tensor: Tensor) -> Tensor:
    """Return a bias [out] as a column [out, 1]."""
    return tensor.unsqueeze(-1)


class LinearSubsystem(Subsystem):
    """A linear layer; sequences and positions are samples."""

    kinds: ClassVar[Kinds] = (nn.Linear,)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Subsystem]:
        """Return the weight and bias as one subsystem; none for the one inside attention, which is never called."""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return []
        biases = [] if module.bias is None else [Part(module.bias, column)]
        out, inputs = module.weight.shape
        return [cls(name, module, [Part(module.weight, whole), *biases], (out, inputs + len(biases)))]

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return inputs and outputs."""
        x, z = sampling.rows(call.input(), self.said(call))
        return Rows(augment(x, len(self.parts) - 1), z)


class TransposedLinearSubsystem(LinearSubsystem):
    """A linear layer whose weight is [in, out], as in the GPT-2 of Hugging Face's transformers."""

    kinds: ClassVar[Kinds] = ()

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Subsystem]:
        """Return the weight and bias as one subsystem."""
        inputs, out = module.weight.shape
        parts = [Part(module.weight, torch.t), Part(module.bias, column)]
        return [cls(name, module, parts, (out, inputs + 1))]


class BilinearSubsystem(Subsystem):
    """A bilinear layer: z_o = x1' W_o x2 + b_o, so that x~ = (x1 (x) x2, 1)."""

    kinds: ClassVar[Kinds] = (nn.Bilinear,)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Subsystem]:
        """Return the weight and bias as one subsystem."""
        biases = [] if module.bias is None else [Part(module.bias, column)]
        out, first, second = module.weight.shape
        return [cls(name, module, [Part(module.weight, whole), *biases], (out, first * second + len(biases)))]

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return products of inputs, and outputs."""
        first, second, z = sampling.rows(call.input(0, "input1"), call.input(1, "input2"), self.said(call))
        products = (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)
        return Rows(augment(products, len(self.parts) - 1), z)
