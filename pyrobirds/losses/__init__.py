"""Losses: how far simulated paths are from the observed one.

A loss is any callable ``(x, y) -> (B,)`` of simulated ``x`` and observed ``y``, both of shape ``(B, *event)``; a loss
for a simulator with ``replicates=m`` takes ``x`` of shape ``(B, m, *event)``. It knows nothing of simulators. NaN in
``y`` marks missing data and is masked.
"""

from pyrobirds.losses.combined import Sum
from pyrobirds.losses.crps import CRPS
from pyrobirds.losses.debiased import DebiasedMSE
from pyrobirds.losses.energy import EnergyScore
from pyrobirds.losses.errors import log_mse, mae, mse
from pyrobirds.losses.kernel import KernelScore
from pyrobirds.losses.mmd import MMD
from pyrobirds.losses.moments import Moments
from pyrobirds.losses.statistics import SeriesMoments
from pyrobirds.losses.synthetic import BetaSyntheticLikelihood, GammaSyntheticLikelihood, SyntheticLikelihood
from pyrobirds.losses.wasserstein import SlicedWasserstein

__all__ = [
    "CRPS",
    "MMD",
    "BetaSyntheticLikelihood",
    "DebiasedMSE",
    "EnergyScore",
    "GammaSyntheticLikelihood",
    "KernelScore",
    "Moments",
    "SeriesMoments",
    "SlicedWasserstein",
    "Sum",
    "SyntheticLikelihood",
    "log_mse",
    "mae",
    "mse",
]
