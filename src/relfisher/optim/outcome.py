"""Whether a step is taken: the device knows, and the host does not wait to be told."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["Outcome"]


class Outcome:
    """Whether a step is taken: if all that it depends on is finite.

    What a step changes is changed by these methods, which leave everything as it is if the step is not taken.

    Args:
        flags: booleans [] on any devices, all of which are true if the step is taken.
    """

    def __init__(self, flags: Iterable[Tensor]) -> None:
        by_device: dict[torch.device, dict[int, Tensor]] = {}
        for flag in flags:
            by_device.setdefault(flag.device, {})[id(flag)] = flag
        self._taken = {device: _all(list(own.values())) for device, own in by_device.items()}
        if len(self._taken) > 1:
            home = next(iter(self._taken))
            everywhere = _all([flag.to(home) for flag in self._taken.values()])
            self._taken = {device: everywhere.to(device) for device in self._taken}
        self._numbers: dict[tuple[torch.device, torch.dtype, float, float], Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the answer on a device, a boolean []."""
        if device not in self._taken:
            known = self.taken()
            self._taken[device] = torch.ones((), dtype=torch.bool, device=device) if known is None else known.to(device)
        return self._taken[device]

    def taken(self) -> Tensor | None:
        """Return whether the step is taken, a boolean [] on some device; None if there was nothing to check."""
        return next(iter(self._taken.values()), None)

    def restore(self, changed: Tensor, old: Tensor) -> None:
        """Give a tensor its old values back if the step is not taken."""
        torch.where(self.on(changed.device), changed, old, out=changed)

    def replace(self, kept: Tensor, new: Tensor) -> None:
        """Write new values into a tensor; what is not finite among them becomes 0."""
        # Both ends are exact; `where` would take five times as long on a CPU.
        kept.lerp_(new.nan_to_num_(0.0, 0.0, 0.0), self._number(kept, 1.0, 0.0).to(kept.dtype))

    def change(self, direction: Tensor, scale: float | Tensor, room: Tensor | None = None) -> Tensor:
        """Return the change of a tensor by a scaled direction, which is 0 if the step is not taken.

        Args:
            direction: the direction, [layers, ...].
            scale: one number for all layers, or one for each, [layers].
            room: a tensor that may hold the result.
        """
        if isinstance(scale, Tensor):
            number = torch.where(self.on(scale.device), scale.to(direction.dtype), 0)
            number = number.view(-1, *(1,) * (direction.ndim - 1))
        else:
            number = self._number(direction, scale, 0.0)
        return torch.nan_to_num(direction, 0.0, 0.0, 0.0, out=room).mul_(number)

    def multiply(self, tensors: Sequence[Tensor], factor: float) -> None:
        """Multiply tensors by a factor."""
        kinds = {(tensor.device, tensor.dtype) for tensor in tensors}
        for kind in kinds:
            own = [tensor for tensor in tensors if len(kinds) == 1 or (tensor.device, tensor.dtype) == kind]
            torch._foreach_mul_(own, self._number(own[0], factor, 1.0))

    def _number(self, like: Tensor, taken: float, skipped: float) -> Tensor:
        """Return a number [] by which a tensor can be multiplied, depending on whether the step is taken."""
        key = like.device, _number(like.dtype), taken, skipped
        if key not in self._numbers:
            device, dtype = key[:2]
            on = self.on(device)
            if (taken, skipped) == (1.0, 0.0):
                self._numbers[key] = on.to(dtype)
            else:
                self._numbers[key] = torch.where(on, torch.full((), taken, dtype=dtype, device=device), skipped)
        return self._numbers[key]


@cache
def _number(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a number that tensors of a dtype are multiplied by."""
    return torch.promote_types(dtype.to_real(), torch.float32)


def _all(flags: Sequence[Tensor]) -> Tensor:
    return flags[0] if len(flags) == 1 else torch.stack(list(flags)).all()
