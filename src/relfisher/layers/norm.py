"""Affine parameters of channels: a 2 x 2 block (scale, shift) or a 1 x 1 block per channel.

A unit's inputs are the normalized channel and 1, so that each channel is a group with one unit.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.samples import Rows, Sampling
from relfisher.layers.spread import SPREAD, scalars
from relfisher.moments import augment

__all__ = [
    "BatchNormLayer",
    "BatchNormOperation",
    "GroupNormLayer",
    "GroupNormOperation",
    "InstanceNormLayer",
    "LayerNormLayer",
    "LayerNormOperation",
    "PReLULayer",
]


class _Affine(Layer):
    """A scale, a shift, or both, for each normalized channel."""

    structures = SPREAD

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the scale and shift as one layer; none if the module has neither."""
        kept = [key for key in ("weight", "bias") if getattr(module, key, None) is not None]
        parts = tuple(Part(key, scalars) for key in kept)
        return [cls(name, module, parts, (getattr(module, kept[0]).numel(), 1, len(parts)))] if parts else []

    def normalized(self, x: Tensor) -> Tensor:
        """Return the values that the module multiplies by its scale, [*n, channels]."""
        raise NotImplementedError

    def ordered(self, z: Tensor) -> Tensor:
        """Return the module's output with the channels last; several channel axes are flattened into one."""
        return z.movedim(1, -1)

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return the normalized inputs and the outputs."""
        x, z = sampling.rows(self.normalized(call.input()), self.ordered(self.pre_activation(call)))
        inputs = x.T.unsqueeze(2)
        return Rows(augment(inputs, len(self.parts) - 1), z.T.unsqueeze(2))


class LayerNormLayer(_Affine):
    """The affine parameters of LayerNorm or RMSNorm."""

    kinds: ClassVar[Kinds] = (nn.LayerNorm, nn.RMSNorm)

    def normalized(self, x: Tensor) -> Tensor:
        """Normalize the input by its own statistics."""
        module = self.module
        normalize = functional.rms_norm if isinstance(module, nn.RMSNorm) else functional.layer_norm
        return self.ordered(normalize(x, module.normalized_shape, eps=module.eps))

    def ordered(self, z: Tensor) -> Tensor:
        """Return the output with the normalized axes flattened into one."""
        return z.flatten(z.ndim - len(self.module.normalized_shape))


class LayerNormOperation(LayerNormLayer):
    """The affine parameters of a LayerNorm or RMSNorm with a forward pass of its own, as for channels at axis 1."""

    kinds: ClassVar[Kinds] = ()
    places = (2, 3)

    @property
    def operation(self) -> str:
        """The function."""
        return "rms_norm" if isinstance(self.module, nn.RMSNorm) else "layer_norm"


class GroupNormLayer(_Affine):
    """The affine parameters of GroupNorm."""

    kinds: ClassVar[Kinds] = (nn.GroupNorm,)

    def normalized(self, x: Tensor) -> Tensor:
        """Normalize the input by the statistics of its groups."""
        module = self.module
        return self.ordered(functional.group_norm(x, module.num_groups, eps=module.eps))


class GroupNormOperation(GroupNormLayer):
    """The affine parameters of a GroupNorm with a forward pass of its own."""

    kinds: ClassVar[Kinds] = ()
    places = (2, 3)

    @property
    def operation(self) -> str:
        """The function."""
        return "group_norm"


class BatchNormLayer(_Affine):
    """The affine parameters of BatchNorm, with the statistics that the call used."""

    kinds: ClassVar[Kinds] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def normalized(self, x: Tensor) -> Tensor:
        """Normalize the input by the batch statistics, or by the running statistics in evaluation mode."""
        module = self.module
        if module.training or module.running_mean is None:
            return self.ordered(functional.batch_norm(x, None, None, training=True, eps=module.eps))
        return self.ordered(functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps))


class BatchNormOperation(BatchNormLayer):
    """The affine parameters of a BatchNorm with a forward pass of its own, such as one that ends with an activation."""

    kinds: ClassVar[Kinds] = ()
    places = (3, 4)

    @property
    def operation(self) -> str:
        """The function."""
        return "batch_norm"


class InstanceNormLayer(BatchNormLayer):
    """The affine parameters of InstanceNorm, for a batch or a single sample."""

    kinds: ClassVar[Kinds] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

    def normalized(self, x: Tensor) -> Tensor:
        """Normalize the input by each sample's statistics, or by the running statistics in evaluation mode."""
        module = self.module
        if module.training or module.running_mean is None:
            return self.ordered(functional.instance_norm(self._batched(x), eps=module.eps))
        return super().normalized(self._batched(x))

    def ordered(self, z: Tensor) -> Tensor:
        """Return the module's output with the channels last."""
        return super().ordered(self._batched(z))

    def _batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.ndim == self.module._get_no_batch_dim() else x


class PReLULayer(_Affine):
    """The negative slopes of PReLU: z = max(0, x) + a min(0, x), so that the input of a slope is min(0, x)."""

    kinds: ClassVar[Kinds] = (nn.PReLU,)
    followed = False

    def normalized(self, x: Tensor) -> Tensor:
        """Return the negative parts of the inputs, with one column per slope."""
        return self.ordered(x.clamp(max=0))

    def ordered(self, z: Tensor) -> Tensor:
        """Return the values with one column per slope."""
        slopes = math.prod(self.shape[:1])
        return z.unsqueeze(-1) if slopes == 1 else z.movedim(1, -1)
