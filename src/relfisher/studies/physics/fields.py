"""Neural fields: networks that are a picture, a distance or a function, fitted to its values."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from relfisher.studies.physics.equation import Equation

__all__ = ["FIELDS"]

PIXELS = 64


class Field(Equation):
    """A function on a square, known at points drawn for each step."""

    box = ((-1.0, 1.0), (-1.0, 1.0))
    fresh = True

    def residual(self, model: nn.Module, x: Tensor) -> Tensor:
        """Return how far the network is from the function."""
        return self.solution(model, x) - self.answer(x.detach()).to(x)


class Picture(Field):
    """The brightness of a photograph, between -1 and 1, by a sine network (Sitzmann et al. 2020)."""

    title = f"a photograph of {PIXELS} x {PIXELS} pixels"
    unit = "sine"
    hidden = (64, 64, 64)
    inside = 1000
    sides = PIXELS

    def seen(self, x: Tensor) -> Tensor:
        """Return the coordinates times 10, so that the first layer has the frequencies of SIREN."""
        return 10 * x

    def within(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the centers of pixels."""
        places = torch.randint(PIXELS, (count, 2), generator=generator)
        return (2 * places / (PIXELS - 1) - 1).to(self.dtype)

    def answer(self, x: Tensor) -> Tensor:
        """Return the brightness of the nearest pixel."""
        places = ((x.double() + 1) * (PIXELS - 1) / 2).round().long()
        return _photograph()[places[:, 0], places[:, 1], None]


class Distance(Field):
    """The signed distance to a ring with a gap, whose outline is not smooth."""

    title = "the signed distance to a ring with a gap"
    unit = "silu"

    def answer(self, x: Tensor) -> Tensor:
        """Return the distance to an arc of radius 0.6 and half-width 0.15, negative inside."""
        x = x.double()
        gap = math.pi / 6
        angle = torch.atan2(x[:, 1], x[:, 0])
        along = (x.norm(dim=1) - 0.6).abs()
        ends = 0.6 * torch.tensor([[math.cos(gap), math.sin(gap)], [math.cos(gap), -math.sin(gap)]], dtype=x.dtype)
        beyond = torch.cdist(x, ends).amin(1)
        return (torch.where(angle.abs() < gap, beyond, along) - 0.15)[:, None]


class Waves(Field):
    """A smooth function: sin(3 pi x y) exp(-x^2 - y^2) and a slope."""

    title = "a smooth function"

    def answer(self, x: Tensor) -> Tensor:
        """Return sin(3 pi x y) exp(-x^2 - y^2) + (x - y) / 4."""
        a, b = x.double().T
        values: Tensor = torch.sin(3 * math.pi * a * b) * torch.exp(-a.square() - b.square()) + (a - b) / 4
        return values[:, None]


@lru_cache(maxsize=1)
def _photograph() -> Tensor:
    """Return scikit-learn's photograph of a temple, [PIXELS, PIXELS], in double."""
    from sklearn.datasets import load_sample_image  # which takes seconds

    picture = torch.tensor(load_sample_image("china.jpg")[100 : 100 + 4 * PIXELS : 4, 100 : 100 + 4 * PIXELS : 4])
    brightness: Tensor = picture.double().mean(-1) / 127.5 - 1
    return brightness


FIELDS: dict[str, Equation] = {
    "field-picture": Picture(),
    "field-distance": Distance(),
    "field-function": Waves(),
}
