"""Convolutions: linear layers applied to patches. Samples run over images and positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from relfisher.layers.base import Call, Charts, Kinds, Layer, Part
from relfisher.layers.samples import Rows, Sampling
from relfisher.moments import augment

__all__ = ["ConvLayer", "ConvOperation", "TransposedConvLayer", "TransposedConvOperation"]


class Window(NamedTuple):
    """How a kernel moves: per dimension, except that `pads` is for `torch.nn.functional.pad`, with its `mode`."""

    stride: Sequence[int]
    dilation: Sequence[int]
    pads: Sequence[int]
    mode: str = "constant"


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
        patches = self.patches(x, z.shape[2:], self.window(call))  # [b, in, *positions, *kernel]
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
        return self.weight.shape[2:]

    @property
    def patch(self) -> int:
        """The number of inputs of a unit at one position."""
        return self.d - (len(self.parts) - 1)

    def window(self, call: Call) -> Window:
        """Return how the kernel moves in a call."""
        module = self.module
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        return Window(module.stride, module.dilation, module._reversed_padding_repeated_twice, mode)

    def patches(self, x: Tensor, positions: tuple[int, ...], window: Window) -> Tensor:
        """Extract the patches [b, in, *positions, *kernel] of images [b, in, *size], as views if possible."""
        return self.windows(functional.pad(x, window.pads, mode=window.mode), window.stride, window.dilation)

    def windows(self, x: Tensor, stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
        """Return all windows of the kernel's size and dilation."""
        for place, (size, spread, step) in enumerate(zip(self.kernel, dilation, stride, strict=True)):
            x = x.unfold(2 + place, spread * (size - 1) + 1, step)[..., ::spread]
        return x


class ConvOperation(ConvLayer):
    """A convolution whose class has a forward pass of its own, with the arguments that this gives the function."""

    kinds: ClassVar[Kinds] = ()

    @property
    def operation(self) -> str:
        """The function for its dimensions."""
        return f"conv{len(self.kernel)}d"

    def is_of(self, call: Call, computed: Charts) -> bool:
        """Return whether the call also has as many groups as the module."""
        return (call.argument(6, "groups") or 1) == self.module.groups and super().is_of(call, computed)

    def window(self, call: Call) -> Window:
        """Return how the kernel moves in a call of the function."""
        stride, dilation = (self._each(call.argument(*place) or 1) for place in ((3, "stride"), (5, "dilation")))
        padding = call.argument(4, "padding") or 0
        if padding == "same":
            around = [spread * (size - 1) for size, spread in zip(self.kernel, dilation, strict=True)]
            sides = [(whole // 2, whole - whole // 2) for whole in around]
        else:
            sides = [(each, each) for each in self._each(0 if padding == "valid" else padding)]
        return Window(stride, dilation, [pad for side in reversed(sides) for pad in side])

    def _each(self, number: int | Sequence[int]) -> Sequence[int]:
        """Return one number per dimension."""
        numbers = [number] if isinstance(number, int) else number
        return tuple(numbers) * len(self.kernel) if len(numbers) == 1 else tuple(numbers)


class TransposedConvLayer(ConvLayer):
    """A transposed convolution: a convolution with the flipped kernel over inputs that are spread out with zeros."""

    kinds: ClassVar[Kinds] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the weight and bias as one layer."""
        groups, weight = module.groups, module.weight
        return [cls._of(name, module, partial(_transposed, groups), weight.shape[1], weight[:, 0].numel() // groups)]

    def window(self, call: Call) -> Window:
        """Return how the kernel moves in a call; the pads are those of the convolution that it transposes."""
        return Window(self.module.stride, self.module.dilation, self.module.padding)

    def patches(self, x: Tensor, positions: tuple[int, ...], window: Window) -> Tensor:
        """Extract the patch of each output position, with the kernel's axes flipped back to the weight's order."""
        along = zip(window.stride, x.shape[2:], strict=True)
        spread = x.new_zeros(*x.shape[:2], *(step * (size - 1) + 1 for step, size in along))
        every: Any = (..., *(slice(None, None, step) for step in window.stride))
        spread[every] = x
        pads: list[int] = []
        for place in reversed(range(len(self.kernel))):
            reach = window.dilation[place] * (self.kernel[place] - 1)
            before = reach - window.pads[place]
            pads += [before, positions[place] + reach - before - spread.shape[2 + place]]
        windows = self.windows(functional.pad(spread, pads), (1,) * len(self.kernel), window.dilation)
        return windows.flip(tuple(range(-len(self.kernel), 0)))


class TransposedConvOperation(TransposedConvLayer, ConvOperation):
    """A transposed convolution whose class has a forward pass of its own."""

    kinds: ClassVar[Kinds] = ()

    @property
    def operation(self) -> str:
        """The function for its dimensions."""
        return f"conv_transpose{len(self.kernel)}d"

    def window(self, call: Call) -> Window:
        """Return how the kernel moves in a call of the function."""
        stride, dilation = (self._each(call.argument(*place) or 1) for place in ((3, "stride"), (7, "dilation")))
        return Window(stride, dilation, self._each(call.argument(4, "padding") or 0))
