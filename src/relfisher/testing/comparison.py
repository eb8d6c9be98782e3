"""The comparison that all checks use."""

from __future__ import annotations

import math

from torch import Tensor

__all__ = ["same"]


def same(what: str, found: Tensor, wanted: Tensor, rtol: float) -> None:
    """Raise AssertionError unless two tensors agree, relative to the largest entry of the wanted one."""
    scale = max(float(wanted.abs().max()), 1.0 if float(wanted.abs().max()) == 0 else 0.0)
    error = float((found - wanted).abs().max()) / scale
    if not (math.isfinite(error) and error <= rtol):
        raise AssertionError(f"{what} is off by {error:.2e} relative to {scale:.3g}; the tolerance is {rtol:.0e}")
