"""How far the guide is from the generalised posterior, by the tail of the importance weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from pyrobirds import arviz_groups
from pyrobirds.arviz_groups import SAMPLE_DIMS

if TYPE_CHECKING:
    from arviz import InferenceData

_SMALL_BIAS = 0.05  # of a log weight
_FEWEST = 25  # draws; a tail of fewer than five weights is not fitted
_ADVICE = "to_inference_data(..., num_repeats=100)"


@dataclass(frozen=True, repr=False, eq=False)
class Psis:
    """Importance weights of a guide's draws, and what they say of the guide.

    Several fits are several chains. Each is a proposal of its own, so its draws are weighted among themselves.

    Attributes:
        khat: the shape of the tail of the weights, the worst of all chains; minus infinity if the largest weights are
            equal, infinity if too few weights are above 0 to fit a tail.
        threshold: what ``khat`` must stay below, :math:`\\min(1 - 1 / \\log_{10} S, 0.7)` with S weights above 0 in a
            chain, the lowest of all chains.
        ess: how many independent draws from the generalised posterior the weighted draws are worth, of all chains.
        bias: what the noise of the losses adds to a log weight, on average over the draws; 0 without a simulator, None
            if it is unknown.
        needed_repeats: how many runs of a draw would bring ``bias`` to 0.05; None if it is unknown.
        num_failed: how many draws had no weight, for all their runs failed; they count as draws of weight 0.
        chains: ``khat``, ``threshold`` and ``ess`` of each chain.
        draws: the posterior resampled by the weights, dimensions (chain, draw, ...).
        log_weights: smoothed, dimensions (chain, draw); the weights of a chain add up to 1.
    """

    khat: float
    threshold: float
    ess: float
    bias: float | None
    needed_repeats: int | None
    num_failed: int
    chains: xr.Dataset
    draws: xr.Dataset
    log_weights: xr.DataArray

    @property
    def reliable(self) -> bool:
        """Whether the draws can stand for the generalised posterior once they are weighted."""
        return self.khat < self.threshold

    def __str__(self) -> str:
        lines = [self._verdict(), *self._of_chains(), self._noise()]
        if self.num_failed:
            lines.append(f"{self.num_failed:,} draws have weight zero, for all their runs failed.")
        return "\n".join(lines)

    __repr__ = __str__

    def _verdict(self) -> str:
        size = self.log_weights.size
        if self.reliable:
            return (
                f"k-hat is {self.khat:.2f}, below {self.threshold:.2f}: the guide is near enough to the generalised "
                f"posterior for its draws to be weighted; the {size:,} are worth {self.ess:,.0f} independent ones. "
                "(A mode that the guide has missed altogether does not show.)"
            )
        if self.khat == math.inf:
            return "k-hat cannot be had, for too few draws carry all the weight: the guide is not the posterior."
        return (
            f"k-hat is {self.khat:.2f}, not below {self.threshold:.2f}: the guide is too far from the generalised "
            "posterior for its draws to be weighted, so neither the guide nor the resampled draws give its tails. "
            "Fit longer, or a guide of a richer family."
        )

    def _of_chains(self) -> list[str]:
        if self.chains.sizes["chain"] == 1:
            return []
        return ["k-hat by chain: " + ", ".join(f"{khat:.2f}" for khat in self.chains["khat"].values)]

    def _noise(self) -> str:
        if self.bias is None:
            return (
                "The noise of the losses is unknown, for each draw was run once: k-hat may be that of another "
                f"posterior, prior * E[exp(-loss / w)]. {_ADVICE} settles it."
            )
        if self.bias == 0:
            return "The losses have no noise."
        verdict = (
            "which is small"
            if self.bias <= _SMALL_BIAS
            else f"so that k-hat may be that of another posterior: num_repeats={self.needed_repeats:,} would make it "
            f"{_SMALL_BIAS}"
        )
        return f"The noise of the losses adds {self.bias:.2g} to a log weight on average, {verdict}."


def psis(
    data: InferenceData | xr.DataTree, *, num_draws: int | None = None, seed: int | np.random.Generator | None = None
) -> Psis:
    r"""Pareto-smoothed importance sampling: k-hat, and draws from the generalised posterior itself.

    The draws :math:`\theta \sim q` of the guide get the weights that turn them into those of the generalised posterior,

    .. math:: \omega(\theta) = \frac{\pi(\theta) \exp\bigl(-E[\ell(\theta, y)] / w\bigr)}{q(\theta)}.

    The largest weights of a chain are replaced by the quantiles of a generalised Pareto distribution fitted to them.
    Its shape is k-hat: moments of the weights of order 1 / k-hat and higher are infinite. Below 0.7, or below
    :math:`1 - 1 / \log_{10} S` for few draws S, weighted means are reliable; above, the guide misses a part of the
    posterior that matters, most often its tails. The standard error of k-hat is 0.13 at 4,000 draws. A Gaussian guide
    0.3 times as wide as its Gaussian posterior passes one time in five in one dimension, one in a hundred in five; the
    more parameters, the less passes. A guide that is too wide passes, at the price of ``ess``.

    The expectation is over a simulator's noise. The data hold the mean :math:`\bar\ell` of the losses of
    ``num_repeats = R`` runs of a draw, and to second order

    .. math:: E[\exp(-\bar\ell / w)] = \exp\bigl(-E[\ell] / w + \mathrm{Var}[\ell] / (2 w^2 R)\bigr).

    So weights of noisy losses belong to the posterior :math:`\pi(\theta) E[\exp(-\bar\ell / w)]`, which at R = 1 is
    often a much wider one. ``bias`` is the second term in the exponent, averaged over the draws. What of it is the same
    at all draws cancels; yet twice ``bias`` is also the variance that the noise gives to a log weight, and both fall as
    1 / R.

    Sources: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72),
    https://arxiv.org/abs/1507.02646; Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work? Evaluating
    variational inference, https://arxiv.org/abs/1802.02538.

    Args:
        data: what ``to_inference_data`` returned, with the groups ``posterior`` and ``sample_stats``.
        num_draws: how many draws to resample in each chain, with replacement. None: as many as there are.
        seed: of the resampling.

    Raises:
        ValueError: the data hold no weights, or none that is above 0; ``num_draws`` is below 1.

    Example:
        >>> from pyrobirds.arviz_groups import Variable, collect, dataset
        >>> theta = np.random.default_rng(0).normal(size=(1, 4000))  # the guide: N(0, 1)
        >>> log_weight = -0.5 * (theta / 0.8) ** 2 + 0.5 * theta**2  # the posterior: N(0, 0.8)
        >>> posterior = dataset({"theta": Variable(theta, ("chain", "draw"))})
        >>> stats = dataset({"log_weight": Variable(log_weight, ("chain", "draw"))}, attrs={"noisy": False})
        >>> data = collect({"posterior": posterior, "sample_stats": stats})
        >>> result = psis(data, seed=0)
        >>> result.reliable, round(float(result.draws["theta"].std()), 1)
        (True, 0.8)
    """
    if num_draws is not None and (not isinstance(num_draws, Integral) or num_draws < 1):
        raise ValueError(f"num_draws must be a whole number of at least 1, got {num_draws!r}")
    stats, posterior = arviz_groups.group(data, "sample_stats"), arviz_groups.group(data, "posterior")
    raw = log_weights(data)
    chains = [smooth(of_chain) for of_chain in raw.values]
    smoothed = raw.copy(data=np.stack([chain.log_weights for chain in chains])).rename("log_weights")
    smoothed.attrs = {"long_name": "smoothed log importance weight"}
    bias, needed = _noise(stats, arviz_groups.attributes(data))
    of_chains = xr.Dataset(
        {name: ("chain", [getattr(chain, name) for chain in chains]) for name in ("khat", "threshold", "ess")},
        {"chain": raw["chain"]},
    )
    return Psis(
        khat=float(of_chains["khat"].max()),
        threshold=float(of_chains["threshold"].min()),
        ess=float(of_chains["ess"].sum()),
        bias=bias,
        needed_repeats=needed,
        num_failed=int(np.isnan(raw).sum()),
        chains=of_chains,
        draws=_resampled(
            posterior, np.exp(smoothed.values), int(num_draws or raw.shape[1]), np.random.default_rng(seed)
        ),
        log_weights=smoothed,
    )


def log_weights(data: InferenceData | xr.DataTree) -> xr.DataArray:
    """The raw log weights, (chain, draw), NaN where all runs of a draw failed.

    Raises:
        ValueError: the data hold none.
    """
    stats = arviz_groups.group(data, "sample_stats")
    if "log_weight" in stats:
        return stats["log_weight"].transpose(*SAMPLE_DIMS).astype(float)
    if "diverging" in stats:
        raise ValueError(
            "psis weighs the draws of a guide, but these are of MCMC, which aims at the posterior itself: look at "
            "r_hat and ess in arviz.summary(data)"
        )
    divergence = arviz_groups.attributes(data).get("divergence", "KL")
    if divergence != "KL":
        raise ValueError(
            f"the guide was fitted with the divergence {divergence}, not KL: the posterior that it aims at has no "
            "density prior * exp(-loss / w) to weigh draws by, so the data have no log_weight. Check such a fit by "
            "predictive_check and coverage, or fit with divergences.KL()"
        )
    raise ValueError(
        "the data have no log_weight in sample_stats: psis needs a guide with a density, and a point mass (AutoDelta) "
        "has none"
    )


@dataclass(frozen=True)
class Smoothed:
    """The smoothed weights of one chain: their logarithms, normalised, and what :class:`Psis` says of a chain."""

    log_weights: np.ndarray
    khat: float
    threshold: float
    ess: float


def smooth(raw: np.ndarray) -> Smoothed:
    """Pareto-smooth the log weights of one chain; NaN counts as weight zero.

    Raises:
        ValueError: no weight is above 0.
    """
    positive = raw > -np.inf  # which NaN is not
    if not positive.any():
        raise ValueError(
            "no draw of the posterior has a weight above 0, for all runs failed or the prior excludes them: look at "
            "loss and lp in sample_stats"
        )
    log_weights = np.full(raw.shape, -np.inf)
    log_weights[positive], khat = _smooth_positive(raw[positive])
    size = int(positive.sum())
    threshold = min(1 - 1 / math.log10(size), 0.7) if size > 1 else -math.inf
    return Smoothed(log_weights, khat, threshold, ess=float(1 / np.exp(2 * log_weights).sum()))


def _smooth_positive(raw: np.ndarray) -> tuple[np.ndarray, float]:
    relative = raw - raw.max()
    normalised = relative - np.log(np.exp(relative).sum())
    if raw.size < _FEWEST:
        return normalised, math.inf
    if np.sort(relative)[-tail_length(raw.size) - 1] == 0:  # the largest weights are one number, and so is their tail
        return normalised, -math.inf
    with np.errstate(all="ignore"):  # what underflows is caught by what comes out
        smoothed, khat = _psislw(relative)
    if math.isfinite(khat) and np.isfinite(smoothed).all():
        return smoothed, khat
    return normalised, math.inf


def tail_length(size: int) -> int:
    """How many of so many weights make up the tail."""
    return int(min(size / 5, 3 * math.sqrt(size)))


def _psislw(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """ArviZ's own smoothing of log weights, shape (number of draws,): normalised, and k-hat."""
    # ArviZ fits no tail to weights that it cannot tell from 0.
    log_weights = np.maximum(log_weights, np.log(np.finfo(float).tiny))
    if arviz_groups.arviz_generation() < 1:
        from arviz import psislw

        smoothed, khat = psislw(log_weights)
    else:
        from arviz_stats.base.array import array_stats

        smoothed, khat = array_stats.psislw(-log_weights)  # which takes log likelihoods: weights of leaving one out
    return np.asarray(smoothed), float(khat)


def _noise(stats: xr.Dataset, attrs: dict[str, object]) -> tuple[float | None, int | None]:
    """What the noise adds to a log weight on average, and how many runs would make that small."""
    if not stats.attrs.get("noisy", 1):
        return 0.0, 1
    if "loss_variance" not in stats:
        return None, None
    w = xr.DataArray(np.broadcast_to(np.asarray(attrs["w"], float), stats.sizes["chain"]), dims="chain")
    of_one_run = float((stats["loss_variance"] / (2 * w**2)).mean())
    return of_one_run / float(attrs["num_repeats"]), max(1, math.ceil(of_one_run / _SMALL_BIAS))  # type: ignore[arg-type]


def _resampled(posterior: xr.Dataset, weights: np.ndarray, num_draws: int, rng: np.random.Generator) -> xr.Dataset:
    """Each chain drawn from with replacement."""
    picked = np.stack([rng.choice(of_chain.size, num_draws, p=of_chain / of_chain.sum()) for of_chain in weights])
    chains, draws = xr.DataArray(np.arange(len(weights)), dims="chain"), xr.DataArray(picked, dims=SAMPLE_DIMS)
    return posterior.drop_vars("draw").isel(chain=chains, draw=draws).assign_coords(draw=np.arange(num_draws))
