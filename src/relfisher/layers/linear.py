"""Linear and bilinear layers: one matrix [out, in + 1], with the bias last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.samples import Rows, Sampling
from relfisher.moments import augment

__all__ = ["BilinearLayer", "LinearLayer", "LinearOperation", "TransposedLinearLayer", "column", "whole"]


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor unchanged, for a weight that already has the layer's shape."""
    return tensor


def column(tensor: Tensor) -> Tensor:
    """Return a bias [out] as a column [out, 1]."""
    return tensor.unsqueeze(-1)


def with_bias(module: Any, weight: Part) -> tuple[Part, ...]:
    """Return the part of a module's weight and, if it has a bias [out], the part of the bias."""
    return (weight,) if module.bias is None else (weight, Part("bias", column))


class LinearLayer(Layer):
    """A linear layer. Positions of a sequence are samples."""

    kinds: ClassVar[Kinds] = (nn.Linear,)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the weight and bias as one layer; none for the projection inside attention, which is never called."""
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return []
        parts = with_bias(module, Part("weight", whole))
        out, inputs = module.weight.shape
        return [cls(name, module, parts, (out, inputs + len(parts) - 1))]

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the inputs and the outputs."""
        x, z = sampling.rows(call.input(), self.pre_activation(call))
        return Rows(augment(x, len(self.parts) - 1), z)


class TransposedLinearLayer(LinearLayer):
    """A linear layer with weight [in, out], as in GPT-2 from Hugging Face's transformers."""

    kinds: ClassVar[Kinds] = ()

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the weight and bias as one layer."""
        inputs, out = module.weight.shape
        return [cls(name, module, (Part("weight", torch.t), Part("bias", column)), (out, inputs + 1))]


class LinearOperation(LinearLayer):
    """A weight [out, in] that a module of any class passes to `torch.nn.functional.linear`."""

    kinds: ClassVar[Kinds] = ()

    @property
    def operation(self) -> str:
        """The function."""
        return "linear"

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return a layer for each matrix of the module's own, with the vector of units that is named as its bias."""
        own = dict(module.named_parameters(recurse=False))
        return [_operation(name, module, key, own) for key, parameter in own.items() if parameter.ndim == 2]


def _operation(name: str, module: Any, key: str, own: Mapping[str, nn.Parameter]) -> LinearOperation:
    weight, other = own[key], key.replace("weight", "bias")
    bias = own[other] if other != key and other in own and own[other].shape == weight.shape[:1] else None
    parts = (Part(key, whole),) if bias is None else (Part(key, whole), Part(other, column))
    suffix = "" if key == "weight" else f".{key}" if name else key
    return LinearOperation(name, module, parts, (weight.shape[0], weight.shape[1] + len(parts) - 1), suffix)


class BilinearLayer(Layer):
    """A bilinear layer: z_o = x1' W_o x2 + b_o, so that x~ = (x1 (x) x2, 1)."""

    kinds: ClassVar[Kinds] = (nn.Bilinear,)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the weight and bias as one layer."""
        parts = with_bias(module, Part("weight", whole))
        out, first, second = module.weight.shape
        return [cls(name, module, parts, (out, first * second + len(parts) - 1))]

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the products of the inputs, and the outputs."""
        first, second, z = sampling.rows(call.input(0, "input1"), call.input(1, "input2"), self.pre_activation(call))
        products = (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)
        return Rows(augment(products, len(self.parts) - 1), z)
