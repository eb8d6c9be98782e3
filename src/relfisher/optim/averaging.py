"""Schedule-free averaging of iterates, which replaces a learning-rate schedule. Defazio et al. 2024.

The iterate z takes the steps, x is the weighted average of all z, and the model's weights, where gradients are taken,
are y = (1 - share) z + share x.

Only `lead` is stored: z - x times the sum of the weights in the average so far, which needs no rescaling. If the
model's weights are changed from outside, x and z move with them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from relfisher.structures import Kept

__all__ = ["Averaging", "growing"]

# The first iterates are far from the later ones: weights grow during this many iterations.
_YOUNG = 500


def growing(iteration: int) -> float:
    """Return the weight of an iteration, counted from 0, in an average; it grows to 1 during the first 500."""
    return min(1.0, (iteration + 1) / _YOUNG) ** 2


class Averaging(NamedTuple):
    """One iteration of the average.

    Args:
        share: the share of the average in the model's weights, in [0, 1).
        before: the sum of the weights of all iterates so far.
        weight: the weight of the iterate after this step.
    """

    share: float
    before: float
    weight: float

    @staticmethod
    def declares(shape: tuple[int, ...]) -> dict[str, Kept]:
        """Return the lead of z over x for a layer of the shape [*g, out, d]."""
        return {"lead": Kept(shape)}

    def change(self, direction: Tensor, scale: float, lead: Tensor) -> Tensor:
        """Return the change of the model's weights when z moves by `-scale * direction`.

        Args:
            direction: the direction of the step.
            scale: the factor of the direction, which is subtracted.
            lead: the lead of z before the step; updated in place.
        """
        lead.add_(direction, alpha=-scale * self.before)
        if self.before == 0:
            return direction * -scale
        pulled = self.share * self.weight / (self.before * (self.before + self.weight))
        return torch.mul(lead, pulled).add_(direction, alpha=-scale * (1 - self.share))
