"""Stochastic rounding to bfloat16: to one of the two nearest numbers, by chance, so that the mean is the number itself.

What is rounded to the nearest number stands still where it changes by less than half of the distance between numbers,
2^-8 of it. By chance, a number z between the neighbours a < z < b becomes b with the probability (z - a) / (b - a)
(Forsythe 1950; Gupta, Agrawal, Gopalakrishnan & Narayanan 2015). The error is less than b - a <= 2^-7 |z|, its standard
deviation at most 2^-8 |z|, and its mean 0: errors of many steps do not add up, but for the root of their number.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["LOW", "Rounding", "check_state_dtype"]

#: The dtype of what is rounded.
LOW = torch.bfloat16

# As many numbers are rounded at a time, so that the bits take little memory.
_TOGETHER = 1 << 22

# Of single precision, bfloat16 has the upper half of the bits.
_LOWER, _UPPER = 0xFFFF, -0x10000


def check_state_dtype(given: object) -> None:
    """Raise ValueError unless this is a dtype in which momentum and average can be kept, or None."""
    if given is not None and given is not LOW:
        raise ValueError(f"state_dtype must be torch.bfloat16, or None for the precision of the weights, got {given!r}")


class Rounding:
    """Rounds what a step keeps, in the same way whenever the same step is taken.

    Args:
        seed: a number for the step, and for what is rounded in it.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def rounded(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return values in a dtype, rounded by chance if that is bfloat16 and theirs is not.

        Numbers of more than single precision are first rounded to that. Each call draws new bits.
        """
        if dtype != LOW or values.dtype == LOW:
            return values
        found = torch.empty(values.shape, dtype=LOW, device=values.device)
        parts = (torch.split(each.reshape(-1), _TOGETHER) for each in (found, values))
        for target, own in zip(*parts, strict=True):
            bits = own.float().contiguous().view(torch.int32)
            target.copy_(((bits + self._noise(bits)) & _UPPER).view(torch.float32))
        return found

    def _noise(self, like: Tensor) -> Tensor:
        """Return whole numbers from 0 to 2^16 - 1, all alike probable."""
        generator = self._generators.get(like.device)
        if generator is None:
            generator = self._generators[like.device] = torch.Generator(like.device).manual_seed(self._seed)
        four = torch.empty(-(-len(like) // 4), dtype=torch.int64, device=like.device)  # a draw is four numbers
        four.random_(-(1 << 63), None, generator=generator)
        return four.view(torch.int16)[: len(like)].to(torch.int32) & _LOWER
