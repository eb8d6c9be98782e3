"""Feature coordinates of section 5.1: the pixels, either unchanged or whitened, in the row space of the data.

A step of any of the four methods is a combination of the rows z_n, so that only the component of theta in their span
changes or matters. `Coordinates` refer to an orthonormal basis of that span: r <= min(n, D) numbers instead of D.

Axes: `n` images, `p` pixels, `D = p + 1` weights of the neuron (bias last), `r` coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from relfisher.shapes import Float

__all__ = ["Coordinates", "Whitening", "raw", "whitened"]


@dataclass(frozen=True)
class Coordinates:
    """The samples z_n, and the basis in which they and the weights of the neuron are expressed.

    Attributes:
        features: z_n in an orthonormal basis of their span, [n, r]; the second moment is diagonal.
        basis: the basis, [D, r]: theta' z_n = (basis' theta)' features_n.
    """

    features: Float[Tensor, "n r"]
    basis: Float[Tensor, "D r"]


@dataclass(frozen=True)
class Whitening:
    """The map x -> A (x - a) of equation (28).

    Attributes:
        matrix: A, [p, p]; the rows of singular directions are 0.
        mean: a, [p].
        rank: the number of non-singular directions.
    """

    matrix: Float[Tensor, "p p"]
    mean: Float[Tensor, "p"]
    rank: int

    @classmethod
    def of(cls, x: Float[Tensor, "n p"]) -> Whitening:
        """Return the whitening of a sample: zero mean, and unit covariance except in singular directions.

        A is any root of the inverse covariance. All roots differ by a rotation, which affects neither gradient
        descent, nor (30), nor the distribution of normal initial weights. Here A = S^-1 V' with the singular vectors V
        of x - a.

        Args:
            x: the sample, float64.

        Returns:
            A and a.
        """
        mean = x.mean(0)
        singular, right = _right_singular(x - mean)
        matrix = x.new_zeros(x.shape[1], x.shape[1])
        matrix[: len(singular)] = right * (len(x) ** 0.5 / singular).unsqueeze(1)
        return cls(matrix, mean, len(singular))

    def __call__(self, x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
        """Return A (x_n - a) for each row."""
        return (x - self.mean) @ self.matrix.T


def raw(x: Float[Tensor, "n p"]) -> Coordinates:
    """Return the coordinates of z = (x, 1), for GD and NGD.

    Args:
        x: pixels, float64.

    Returns:
        The features in terms of the right singular vectors of the samples.
    """
    z = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    _, right = _right_singular(z)
    return Coordinates(z @ right.T, right.T.contiguous())


def whitened(x: Float[Tensor, "n p"]) -> Coordinates:
    """Return the coordinates of z = (A (x - a), 1), equation (28), for WhiteGD and WhiteNGD.

    Args:
        x: pixels, float64.

    Returns:
        The features: the whitened pixels that are not identically 0, then the constant.
    """
    whitening = Whitening.of(x)
    rank = whitening.rank
    features = torch.cat([whitening(x)[:, :rank], x.new_ones(len(x), 1)], dim=1)
    basis = x.new_zeros(x.shape[1] + 1, rank + 1)
    basis[:rank, :rank] = torch.eye(rank, dtype=x.dtype)
    basis[-1, -1] = 1
    return Coordinates(features, basis)


def _right_singular(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values above rounding error, and their right singular vectors as rows."""
    # The triangular factor has the same ones, and is small if there are many samples.
    triangle = torch.linalg.qr(matrix, mode="r").R
    _, values, right = torch.linalg.svd(triangle, full_matrices=False)
    kept = int((values > values[:1] * max(matrix.shape) * torch.finfo(matrix.dtype).eps).sum())
    return values[:kept], right[:kept]
