"""Shape annotations, checked at run time only if jaxtyping is installed, as it is for the tests.

The core depends only on torch. Without jaxtyping, annotations are never evaluated, so these names may be placeholders.

Axes have the same letters everywhere: `n` samples (and positions, where weights are shared), `in` inputs, `out` units
or classes, `d = in + 1` the augmented input (x, 1), `k` right-hand sides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtyping import Float, Num
else:
    try:
        from jaxtyping import Float, Num
    except ImportError:
        Float = Num = None

__all__ = ["Float", "Num"]
