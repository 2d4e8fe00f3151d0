"""Exact answers for the tutorial's random walk under the mean squared error, by one-dimensional quadrature.

The walk starts at x_0 = 0 and moves by +1 with probability p = sigmoid(theta), else by -1. Hence E[x_t] = t (2p - 1),
Var[x_t] = 4 t p (1 - p), and E[mse | theta] = mean_t [(t (2p - 1) - y_t)^2 + 4 t p (1 - p)]. The prior is N(0, 1).
Nothing of pyrobirds is used here.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

# The walk at the head of the tutorial (random numbers differ between torch versions, so a seed would not reproduce it).
# fmt: off
TUTORIAL_WALK: tuple[float, ...] = (
    0, -1, -2, -3, -4, -5, -4, -5, -4, -5, -6, -7, -8, -7, -8, -9, -10, -11, -12, -11, -10, -9, -8, -9, -8,
    -9, -10, -9, -10, -11, -12, -13, -14, -15, -16, -17, -16, -17, -18, -17, -16, -15, -14, -15, -16, -15,
    -16, -17, -16, -17, -18, -19, -20, -21, -22, -23, -24, -25, -26, -27, -26, -25, -26, -27, -28, -27,
    -28, -29, -30, -31, -32, -33, -34, -35, -36, -37, -38, -37, -36, -37, -38, -39, -40, -41, -42, -43,
    -44, -45, -44, -45, -46, -47, -48, -49, -50, -51, -52, -53, -54, -55,
)
# fmt: on

Series = Sequence[float] | np.ndarray

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(120)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


class Terms(NamedTuple):
    """The objective of one Gaussian: total = loss + reg, and reg = w * KL(q || prior)."""

    loss: float
    reg: float
    total: float


class Gaussian(NamedTuple):
    """A Gaussian over theta and its objective."""

    mean: float
    sd: float
    terms: Terms


class Posterior(NamedTuple):
    """Moments of prior * exp(-E[loss] / w) / Z, and the minimum of the objective over all q, which is -w log Z."""

    mean: float
    sd: float
    minimum: float


def expected_mse(theta: np.ndarray, y: Series) -> np.ndarray:
    """E[mse | theta], element by element of `theta`; the sums over t are taken first, so a fine grid costs little."""
    y = np.asarray(y, dtype=float)
    t = np.arange(len(y))
    drift = 2 * expit(theta) - 1
    mean_square = drift**2 * np.mean(t**2) - 2 * drift * np.mean(t * y) + np.mean(y**2)
    return mean_square + (1 - drift**2) * np.mean(t)


def expected_mse_slope(theta: np.ndarray, y: Series) -> np.ndarray:
    """The derivative of E[mse | theta] with respect to theta."""
    y = np.asarray(y, dtype=float)
    p = expit(np.asarray(theta, dtype=float))[..., None]
    t = np.arange(len(y))
    by_p = 4 * t * (t * (2 * p - 1) - y) + 4 * t * (1 - 2 * p)
    return (by_p * p * (1 - p)).mean(-1)


def objective(mean: float, sd: float, y: Series, w: float) -> Terms:
    """E_q[mse] + w * KL(q || N(0, 1)) for q = N(mean, sd^2)."""
    loss = float(_WEIGHTS @ expected_mse(mean + sd * _NODES, y))
    reg = w * (0.5 * (sd**2 + mean**2 - 1) - math.log(sd))
    return Terms(loss, reg, loss + reg)


def exact_posterior(y: Series, w: float) -> Posterior:
    """The generalised posterior itself, on a grid that is fine against its width (the trapezoidal rule is spectral)."""
    theta = np.linspace(-10, 10, 400_001)
    log_density = -0.5 * theta**2 - 0.5 * math.log(2 * math.pi) - expected_mse(theta, y) / w
    top = log_density.max()
    density = np.exp(log_density - top)
    mass = density.sum()
    mean = float((theta * density).sum() / mass)
    sd = math.sqrt(float(((theta - mean) ** 2 * density).sum() / mass))
    log_z = top + math.log(mass * (theta[1] - theta[0]))
    return Posterior(mean, sd, -w * log_z)


def best_gaussian(y: Series, w: float) -> Gaussian:
    """The Gaussian that minimises the objective, started from the exact posterior's moments."""
    start = exact_posterior(y, w)
    best = minimize(
        lambda at: objective(at[0], math.exp(at[1]), y, w).total,
        [start.mean, math.log(start.sd)],
        method="Nelder-Mead",
        options={"xatol": 1e-9, "fatol": 1e-11, "maxiter": 2000},
    )
    mean, sd = float(best.x[0]), math.exp(best.x[1])
    return Gaussian(mean, sd, objective(mean, sd, y, w))
