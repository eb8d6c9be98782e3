"""Linear and bilinear layers: one matrix [out, in + 1], with the bias last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.chart import Chart
from relfisher.layers.samples import Rows, Sampling
from relfisher.layers.spread import SpreadOperation, is_spread, spread_rows
from relfisher.layers.table import is_table, table_rows
from relfisher.moments import augment

__all__ = [
    "BilinearLayer",
    "LinearLayer",
    "LinearOperation",
    "TransposedLinearLayer",
    "column",
    "linear_rows",
    "own_parameters",
    "whole",
]


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

    @property
    def is_linear(self) -> bool:
        """True, but for an operation that turns out to be another one."""
        return True

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
        return linear_rows(self, call, sampling)


def linear_rows(layer: Layer, call: Call, sampling: Sampling) -> Rows:
    """Return the inputs of a matrix, followed by 1 if it has a bias, and the outputs."""
    x, z = sampling.rows(call.input(), layer.pre_activation(call))
    return Rows(augment(x, len(layer.parts) - 1), z)


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

    A stack of matrices [stack, out, in] or [stack, in, out], such as those of experts, is a layer in groups. Its first
    use settles which it is, and whether the vector that is named as its bias is added, or that it is spread over
    samples, such as a table of positions, or that its rows are looked up. Until then it has the form of `linear` if the
    bias fits.
    """

    kinds: ClassVar[Kinds] = ()

    @property
    def operation(self) -> str:
        """A function that multiplies by it."""
        return "linear"

    @property
    def is_linear(self) -> bool:
        """Whether it multiplies by its matrix, as far as it is known: it is not spread over samples, and no table."""
        return not (is_spread(self) or is_table(self))

    @property
    def fan_in(self) -> int:
        """The number of inputs of a unit that one sample may have."""
        return 1 if is_table(self) else self.d

    @property
    def bias(self) -> Tensor | None:
        """The vector that may be its bias."""
        return self.parameters[-1] if len(self.parts) > 1 else None

    def settle_as(self, *, turned: bool, with_bias: bool, chart: Chart | None) -> bool:
        """Take on the form of a product, unless another has settled it before.

        Args:
            turned: True for a weight [in, out].
            with_bias: whether the bias is added.
            chart: how the weight is computed.

        Returns:
            Whether it has this form.
        """
        form, shape = _form(self.parts, self.weight, turned=turned, with_bias=with_bias)
        return self.settle((replace(form[0], chart=chart), *form[1:]), shape)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return a layer for each matrix or stack of the module's own, with the units that are named as its bias.

        All other parameters, biases among them, may be spread over samples. Parameters in a list or a dictionary are
        the module's own.
        """
        own = own_parameters(module)
        biases = {_bias(key, own) for key, parameter in own.items() if parameter.ndim in (2, 3)}
        matrices = [key for key, parameter in own.items() if parameter.ndim in (2, 3) and key not in biases]
        rest = [key for key in own if key not in matrices and own[key].is_contiguous()]
        spread = [SpreadOperation.of(name, module, key, own[key]) for key in rest]
        return [*(_operation(name, module, key, own) for key in matrices), *spread]

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the inputs and the outputs, for each matrix of a stack, or for each number that is spread."""
        if is_spread(self):
            return spread_rows(call, sampling, self.shape[0])
        if is_table(self):  # an index may count from the end
            from_start = replace(call, args=(call.input() % self.d,))
            return table_rows(self, from_start, sampling, call.kwargs["padding_idx"])
        if len(self.shape) == 2:
            return super().rows(call, sampling)
        x, z = (each.transpose(0, 1) for each in sampling.rows(call.input(), self.pre_activation(call), trailing=2))
        return Rows(augment(x, len(self.parts) - 1), z)


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module's own by name, those in its lists and dictionaries among them."""
    own: dict[str, Tensor] = dict(module.named_parameters(recurse=False))
    for key, child in module.named_children():
        if isinstance(child, nn.ParameterList | nn.ParameterDict):
            own |= {f"{key}.{name}": parameter for name, parameter in child.named_parameters(recurse=False)}
    return own


# What a bias is called beside a matrix.
_BIAS_NAMES = (("weights", "biases"), ("weight", "bias"), ("kernel", "bias"), ("W", "b"), ("w", "b"))


def _swapped(tensor: Tensor) -> Tensor:
    """Return the transpose of a matrix, or of each of a stack."""
    return tensor.mT


def _bias(key: str, own: Mapping[str, Tensor]) -> str | None:
    """Return the name of the parameter [*stack, units] or [*stack, 1, units] that is named as the bias of a matrix."""
    *stack, rows, columns = own[key].shape
    shapes = [(*stack, *one, units) for units in (rows, columns) for one in ([], [1])]
    named = (key.replace(*names) for names in _BIAS_NAMES if names[0] in key)
    return next((each for each in named if each in own and each != key and tuple(own[each].shape) in shapes), None)


def _operation(name: str, module: Any, key: str, own: Mapping[str, Tensor]) -> LinearOperation:
    weight, bias = own[key], _bias(key, own)
    parts = [Part(key, whole)]
    if bias is not None:
        parts.append(Part(bias, column if own[bias].ndim == weight.ndim - 1 else _swapped))
    turned = bias is not None and own[bias].shape[-1] != weight.shape[-2]
    suffix = "" if key == "weight" else f".{key}" if name else key
    form = _form(tuple(parts), weight, turned=turned, with_bias=bias is not None)
    return LinearOperation(name, module, *form, suffix)


def _form(
    parts: tuple[Part, ...], weight: Tensor, *, turned: bool, with_bias: bool
) -> tuple[tuple[Part, ...], tuple[int, ...]]:
    """Return the parts and the shape of a matrix in one of its forms."""
    first, rest = Part(parts[0].attribute, _swapped if turned else whole), parts[1:] if with_bias else ()
    *stack, rows, columns = weight.shape
    out, inputs = (columns, rows) if turned else (rows, columns)
    return (first, *rest), (*stack, out, inputs + len(rest))


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
