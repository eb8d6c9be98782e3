"""Affine parameters of a channel: a block of 2 x 2 (scale, shift) or 1 x 1 a channel.

The normalized input of a channel and 1 are the inputs of one unit, so that a channel is a group with one unit.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from relfisher.layers.base import Call, Kinds, Layer, Part
from relfisher.layers.samples import Rows, Sampling
from relfisher.moments import augment

__all__ = [
    "BatchNormLayer",
    "GroupNormLayer",
    "InstanceNormLayer",
    "LayerNormLayer",
    "PReLULayer",
]


def channels(tensor: Tensor) -> Tensor:
    """Return a parameter of any shape as [channels, 1, 1]: a group with one unit and one input each."""
    return tensor.reshape(-1, 1, 1)


class _Affine(Layer):
    """A scale, a shift, or both, for each channel of what the module normalizes."""

    structures = ("shared", "neuron", "diagonal")

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Layer]:
        """Return the scale and shift as one layer; none if the module has neither."""
        kept = [key for key in ("weight", "bias") if getattr(module, key, None) is not None]
        parts = tuple(Part(key, channels) for key in kept)
        return [cls(name, module, parts, (getattr(module, kept[0]).numel(), 1, len(parts)))] if parts else []

    def normalized(self, x: Tensor) -> Tensor:
        """Return what the module multiplies by its scale, [*n, channels]."""
        raise NotImplementedError

    def ordered(self, z: Tensor) -> Tensor:
        """Return the module's output with the channels last, flattened where there are several axes of them."""
        return z.movedim(1, -1)

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return normalized inputs and outputs."""
        x, z = sampling.rows(self.normalized(call.input()), self.ordered(self.pre_activation(call)))
        inputs = x.T.unsqueeze(2)
        return Rows(augment(inputs, len(self.parts) - 1), z.T.unsqueeze(2))


class LayerNormLayer(_Affine):
    """The affine of LayerNorm or RMSNorm."""

    kinds: ClassVar[Kinds] = (nn.LayerNorm, nn.RMSNorm)

    def normalized(self, x: Tensor) -> Tensor:
        """Return the input over its own statistics."""
        module = self.module
        normalize = functional.rms_norm if isinstance(module, nn.RMSNorm) else functional.layer_norm
        return self.ordered(normalize(x, module.normalized_shape, eps=module.eps))

    def ordered(self, z: Tensor) -> Tensor:
        """Return the output with the normalized axes as one."""
        return z.flatten(z.ndim - len(self.module.normalized_shape))


class GroupNormLayer(_Affine):
    """The affine of GroupNorm."""

    kinds: ClassVar[Kinds] = (nn.GroupNorm,)

    def normalized(self, x: Tensor) -> Tensor:
        """Return the input over its groups' statistics."""
        module = self.module
        return self.ordered(functional.group_norm(x, module.num_groups, eps=module.eps))


class BatchNormLayer(_Affine):
    """The affine of BatchNorm, with the statistics that the call used."""

    kinds: ClassVar[Kinds] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def normalized(self, x: Tensor) -> Tensor:
        """Return the input over the batch's statistics, or over the running ones in evaluation mode."""
        module = self.module
        if module.training or module.running_mean is None:
            return self.ordered(functional.batch_norm(x, None, None, training=True, eps=module.eps))
        return self.ordered(functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps))


class InstanceNormLayer(BatchNormLayer):
    """The affine of InstanceNorm, of batches or of one sample."""

    kinds: ClassVar[Kinds] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

    def normalized(self, x: Tensor) -> Tensor:
        """Return the input over each sample's statistics, or over the running ones in evaluation mode."""
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
    """The slopes of PReLU below 0: z = max(0, x) + a min(0, x), so that the input of a slope is min(0, x)."""

    kinds: ClassVar[Kinds] = (nn.PReLU,)
    followed = False

    def normalized(self, x: Tensor) -> Tensor:
        """Return the inputs below 0, one column a slope."""
        return self.ordered(x.clamp(max=0))

    def ordered(self, z: Tensor) -> Tensor:
        """Return the values with one column a slope."""
        slopes = math.prod(self.shape[:1])
        return z.unsqueeze(-1) if slopes == 1 else z.movedim(1, -1)
