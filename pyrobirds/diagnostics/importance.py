"""How far the guide is from the generalised posterior, by the tail of the importance weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xarray as xr

from pyrobirds import arviz_groups
from pyrobirds.arviz_groups import SAMPLE_DIMS

if TYPE_CHECKING:
    from arviz import InferenceData

_SMALL_BIAS = 0.05  # of a log weight
_FEWEST = 25  # draws; a tail of fewer than five weights is not fitted
_FEWEST_IN_TAIL = 5
_EQUAL = 0.001  # of all weight: weights that are above a bound by less than that are bounded
_UNKNOWN = 0.1  # of all weight: more of it on draws whose noise is unknown is too much
_ADVICE = "to_inference_data(..., num_repeats=100)"


@dataclass(frozen=True, repr=False, eq=False)
class Psis:
    """Importance weights of a guide's draws, and what they say of the guide.

    Several fits are several chains. Each is a proposal of its own, so its draws are weighted among themselves.

    Attributes:
        khat: the shape of the tail of the weights, the worst of all chains; minus infinity if the largest weights are
            equal but for a thousandth of all weight, infinity if fewer than five draws carry it, NaN if a chain has too
            few weights above 0, or too many equal ones, to fit a tail.
        threshold: what ``khat`` must stay below, :math:`\\min(1 - 1 / \\log_{10} S, 0.7)` with S weights above 0 in a
            chain, the lowest of all chains.
        ess: how many independent draws from the generalised posterior the weighted draws are worth, of all chains.
        bias: what the noise of the losses adds to a log weight, on average over the draws by weight, the worst of all
            chains; 0 without noise, None if it is unknown.
        needed_repeats: how many runs of a draw would bring ``bias`` to 0.05; None if it is unknown.
        rounding: by how much the rounding of numbers may change a log weight, on average over the draws by weight, the
            worst of all chains.
        num_failed: how many draws had no weight, for all their runs failed or their loss or density is NaN; they count
            as draws of weight 0.
        chains: ``khat``, ``threshold`` and ``ess`` of each chain.
        draws: the posterior resampled by the weights, dimensions (chain, draw, ...).
        log_weights: smoothed, dimensions (chain, draw); the weights of a chain add up to 1.
    """

    khat: float
    threshold: float
    ess: float
    bias: float | None
    needed_repeats: int | None
    rounding: float
    num_failed: int
    chains: xr.Dataset
    draws: xr.Dataset
    log_weights: xr.DataArray

    @property
    def reliable(self) -> bool:
        """Whether the draws can stand for the generalised posterior once they are weighted; False if that is unknown.

        It takes a k-hat below the threshold, a known and small bias, and little rounding.
        """
        return self.khat < self.threshold and not self._noise.objection

    @property
    def _noise(self) -> Noise:
        return Noise(self.bias, self.needed_repeats, self.rounding)

    def __str__(self) -> str:
        objection = self._noise.objection
        lines = [f"k-hat cannot be judged, for {objection}."] if objection else [self._verdict(), *self._of_chains()]
        lines.append(str(self._noise))
        if self.num_failed:
            lines.append(
                f"{self.num_failed:,} draws have weight zero, for all their runs failed, or their loss or density is "
                "NaN."
            )
        return "\n".join(lines)

    __repr__ = __str__

    def _verdict(self) -> str:
        worth = f"the {self.log_weights.size:,} draws are worth {self.ess:,.0f} independent ones"
        if self.reliable:
            return (
                f"k-hat is {self.khat:.2f}, below {self.threshold:.2f}: the guide is near enough to the generalised "
                f"posterior for its draws to be weighted; {worth}. (A mode that the guide has missed altogether does "
                "not show.)"
            )
        if math.isnan(self.khat):
            return (
                f"k-hat cannot be fitted, for there are fewer than {_FEWEST} draws with a weight above 0, or too many "
                "of the largest weights are equal, as those of discrete sites are. By the weights that there are, "
                f"{worth}. That says nothing of larger weights, which more draws (num_samples) might show."
            )
        if self.khat == math.inf:
            return "k-hat is infinite, for fewer than five draws carry all the weight: the guide is not the posterior."
        return (
            f"k-hat is {self.khat:.2f}, not below {self.threshold:.2f}: the guide is too far from the generalised "
            "posterior for its draws to be weighted, so neither the guide nor the resampled draws give its tails. "
            "Fit longer, or a guide of a richer family."
        )

    def _of_chains(self) -> list[str]:
        if self.chains.sizes["chain"] == 1:
            return []
        return ["k-hat by chain: " + ", ".join(f"{khat:.2f}" for khat in self.chains["khat"].values)]


class Noise(NamedTuple):
    """What noise and rounding do to the log weights; see :class:`Psis`."""

    bias: float | None
    needed_repeats: int | None
    rounding: float

    @property
    def objection(self) -> str:
        """Why k-hat cannot be judged; empty if it can."""
        if self.rounding**2 / 2 > _SMALL_BIAS:  # as of noise of that standard deviation
            return f"rounding may change a log weight by {self.rounding:.2g}"
        if self.bias is None:
            return "the noise of the losses is unknown"
        if self.bias > _SMALL_BIAS:
            return f"the noise of the losses adds {self.bias:.2g} to a log weight"
        return ""

    def __str__(self) -> str:
        """What to do about the objection, or what there is of noise if there is none."""
        if self.rounding**2 / 2 > _SMALL_BIAS:
            return "Compute in double precision: torch.set_default_dtype(torch.float64), and fit and export anew."
        other = "the weights may be those of another posterior, prior * E[exp(-loss / w)]"
        if self.bias is None:
            return f"It takes two or more runs of a draw that work to know it, and {other}: {_ADVICE}."
        if self.bias > _SMALL_BIAS:
            return (
                f"So {other}. It falls as 1 / num_repeats: num_repeats={self.needed_repeats:,} brings it "
                f"to about {_SMALL_BIAS}."
            )
        if self.bias == 0:
            return "The losses have no noise."
        return f"The noise of the losses adds {self.bias:.2g} to a log weight on average, which is small."


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
    more parameters, the less passes. A guide that is too wide passes, at the price of ``ess``: its draws hold all of
    the posterior, and are right once they are weighted.

    The expectation is over a simulator's noise. The data hold the mean :math:`\bar\ell` of the losses of
    ``num_repeats = R`` runs of a draw, and to second order

    .. math:: E[\exp(-\bar\ell / w)] = \exp\bigl(-E[\ell] / w + \mathrm{Var}[\ell] / (2 w^2 R)\bigr).

    So weights of noisy losses belong to the posterior :math:`\pi(\theta) E[\exp(-\bar\ell / w)]`, which at R = 1 is
    often a much wider one. ``bias`` is the second term in the exponent, with as many runs R as worked, averaged over
    the draws by their weights, for what losses do where the posterior is not does not matter. Large noise gives the
    largest weights to draws whose losses came out low, and these vary less; so the average is by the highest power of
    the weights, 1 at most, whose own bias is 0.05 at most. What of ``bias`` is the same at all draws cancels; yet
    twice ``bias`` is also the variance that the noise gives to a log weight, and both fall as 1 / R. Above 0.05 the
    guide is not judged: k-hat may be low only for losses that are bounded below, or high only for the noise.

    So it is where numbers are rounded: the error of :math:`\bar\ell / w` is that of a number of its size, of 24 bits
    for a model in single precision, which matters for a small w. ``rounding`` is machine epsilon times
    :math:`|\bar\ell| / w`. A loss that is a sum of many terms has a smaller error.

    Sources: Vehtari, Simpson, Gelman, Yao and Gabry (2024), Pareto smoothed importance sampling, JMLR 25(72),
    https://arxiv.org/abs/1507.02646; Yao, Vehtari, Simpson and Gelman (2018), Yes, but did it work? Evaluating
    variational inference, https://arxiv.org/abs/1802.02538.

    Args:
        data: what ``to_inference_data`` returned, with the groups ``posterior`` and ``sample_stats``.
        num_draws: how many draws to resample in each chain, with replacement. None: as many as there are.
        seed: of the resampling.

    Raises:
        ValueError: the data hold no weights, none that is above 0, or infinite ones; ``num_draws`` is below 1.

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
    posterior = arviz_groups.group(data, "posterior")
    raw = log_weights(data)
    chains = [smooth(of_chain) for of_chain in raw.values]
    smoothed = raw.copy(data=np.stack([chain.log_weights for chain in chains])).rename("log_weights")
    smoothed.attrs = {"long_name": "smoothed log importance weight"}
    of_chains = xr.Dataset(
        {name: ("chain", [getattr(chain, name) for chain in chains]) for name in ("khat", "threshold", "ess")},
        {"chain": raw["chain"]},
    )
    return Psis(
        khat=float(of_chains["khat"].max(skipna=False)),
        threshold=float(of_chains["threshold"].min()),
        ess=float(of_chains["ess"].sum()),
        **noise(data, smoothed.values)._asdict(),
        num_failed=int(np.isnan(raw).sum()),
        chains=of_chains,
        draws=_resampled(
            posterior, np.exp(smoothed.values), int(num_draws or raw.shape[1]), np.random.default_rng(seed)
        ),
        log_weights=smoothed,
    )


def log_weights(data: InferenceData | xr.DataTree) -> xr.DataArray:
    """The raw log weights, (chain, draw), NaN where all runs of a draw failed, or its loss or density is NaN.

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
        ValueError: no weight is above 0, or some are infinite.
    """
    if num_infinite := int((raw == np.inf).sum()):
        raise ValueError(
            f"{num_infinite:,} draws of the posterior have an infinite weight: the likelihood or the prior is infinite "
            "there, or the guide's density 0. Look at loss, lp and log_q in sample_stats"
        )
    positive = raw > -np.inf  # which NaN is not
    if not positive.any():
        raise ValueError(
            "no draw of the posterior has a weight above 0, for all runs failed, densities are NaN or the prior "
            "excludes them: look at loss, lp and log_q in sample_stats"
        )
    log_weights = np.full(raw.shape, -np.inf)
    log_weights[positive], khat = _smooth_positive(raw[positive])
    size = int(positive.sum())
    threshold = min(1 - 1 / math.log10(size), 0.7) if size > 1 else -math.inf
    return Smoothed(log_weights, khat, threshold, ess=float(1 / np.exp(2 * log_weights).sum()))


def _smooth_positive(raw: np.ndarray) -> tuple[np.ndarray, float]:
    relative = raw - raw.max()
    weights = np.exp(relative)
    normalised = relative - np.log(weights.sum())
    if raw.size < _FEWEST:
        return normalised, math.nan
    cutoff = np.sort(weights)[-tail_length(raw.size) - 1]
    if np.maximum(weights - cutoff, 0).sum() < _EQUAL * weights.sum():
        return normalised, -math.inf
    with np.errstate(all="ignore"):  # what underflows is caught by what comes out
        smoothed, khat = _psislw(relative)
    if math.isfinite(khat) and np.isfinite(smoothed).all():
        return smoothed, khat
    return normalised, math.inf if weights.sum() ** 2 < _FEWEST_IN_TAIL * (weights**2).sum() else math.nan


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


def noise(data: InferenceData | xr.DataTree, log_weights: np.ndarray) -> Noise:
    """What noise and rounding do to log weights; these are smoothed, (chain, draw)."""
    stats, attrs = arviz_groups.group(data, "sample_stats"), arviz_groups.attributes(data)
    w = np.broadcast_to(np.asarray(attrs.get("w", 1), float), len(log_weights))[:, None]
    rounding = 0.0
    if epsilon := float(stats.attrs.get("epsilon", 0)):
        size = np.where(log_weights > -np.inf, abs(_values(stats["loss"])), 0) / w
        rounding = float((np.exp(log_weights) * epsilon * size).sum(axis=1).max())
    if "loss_variance" not in stats:
        return Noise(None, None, rounding) if stats.attrs.get("noisy", 1) else Noise(0.0, 1, rounding)
    num_repeats = int(attrs["num_repeats"])
    num_failed = _values(stats["num_failed"]) if "num_failed" in stats else np.zeros(log_weights.shape)
    worked = np.maximum(num_repeats - num_failed, 1)
    biases = _values(stats["loss_variance"]) / (2 * w**2 * worked)
    biases[worked < 2] = np.nan
    of_chains = [_typical(*of_chain) for of_chain in zip(biases, log_weights, strict=True)]
    if np.isnan(of_chains).any():
        return Noise(None, None, rounding)
    return Noise(max(of_chains), max(1, math.ceil(max(of_chains) * num_repeats / _SMALL_BIAS)), rounding)


def _values(of_draws: xr.DataArray) -> np.ndarray:
    return of_draws.transpose(*SAMPLE_DIMS).values.astype(float)


def _typical(biases: np.ndarray, log_weights: np.ndarray) -> float:
    """The mean bias by the highest power of the weights that has a small bias itself, 1 at most; NaN if unknown."""
    positive = log_weights > -np.inf
    known = positive & np.isfinite(biases)
    if np.exp(log_weights[positive & ~known]).sum() > _UNKNOWN:
        return math.nan
    biases, log_weights = biases[known], log_weights[known]
    power = mean = 0.0
    for _ in range(20):  # in which it converges
        weights = np.exp(power * log_weights)
        mean = float((weights * biases).sum() / weights.sum())
        power = math.sqrt(_SMALL_BIAS / max(mean, _SMALL_BIAS))
    return mean


def _resampled(posterior: xr.Dataset, weights: np.ndarray, num_draws: int, rng: np.random.Generator) -> xr.Dataset:
    """Each chain drawn from with replacement."""
    picked = np.stack([rng.choice(of_chain.size, num_draws, p=of_chain / of_chain.sum()) for of_chain in weights])
    chains, draws = xr.DataArray(np.arange(len(weights)), dims="chain"), xr.DataArray(picked, dims=SAMPLE_DIMS)
    return posterior.drop_vars("draw").isel(chain=chains, draw=draws).assign_coords(draw=np.arange(num_draws))
