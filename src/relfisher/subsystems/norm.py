"""Affine parameters of a channel: a block of 2 x 2 (scale, shift) or 1 x 1 a channel.

The normalised input of a channel and 1 are the inputs of one unit, so that a channel is a group with one unit.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from relfisher.moments import augment
from relfisher.subsystems.base import Call, Kinds, Part, Subsystem
from relfisher.subsystems.samples import Rows, Sampling

__all__ = [
    "BatchNormSubsystem",
    "GroupNormSubsystem",
    "InstanceNormSubsystem",
    "LayerNormSubsystem",
    "PReLUSubsystem",
]


def channels(tensor: Tensor) -> Tensor:
    """Return a parameter of any shape as [channels, 1, 1]: a group with one unit and one input each."""
    return tensor.reshape(-1, 1, 1)


class _Affine(Subsystem):
    """A scale, a shift, or both, for each channel of what the module normalises."""

    structures = ("shared", "neuron", "diagonal")

    @classmethod
    def found_in(cls, name: str, module: Any) -> list[Subsystem]:
        """Return the scale and shift as one subsystem; none if the module has neither."""
        kept = [module.weight, getattr(module, "bias", None)]
        parts = [Part(parameter, channels) for parameter in kept if parameter is not None]
        return [cls(name, module, parts, (parts[0].parameter.numel(), 1, len(parts)))] if parts else []

    def normalised(self, x: Tensor) -> Tensor:
        """Return what the module multiplies by its scale, [*n, channels]."""
        raise NotImplementedError

    def ordered(self, z: Tensor) -> Tensor:
        """Return the module's output with the channels last, flattened where there are several axes of them."""
        return z.movedim(1, -1)

    def rows(self, call: Call, sampling: Sampling) -> Rows:
        """Return normalised inputs and outputs."""
        x, z = sampling.rows(self.normalised(call.input()), self.ordered(self.said(call)))
        inputs = x.T.unsqueeze(2)
        return Rows(augment(inputs, len(self.parts) - 1), z.T.unsqueeze(2))


class LayerNormSubsystem(_Affine):
    """The affine of LayerNorm or RMSNorm."""

    kinds: ClassVar[Kinds] = (nn.LayerNorm, nn.RMSNorm)

    def normalised(self, x: Tensor) -> Tensor:
        """Return the input over its own statistics."""
        module = self.module
        normalise = functional.rms_norm if isinstance(module, nn.RMSNorm) else functional.layer_norm
        return self.ordered(normalise(x, module.normalized_shape, eps=module.eps))

    def ordered(self, z: Tensor) -> Tensor:
        """Return the output with the normalised axes as one."""
        return z.flatten(z.ndim - len(self.module.normalized_shape))


class GroupNormSubsystem(_Affine):
    """The affine of GroupNorm."""

    kinds: ClassVar[Kinds] = (nn.GroupNorm,)

    def normalised(self, x: Tensor) -> Tensor:
        """Return the input over its groups' statistics."""
        module = self.module
        return self.ordered(functional.group_norm(x, module.num_groups, eps=module.eps))


class BatchNormSubsystem(_Affine):
    """The affine of BatchNorm, with the statistics that the call used."""

    kinds: ClassVar[Kinds] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

    def normalised(self, x: Tensor) -> Tensor:
        """Return the input over the batch's statistics, or over the running ones in evaluation mode."""
        module = self.module
        if module.training or module.running_mean is None:
            return self.ordered(functional.batch_norm(x, None, None, training=True, eps=module.eps))
        return self.ordered(functional.batch_norm(x, module.running_mean, module.running_var, eps=module.eps))


class InstanceNormSubsystem(BatchNormSubsystem):
    """The affine of InstanceNorm, of batches or of one sample."""

    kinds: ClassVar[Kinds] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

    def normalised(self, x: Tensor) -> Tensor:
        """Return the input over each sample's statistics, or over the running ones in evaluation mode."""
        module = self.module
        if module.training or module.running_mean is None:
            return self.ordered(functional.instance_norm(self._batched(x), eps=module.eps))
        return super().normalised(self._batched(x))

    def ordered(self, z: Tensor) -> Tensor:
        """Return the module's output with the channels last."""
        return super().ordered(self._batched(z))

    def _batched(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0) if x.ndim == self.module._get_no_batch_dim() else x


class PReLUSubsystem(_Affine):
    """The slopes of PReLU below 0: z = max(0, x) + a min(0, x), so that the input of a slope is min(0, x)."""

    kinds: ClassVar[Kinds] = (nn.PReLU,)
    followed = False

    def normalised(self, x: Tensor) -> Tensor:
        """Return the inputs below 0, one column a slope."""
        return self.ordered(x.clamp(max=0))

    def ordered(self, z: Tensor) -> Tensor:
        """Return the values with one column a slope."""
        slopes = math.prod(self.shape[:1])
        return z.unsqueeze(-1) if slopes == 1 else z.movedim(1, -1)
