"""Responses with finitely many outcomes: tanh and sigmoid units, and softmax heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from relfisher.information import Information, Softmax
from relfisher.responses.base import Response, UnitResponse
from relfisher.shapes import Float, Num

__all__ = ["Categorical", "SigmoidBernoulli", "TanhBernoulli"]


class _Bernoulli(UnitResponse):
    """A unit with the two outcomes `_low` and 1 and log-odds `_gain * z`."""

    _low: float
    _gain: float

    def slope(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return f'(z), which is equal to nu(z) for these units."""
        return self.information(z)

    def log_prob(self, z: Float[Tensor, "*n"], y: Num[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return ln p(y | z) for outcomes y, [..., out]."""
        odds = torch.where(y > 0, self._gain, -self._gain) * z
        # Unlike those of logsigmoid, both derivatives are accurate where the unit is saturated.
        return odds.where(odds <= 0, 0) - odds.where(odds <= 0, -odds).exp().log1p()

    def sample(self, z: Float[Tensor, "*n"], generator: torch.Generator | None = None) -> Float[Tensor, "*n"]:
        """Draw outcomes in the shape of z."""
        high = torch.bernoulli(torch.sigmoid(self._gain * z), generator=generator)
        return high * (1 - self._low) + self._low

    def outcomes(self, out: int) -> tuple[float, ...]:
        """Return the two outcomes of a unit."""
        return (self._low, 1.0)

    def divergence(self, z: Float[Tensor, "*n"], other: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the sum of p ln(p / p') over both outcomes."""
        odds, others = (torch.stack([self._gain * each, torch.zeros_like(each)], dim=-1) for each in (z, other))
        return _divergence(odds, others)


@dataclass(frozen=True)
class TanhBernoulli(_Bernoulli):
    """A tanh unit: y in {-1, +1} with mean tanh(z), nu = 1 - tanh(z)^2. Equations (11), (12)."""

    _low = -1.0
    _gain = 2.0

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return tanh(z)."""
        return torch.tanh(z)

    def information(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return sech(z)^2, in a form that stays accurate where tanh saturates."""
        return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)


@dataclass(frozen=True)
class SigmoidBernoulli(_Bernoulli):
    """A sigmoid unit or a binary logistic head: y in {0, 1} with mean sigm(z). Equations (13), (14)."""

    _low = 0.0
    _gain = 1.0

    def activation(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return the logistic sigmoid of z."""
        return torch.sigmoid(z)

    def information(self, z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return sigm(z) (1 - sigm(z))."""
        return torch.sigmoid(z) * torch.sigmoid(-z)


@dataclass(frozen=True)
class Categorical(Response):
    """A softmax head: y in {0, ..., out - 1} with probabilities softmax(z). Equations (24), (25)."""

    def information(self, z: Float[Tensor, "*n out"]) -> Float[Tensor, "*n out out"]:
        """Return diag(eta) - eta eta' for each sample, [..., out, out]."""
        return Softmax(torch.softmax(z, dim=-1)).dense()

    def operator(self, z: Float[Tensor, "n out"]) -> Information:
        """Return diag(eta) - eta eta' as an operator."""
        return Softmax(torch.softmax(z, dim=-1))

    def log_prob(self, z: Float[Tensor, "*n out"], y: Num[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Return ln eta_y for class indices y, [...]."""
        likeliest = z.argmax(-1, keepdim=True)
        relative = z - z.gather(-1, likeliest)
        # Unlike those of log_softmax, both derivatives are accurate where a class is almost certain.
        others = relative.exp().scatter(-1, likeliest, 0).sum(-1)
        return relative.gather(-1, y.long().unsqueeze(-1)).squeeze(-1) - others.log1p()

    def sample(self, z: Float[Tensor, "*n out"], generator: torch.Generator | None = None) -> Num[Tensor, "*n"]:
        """Draw a class index for each sample."""
        eta = torch.softmax(z, dim=-1)
        return torch.multinomial(eta.reshape(-1, eta.shape[-1]), 1, generator=generator).reshape(eta.shape[:-1])

    def outcomes(self, out: int) -> tuple[float, ...]:
        """Return the class indices."""
        return tuple(range(out))

    def divergence(self, z: Float[Tensor, "*n out"], other: Float[Tensor, "*n out"]) -> Float[Tensor, "*n"]:
        """Return the sum of eta ln(eta / eta') over the classes."""
        return _divergence(z, other)


#: From which |ln(p / q)| on p ln(p / q) - p + q is computed as it is written.
_FAR = 0.1


def _divergence(z: Float[Tensor, "*n out"], other: Float[Tensor, "*n out"]) -> Float[Tensor, "*n"]:
    """Return the sum of p h(ln(p / q)) for two softmax distributions, with h(l) = l + exp(-l) - 1 >= 0.

    It is the sum of p ln(p / q), since p and q sum to 1. Its terms do not cancel, and l comes from the changes of the
    logits relative to the likeliest class, so that small divergences and those of a class that is almost certain have
    correct digits.
    """
    likeliest = z.argmax(-1, keepdim=True)
    relative = z - z.gather(-1, likeliest)
    others = relative.exp().scatter(-1, likeliest, 0).sum(-1, keepdim=True)
    p = relative.exp() / (1 + others)
    change = torch.where(z.isinf() & (z == other), 0, other - z)  # 0 for classes that are impossible in both
    change = change - change.gather(-1, likeliest)
    small = change.clamp(-1, 1)
    growth = torch.where(
        (small == change).all(-1, keepdim=True),
        (p * small.expm1()).sum(-1, keepdim=True).log1p(),
        (relative + change).logsumexp(-1, keepdim=True) - others.log1p(),
    )
    ratio = growth - change
    near = ratio.clamp(-_FAR, _FAR)
    series = near.square() * sum((-near) ** (k - 2) / math.factorial(k) for k in range(2, 12))
    far = torch.where(p > 0, p * ratio, 0) - p + torch.softmax(other, -1)
    close = torch.where(near == ratio, series, ratio + torch.expm1(-ratio))
    return torch.where(ratio > -1, torch.where(p > 0, p * close, 0), far).sum(-1)
