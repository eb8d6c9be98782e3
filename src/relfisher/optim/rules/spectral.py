"""The spectral step: steepest descent under a bound on the response change for any whitened input."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from relfisher.optim.rules.base import Move, Step
from relfisher.optim.rules.normalized import NormalizedRule
from relfisher.shapes import Float
from relfisher.validation import check_integer, check_rate

__all__ = ["Spectral", "polar_factor", "polar_operations"]

# The quintic a x + b x^3 + c x^5 that Jordan et al. (2024) chose for Muon: five steps map singular values between 0.01
# and 1 to values between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# From this width on, products in bfloat16 are faster on devices that support them.
_WIDE = 128


class Spectral(NormalizedRule):
    """D = orth(M R') R for each layer, where R'R = (G + damping)^-1, in which a unit moves by `lr`.

    The layer's response to the input x~ changes by D x~. In the coordinates u = R x~, where the inputs have unit second
    moment up to damping, this is orth(M R') u. All singular values are 1, so that no input direction moves the response
    further than another. Among all D whose response change has a spectral norm of at most 1 over such inputs, this one
    decreases the loss most: <D, M> is the nuclear norm of M R'. Another root Q R with orthogonal Q gives the same D, so
    that a Cholesky factor can be used.

    The rows of a step, one for each unit, have the length `lr` in their root mean square, and `head` times that for the
    logits of a softmax; all are longer while gradients agree, see `NormalizedRule`. Without a metric, the direction is
    that of Muon (Jordan et al. 2024), which leaves heads to AdamW, and so is the length for gradients that are noise. A
    gradient of few samples has few significant directions, and the others are noise, which momentum averages. Units
    with one row of parameters each, such as the channels of a normalization, use the normalized step.

    Args:
        iterations: the number of Newton-Schulz iterations for the polar factor.
        head: the length of the steps of softmax heads, relative to those of other layers.
        noise_floor: see `NormalizedRule`; the size is the norm of M R'.

    Raises:
        ValueError: if `iterations` is not a whole number >= 1, `head` is not positive, or `noise_floor` is negative.
    """

    name = "spectral"
    default_momentum = 0.9
    needs_root = True

    def __init__(self, iterations: int = 5, noise_floor: float = 0.1, head: float = 3.0) -> None:
        super().__init__(noise_floor)
        check_integer("iterations", iterations)
        check_rate("head", head)
        self.iterations, self.head = iterations, head

    def rms(self, move: Move) -> float:
        """Return the inverse root of the number of inputs of a unit, 1 for one-hot inputs; times `head` for heads."""
        return (self.head if move.is_head else 1.0) / math.sqrt(move.layers[0].fan_in)

    def polar(self, field: Float[Tensor, "l *g out d"]) -> Float[Tensor, "l *g out d"]:
        """Return the polar factors of a field, or the field itself for units with one row each."""
        return field if field.shape[-2] == 1 else polar_factor(field, self.iterations)

    def steps(self, moves: Sequence[Move]) -> list[Step]:
        """Return the steps."""
        whitened = [move.whitened() for move in moves]
        factors = [self.polar(field) for field in whitened]
        directions = [move.unwhitened(factor) for move, factor in zip(moves, factors, strict=True)]
        return self.scaled(moves, directions, whitened)


def polar_factor(matrix: Float[Tensor, "*g m n"], iterations: int = 5) -> Float[Tensor, "*g m n"]:
    """Return the approximate nearest matrix with orthonormal rows or columns, by Newton-Schulz iterations.

    Wide matrices in single precision are multiplied in bfloat16 on devices with hardware support, unless they are so
    long that their Gram matrix in single precision is faster. This changes the result by 1 % of its norm, less than the
    error of five iterations.

    Args:
        matrix: a matrix or a batch of matrices.
        iterations: the number of iterations; five map singular values above 1 % of the norm to between 0.7 and 1.2.

    Returns:
        Approximately U V' of the singular value decomposition U S V'; zero for a zero matrix.
    """
    if matrix.ndim != 3:  # one batch of products is fewer operations than products of many dimensions
        return polar_factor(matrix.reshape(-1, *matrix.shape[-2:]), iterations).reshape(matrix.shape)
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    # The squares of smaller numbers vanish.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    m, n = x.shape[-2:]
    gain = _bfloat16_gain(x.device.type) if x.dtype == torch.float32 and m >= _WIDE else 1
    plain, by_gram = polar_operations(m, n, iterations)
    if plain > gain * by_gram:
        x = _by_gram(x, iterations)
    else:
        x = _plain(x.bfloat16().contiguous(), iterations).to(x.dtype) if gain > 1 else _plain(x, iterations)
    return x.mT if tall else x


def polar_operations(m: int, n: int, iterations: int = 5) -> tuple[int, int]:
    """Return the operations of the iterations for the polar factor on a matrix itself, and on its Gram matrix.

    Args:
        m: the shorter side of the matrix.
        n: the longer one.
        iterations: the number of iterations.
    """
    each = iterations * (4 * m * m * n + 2 * m**3)
    return each, 4 * m * m * n + (2 * iterations + 6 * (iterations - 1)) * m**3


@cache
def _bfloat16_gain(device_type: str) -> int:
    """Return how many times faster products in bfloat16 are than in single precision, roughly; 1 if they are not."""
    if device_type == "cuda":
        return 16 if torch.cuda.is_bf16_supported(including_emulation=False) else 1
    if device_type != "cpu" or not getattr(torch.cpu, "_is_avx512_bf16_supported", bool)():
        return 1
    return 16 if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else 2


def _plain(x: Float[Tensor, "l m n"], iterations: int) -> Float[Tensor, "l m n"]:
    a, b, c = _COEFFICIENTS
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Float[Tensor, "l m n"], iterations: int) -> Float[Tensor, "l m n"]:
    """Return the same result using the m x m Gram matrix: each iteration multiplies x by a polynomial of it."""
    a, b, c = _COEFFICIENTS
    gram = torch.bmm(x, x.mT)
    product = None
    for iteration in range(iterations):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # the polynomial is a I more
        if iteration < iterations - 1:
            half = torch.baddbmm(gram, factor, gram, beta=a)
            gram = torch.baddbmm(half, half, factor, beta=a)
        if product is None:
            product = factor
            product.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            product = torch.baddbmm(product, factor, product, beta=a)
    return x if product is None else torch.bmm(product, x)
