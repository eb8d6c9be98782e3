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

    def on(self, device: torch.device) -> Tensor:
        """Return the answer on a device, a boolean []."""
        if device not in self._taken:
            known = next(iter(self._taken.values()), None)
            self._taken[device] = torch.ones((), dtype=torch.bool, device=device) if known is None else known.to(device)
        return self._taken[device]

    def skipped(self) -> Tensor | None:
        """Return whether the step is not taken, as 0 or 1 on some device; None if there was nothing to check."""
        return next(((~flag).float() for flag in self._taken.values()), None)

    def restore(self, changed: Tensor, old: Tensor) -> None:
        """Give a tensor its old values back if the step is not taken."""
        torch.where(self.on(changed.device), changed, old, out=changed)

    def replace(self, kept: Tensor, new: Tensor) -> None:
        """Write new values into a tensor."""
        torch.where(self.on(kept.device), new, kept, out=kept)

    def change(self, step: Tensor) -> Tensor:
        """Return the change of a tensor, which is 0 if the step is not taken."""
        return torch.where(self.on(step.device), step, 0)

    def multiply(self, tensors: Sequence[Tensor], factor: float) -> None:
        """Multiply tensors by a factor."""
        kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.device, _number(tensor.dtype)), []).append(tensor)
        for (device, dtype), own in kinds.items():
            number = torch.full((), factor, dtype=dtype, device=device)
            torch._foreach_mul_(own, torch.where(self.on(device), number, 1.0))


@cache
def _number(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a number that tensors of a dtype are multiplied by."""
    return torch.promote_types(dtype.to_real(), torch.float32)


def _all(flags: Sequence[Tensor]) -> Tensor:
    return flags[0] if len(flags) == 1 else torch.stack(list(flags)).all()
