"""Solutions of equations without a closed form, in double precision."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dst, idst
from scipy.integrate import solve_ivp
from scipy.interpolate import CubicSpline

__all__ = ["allen_cahn", "burgers"]

HERMITE_NODES = 200
MODES = 511

Array = NDArray[np.float64]


def burgers(x: Array, t: Array, viscosity: float) -> Array:
    """Return the solution of u_t + u u_x = viscosity u_xx with u(x, 0) = -sin(pi x) and u = 0 at x = -1 and x = 1.

    By the transform of Hopf (1950) and Cole (1951) it is a ratio of two Gaussian means over the past of a point, here
    by Gauss-Hermite quadrature, as in Basdevant et al. 1986.

    Args:
        x: the places [points].
        t: the times [points].
        viscosity: the viscosity.

    Returns:
        The solution [points].
    """
    nodes, weights = np.polynomial.hermite.hermgauss(HERMITE_NODES)
    past = np.pi * (x[:, None] - np.sqrt(4 * viscosity * t)[:, None] * nodes)
    exponents = -np.cos(past) / (2 * np.pi * viscosity)
    means = weights * np.exp(exponents - exponents.max(1, keepdims=True))
    found: Array = -(means * np.sin(past)).sum(1) / means.sum(1)
    return found


def allen_cahn(x: Array, t: Array) -> Array:
    """Return the solution of u_t = 1e-3 u_xx + 5 u - 5 u^3 with u(x, 0) = x^2 cos(pi x), u = -1 at x = -1 and x = 1.

    u + 1 is a sum of sines, whose amplitudes follow an ordinary differential equation.

    Args:
        x: the places [points].
        t: the times [points], from a few different ones.

    Returns:
        The solution [points].
    """
    found = np.empty_like(x)
    for time in np.unique(t):
        here = t == time
        found[here] = _allen_cahn_at(float(time))(x[here])
    return found


@lru_cache(maxsize=256)
def _allen_cahn_at(time: float) -> CubicSpline:
    places = np.linspace(-1, 1, MODES + 2)
    values: Array = _allen_cahn_path().sol(time) if time else _start(places[1:-1])
    return CubicSpline(places, np.concatenate([[-1.0], values - 1, [-1.0]]))


@lru_cache(maxsize=1)
def _allen_cahn_path():  # type: ignore[no-untyped-def]  # SciPy has no types
    places = np.linspace(-1, 1, MODES + 2)[1:-1]
    decay = 1e-3 * (np.pi * np.arange(1, MODES + 1) / 2) ** 2

    def rate(_: float, raised: Array) -> Array:
        diffusion = -idst(decay * dst(raised, type=1), type=1)
        rise: Array = diffusion - 10 * raised + 15 * raised**2 - 5 * raised**3
        return rise

    return solve_ivp(rate, (0, 1), _start(places), method="DOP853", rtol=1e-9, atol=1e-11, dense_output=True)


def _start(x: Array) -> Array:
    start: Array = x**2 * np.cos(np.pi * x) + 1
    return start
