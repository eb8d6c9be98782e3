"""The spectral step: steepest descent under a bound on the response change for any whitened input."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from relfisher.optim.rules.base import Move, Step
from relfisher.optim.rules.normalized import NormalizedRule
from relfisher.shapes import Float
from relfisher.validation import check_integer, check_rate

__all__ = ["Spectral", "polar_factor", "polar_factors"]

# The quintic a x + b x^3 + c x^5 that Jordan et al. (2024) chose for Muon: five steps map singular values between 0.01
# and 1 to values between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)

# From this width on, products in bfloat16 are faster on devices that support them.
_WIDE = 128

# Matrices are computed together up to as many numbers: more would take memory and save nothing.
_TOGETHER = 1 << 22

# Operations of five iterations on an m x n matrix: 20 m^2 n + 10 m^3; on its m x m Gram matrix: 4 m^2 n + 34 m^3.
_ELONGATED = 1.5


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
        return (self.head if move.is_head else 1.0) / math.sqrt(move.layer.fan_in)

    def steps(self, moves: Sequence[Move]) -> list[Step] | None:
        """Return the steps, or None if a direction is not finite."""
        whitened = [move.whitened() for move in moves]
        factors = polar_factors(whitened, self.iterations)
        directions = [move.unwhitened(factor) for move, factor in zip(moves, factors, strict=True)]
        return self.scaled(moves, directions, whitened)


def polar_factors(matrices: Sequence[Tensor], iterations: int = 5) -> list[Tensor]:
    """Return the polar factors of several matrices or batches of them; those of equal shape are computed together.

    Matrices of a single row are returned as they are. See `polar_factor`.
    """
    found = list(matrices)
    for places in _alike(matrices):
        own = [matrices[place] for place in places]
        factors = polar_factor(torch.stack(own), iterations) if len(own) > 1 else [polar_factor(own[0], iterations)]
        for place, factor in zip(places, factors, strict=True):
            found[place] = factor
    return found


def _alike(matrices: Sequence[Tensor]) -> list[list[int]]:
    """Return the places of matrices of more than one row, those that are computed together in one list."""
    kinds: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        if matrix.shape[-2] > 1:
            kinds[matrix.shape, matrix.dtype, matrix.device].append(place)
    found = []
    for places in kinds.values():
        most = max(1, _TOGETHER // matrices[places[0]].numel())
        found += [places[start : start + most] for start in range(0, len(places), most)]
    return found


def polar_factor(matrix: Float[Tensor, "*g m n"], iterations: int = 5) -> Float[Tensor, "*g m n"]:
    """Return the approximate nearest matrix with orthonormal rows or columns, by Newton-Schulz iterations.

    Wide matrices in single precision are multiplied in bfloat16 on devices with hardware support. This changes the
    result by 1 % of its norm, less than the error of five iterations.

    Args:
        matrix: a matrix or a batch of matrices.
        iterations: the number of iterations; five map singular values above 1 % of the norm to between 0.7 and 1.2.

    Returns:
        Approximately U V' of the singular value decomposition U S V'; zero for a zero matrix.
    """
    if matrix.ndim > 3:
        return polar_factor(matrix.flatten(0, -3), iterations).reshape(matrix.shape)
    tall = matrix.shape[-2] > matrix.shape[-1]
    x: Tensor = matrix.mT if tall else matrix
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
    if x.dtype == torch.float32 and x.shape[-2] >= _WIDE and _multiplies_bfloat16(x.device.type):
        x = _plain(x.bfloat16().contiguous(), iterations).to(x.dtype)
    else:
        x = _by_gram(x, iterations) if x.shape[-1] > _ELONGATED * x.shape[-2] else _plain(x, iterations)
    return x.mT if tall else x


@cache
def _multiplies_bfloat16(device_type: str) -> bool:
    """Return whether a device has native bfloat16 products; other devices emulate them slowly."""
    if device_type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return device_type == "cpu" and supported is not None and bool(supported())


def _plain(x: Float[Tensor, "*g m n"], iterations: int) -> Float[Tensor, "*g m n"]:
    a, b, c = _COEFFICIENTS
    multiply = torch.addmm if x.ndim == 2 else torch.baddbmm
    for _ in range(iterations):
        gram = x @ x.mT
        x = multiply(x, multiply(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Float[Tensor, "*g m n"], iterations: int) -> Float[Tensor, "*g m n"]:
    """Return the same result using the m x m Gram matrix: each iteration multiplies x by a polynomial of it."""
    a, b, c = _COEFFICIENTS
    gram = x @ x.mT
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    constant, linear, product = a * eye, b * eye, eye
    for iteration in range(iterations):
        factor = torch.add(linear, gram, alpha=c) @ gram + constant
        product = factor @ product if iteration else factor
        if iteration < iterations - 1:
            gram = factor @ gram @ factor
    return product @ x
