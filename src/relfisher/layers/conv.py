"""Convolutions: linear layers applied to patches. Samples run over images and positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.samples import Rows, Sampling
from relfisher.moments import augment

__all__ = ["ConvLayer", "TransposedConvLayer"]


def _grouped(groups: int, tensor: Tensor) -> Tensor:
    """Reshape [g * out, ...] to [g, out, ...]; return it unchanged for one group."""
    return tensor if groups == 1 else torch.unflatten(tensor, 0, (groups, -1))


def _grouped_column(groups: int, tensor: Tensor) -> Tensor:
    return _grouped(groups, tensor).unsqueeze(-1)


def _transposed(groups: int, tensor: Tensor) -> Tensor:
    """Reshape the weight [g * in, out, k...] of a transposed convolution to [g, out, in, k...]."""
    return _grouped(groups, tensor).transpose(int(groups > 1), int(groups > 1) + 1)


class ConvLayer(Layer):
    """A convolution in 1 to 3 dimensions, with stride, padding, dilation and groups."""

    kinds: ClassVar[Kinds] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the weight and bias as one layer."""
        groups, weight = module.groups, module.weight
        return [cls._of(name, module, partial(_grouped, groups), weight.shape[0] // groups, weight[0].numel())]

    @classmethod
    def _of(cls, name: str, module: Any, view: Callable[[Tensor], Tensor], out: int, patch: int) -> Layer:
        parts: tuple[Part, ...] = (Part("weight", view),)
        if module.bias is not None:
            parts += (Part("bias", partial(_grouped_column, module.groups)),)
        shape = (out, patch + len(parts) - 1)
        return cls(name, module, parts, shape if module.groups == 1 else (module.groups, *shape))

    @property
    def unit_axis(self) -> int | None:
        """The axis of the channels; None if they are in groups."""
        return -1 - len(self.kernel) if self.module.groups == 1 else None

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the patches and the outputs. A mask may cover whole images or output positions."""
        dimensions = len(self.kernel)
        x, z = call.input(), self.pre_activation(call)
        if x.ndim == dimensions + 1:  # without a batch dimension
            x, z = x.unsqueeze(0), z.unsqueeze(0)
        keep = sampling.kept(z.movedim(1, -1).shape[:-1])
        patches = self.patches(x, z.shape[2:])  # [b, in, *positions, *kernel]
        order = (0, *range(2, 2 + dimensions), 1, *range(2 + dimensions, 2 + 2 * dimensions))
        x_rows, z_rows = patches.permute(order), z.movedim(1, -1)
        places = z_rows.shape[:-1]
        real = None if keep is None else keep.nonzero().squeeze(1)
        chosen = sampling.chosen(math.prod(places) if real is None else len(real), z.device)
        if real is not None:
            chosen = real if chosen is None else real[chosen]
        if chosen is not None:
            where = torch.unravel_index(chosen, places)
            x_rows, z_rows = x_rows[where], z_rows[where]
        groups = self.module.groups
        x_rows = x_rows.reshape(-1, groups, self.patch)
        z_rows = z_rows.reshape(-1, groups, z.shape[1] // groups)
        if groups == 1:
            x_rows, z_rows = x_rows.squeeze(1), z_rows.squeeze(1)
        else:
            x_rows, z_rows = x_rows.transpose(0, 1), z_rows.transpose(0, 1)
        return Rows(augment(x_rows, len(self.parts) - 1), z_rows)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel size in each dimension."""
        size: tuple[int, ...] = self.module.kernel_size
        return size

    @property
    def patch(self) -> int:
        """The number of inputs of a unit at one position."""
        return self.d - (len(self.parts) - 1)

    def patches(self, x: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Extract the patches [b, in, *positions, *kernel] of images [b, in, *size], as views if possible."""
        module = self.module
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        return self.windows(x, module.stride)

    def windows(self, x: Tensor, stride: tuple[int, ...]) -> Tensor:
        """Return all windows of the kernel's size and dilation."""
        for place, (size, dilation, step) in enumerate(zip(self.kernel, self.module.dilation, stride, strict=True)):
            x = x.unfold(2 + place, dilation * (size - 1) + 1, step)[..., ::dilation]
        return x


class TransposedConvLayer(ConvLayer):
    """A transposed convolution: a convolution with the flipped kernel over inputs that are spread out with zeros."""

    kinds: ClassVar[Kinds] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the weight and bias as one layer."""
        groups, weight = module.groups, module.weight
        return [cls._of(name, module, partial(_transposed, groups), weight.shape[1], weight[:, 0].numel() // groups)]

    def patches(self, x: Tensor, positions: tuple[int, ...]) -> Tensor:
        """Extract the patch of each output position, with the kernel's axes flipped back to the weight's order."""
        module = self.module
        spread = x.new_zeros(*x.shape[:2], *(step * (size - 1) + 1 for step, size in self._along(x)))
        every: Any = (..., *(slice(None, None, step) for step in module.stride))
        spread[every] = x
        pads: list[int] = []
        for place in reversed(range(len(self.kernel))):
            reach = module.dilation[place] * (self.kernel[place] - 1)
            before = reach - module.padding[place]
            pads += [before, positions[place] + reach - before - spread.shape[2 + place]]
        windows = self.windows(functional.pad(spread, pads), (1,) * len(self.kernel))
        return windows.flip(tuple(range(-len(self.kernel), 0)))

    def _along(self, x: Tensor) -> zip[tuple[int, int]]:
        return zip(self.module.stride, x.shape[2:], strict=True)
