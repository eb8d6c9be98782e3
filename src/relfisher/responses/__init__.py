"""Stochastic responses y of a layer with pre-activation z, and their Fisher information F(z).

A response defines p(y | z). Each class provides the activation f(z), its slope f'(z), the information nu(z), the
log-density and samples. A unit response acts on each unit independently, so that F(z) = diag(nu(z)); `Categorical`
couples all units. `sigma` is the standard deviation of a Gaussian response, in the units of the activation.

Source: Sun & Nielsen 2016, section 3.1 and appendices A to H.
"""

from relfisher.responses.base import Response, UnitResponse
from relfisher.responses.discrete import Categorical, SigmoidBernoulli, TanhBernoulli
from relfisher.responses.gaussian import (
    ActivationGaussian,
    ELUGaussian,
    LinearGaussian,
    ReLUGaussian,
    SmoothReLUGaussian,
)

__all__ = [
    "ActivationGaussian",
    "Categorical",
    "ELUGaussian",
    "LinearGaussian",
    "ReLUGaussian",
    "Response",
    "SigmoidBernoulli",
    "SmoothReLUGaussian",
    "TanhBernoulli",
    "UnitResponse",
]
