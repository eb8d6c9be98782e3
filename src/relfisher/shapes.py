"""Shape annotations, checked at run time only where jaxtyping is installed, as in the tests.

The core depends on torch alone. Annotations are never evaluated without jaxtyping, so that the names may be empty.

Axes keep their letters everywhere: `n` samples (and positions, where weights are shared), `in` inputs, `out` units or
classes, `d = in + 1` the augmented input (x, 1), `k` right-hand sides.
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
