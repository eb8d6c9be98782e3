"""Parameters that are spread over samples, element by element: scales, shifts, tables of positions, free tokens.

With z = x p or z = x + p, where p is broadcast along some axes of z, each element of p is a unit with one input: x, or
1. The axes along which p is the same are the samples.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.chart import Chart
from relfisher.layers.samples import Rows, Sampling

__all__ = ["SpreadOperation", "is_spread", "scalars", "settle_as_spread", "spread_rows"]

#: The structures of a layer with one number for each unit.
SPREAD = ("shared", "neuron", "diagonal")


def scalars(tensor: Tensor) -> Tensor:
    """Reshape a parameter of any shape to [numbers, 1, 1]: groups with one unit and one input each."""
    return tensor.reshape(-1, 1, 1)


def is_spread(layer: Layer) -> bool:
    """Return whether an operation turned out to spread its parameter over samples."""
    return layer.parts[0].view is scalars


def settle_as_spread(layer: Layer, chart: Chart | None) -> bool:
    """Let a layer take on the form of a parameter that is spread over samples, unless another has settled it.

    Args:
        layer: the layer, of which the first part is the parameter.
        chart: how what is spread is computed from the parameter and others; None if it is the parameter.

    Returns:
        Whether it has this form.
    """
    part = Part(layer.parts[0].attribute, scalars, chart)
    settled = layer.settle((part,), (math.prod(layer.weight.shape), 1, 1))
    if settled:
        vars(layer).update(structures=SPREAD)
    return settled


def spread_rows(call: Call, sampling: Sampling, numbers: int) -> Rows:
    """Return the input and the output of each number of a parameter: x [numbers, n, 1] and z [numbers, n, 1].

    A number that several elements of a sample use has the root of the sum of their squared inputs, which gives the
    metric of linear units exactly, and the output of one of them.

    Args:
        call: the call. Its arguments are the places of the numbers, what these are multiplied by or None, and the
            numbers from 0 on, of which the places may be a view.
        sampling: the selection of samples.
        numbers: the number of numbers.
    """
    places, x, counted = call.args
    z = call.output.detach()
    spread = places.expand(z.shape)
    own = [axis for axis in range(z.ndim) if z.shape[axis] > 1 and spread.stride(axis)]
    shared = [axis for axis in range(z.ndim) if axis not in own]
    order = (*shared, *own)
    used = spread.permute(order)[(0,) * len(shared)].flatten()
    values = [z] if x is None else [z, x.detach().expand(z.shape)]
    rows = sampling.rows(*(value.permute(order) for value in values), trailing=len(own))
    z, *inputs = [each.reshape(len(each), used.numel()) for each in rows]
    if not (used._base is counted and used.is_contiguous() and len(used) == numbers):  # no device is waited for
        squares = inputs[0].square() if inputs else torch.ones_like(z)
        inputs = [z.new_zeros(len(z), numbers).index_add_(1, used, squares.to(z.dtype)).sqrt_()]
        z = z.new_zeros(len(z), numbers).index_copy_(1, used, z)
    x = inputs[0] if inputs else torch.ones_like(z)
    return Rows(x.T.unsqueeze(2), z.T.unsqueeze(2))


class SpreadOperation(Layer):
    """A parameter of a module of any class, which multiplies data element by element, is added to them or put beside.

    These are the vectors and numbers of a module, and what is named as the bias of one of its matrices. Its matrices
    may turn out to be spread, too.
    """

    kinds: ClassVar[Kinds] = ()
    structures = SPREAD

    @classmethod
    def of(cls, name: str, module: nn.Module, key: str, parameter: Tensor) -> Layer:
        """Return a parameter of a module as a layer."""
        part = Part(key, scalars)
        return cls(name, module, (part,), (parameter.numel(), 1, 1), f".{key}" if name else key)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return each parameter of the module's own as a layer."""
        return [cls.of(name, module, key, parameter) for key, parameter in module.named_parameters(recurse=False)]

    @property
    def operation(self) -> str:
        """A function that spreads it."""
        return "add"

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the input and the output of each number."""
        return spread_rows(call, sampling, self.shape[0])
