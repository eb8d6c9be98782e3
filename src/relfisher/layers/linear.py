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
    """A matrix by which a module of any class multiplies: [out, in] as for `linear`, or [in, out] as for `matmul`.

    Its first product settles which it is, and whether the vector that is named as its bias is added. Until then it has
    the form of `linear` if the bias fits.
    """

    kinds: ClassVar[Kinds] = ()

    @property
    def operation(self) -> str:
        """A function that multiplies by it."""
        return "linear"

    @property
    def settled(self) -> bool:
        """Whether its form is known."""
        return bool(vars(self).get("_settled", False))

    @property
    def bias(self) -> Tensor | None:
        """The vector that may be its bias."""
        return self.parameters[1] if len(self.parts) > 1 else None

    def settle(self, *, turned: bool, with_bias: bool) -> bool:
        """Take on the form of a product, unless another has settled it before.

        Args:
            turned: True for a weight [in, out].
            with_bias: whether the bias is added.

        Returns:
            Whether it has this form.
        """
        form = _form(self.parts, self.weight, turned=turned, with_bias=with_bias)
        if self.settled:
            return form == (self.parts, self.shape)
        for key in ("_slots", "_views", "widths"):
            vars(self).pop(key, None)
        vars(self).update(zip(("parts", "shape"), form, strict=True), _settled=True)
        return True

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return a layer for each matrix of the module's own, with the vector of units that is named as its bias."""
        own = dict(module.named_parameters(recurse=False))
        return [_operation(name, module, key, own) for key, parameter in own.items() if parameter.ndim == 2]


# What a bias is called beside a matrix.
_BIAS_NAMES = (("weight", "bias"), ("kernel", "bias"), ("W", "b"), ("w", "b"))


def _operation(name: str, module: Any, key: str, own: Mapping[str, nn.Parameter]) -> LinearOperation:
    weight = own[key]
    named = (key.replace(*names) for names in _BIAS_NAMES if names[0] in key)
    other = next(
        (each for each in named if each in own and own[each].shape in (weight.shape[:1], weight.shape[1:])), ""
    )
    parts = (Part(key, whole), *([Part(other, column)] if other else []))
    turned = bool(other) and own[other].shape != weight.shape[:1]
    suffix = "" if key == "weight" else f".{key}" if name else key
    return LinearOperation(name, module, *_form(parts, weight, turned=turned, with_bias=bool(other)), suffix)


def _form(
    parts: tuple[Part, ...], weight: Tensor, *, turned: bool, with_bias: bool
) -> tuple[tuple[Part, ...], tuple[int, ...]]:
    """Return the parts and the shape of a matrix in one of its forms."""
    first, rest = Part(parts[0].attribute, torch.t if turned else whole), parts[1:] if with_bias else ()
    out, inputs = reversed(weight.shape) if turned else weight.shape
    return (first, *rest), (out, inputs + len(rest))


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
