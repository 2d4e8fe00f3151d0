"""The synthetic likelihood, a Gaussian density of what replicates give, and its robust relatives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds.losses.distances import common_dtype
from pyrobirds.losses.shapes import check_replicates
from pyrobirds.losses.statistics import Statistics, check_statistics, of_both
from pyrobirds.losses.value_object import ValueObject

_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True, eq=False, repr=False)
class SyntheticLikelihood(ValueObject):
    r"""Minus the log of the synthetic likelihood: a Gaussian density with the mean and covariance of replicates.

    An estimate, from the mean :math:`\hat\mu_b` and the unbiased covariance matrix :math:`\hat\Sigma_b` of the k
    statistics of m replicates (Wood 2010: https://doi.org/10.1038/nature09319), of

    .. math:: -\log N(s(y_b); \mu, \Sigma) = \tfrac{1}{2} \left( k \log 2\pi + \log |\Sigma| +
        (s(y_b) - \mu)^\top \Sigma^{-1} (s(y_b) - \mu) \right).

    It is a sum over the statistics, not a mean, so that w = 1 is a Bayesian posterior (under the approximation that
    statistics are Gaussian). By default it is

    .. math:: \ell_b = \tfrac{1}{2} \left( k \log 2\pi + \log |\hat\Sigma_b| + k \log \tfrac{m - 1}{2} -
        \sum_{i=1}^k \psi\left(\tfrac{m - i}{2}\right) + \tfrac{m - k - 2}{m - 1} (s(y_b) - \hat\mu_b)^\top
        \hat\Sigma_b^{-1} (s(y_b) - \hat\mu_b) - \tfrac{k}{m} \right),

    whose expectation is that of Gaussian statistics exactly, for every m of at least k + 3 (Ong, Nott, Tran, Sisson and
    Drovandi 2018, section 3: https://doi.org/10.1007/s11222-017-9773-3). An unbiased log-density is what a variational
    fit asks for, whose objective is an expected loss. It is not the unbiased estimator of the density itself, by which
    Price, Drovandi, Lee and Nott 2018 run MCMC (https://doi.org/10.1080/10618600.2017.1302882).

    With ``unbiased=False`` the estimates stand in the place of :math:`\mu` and :math:`\Sigma`, as in Wood's. That
    multiplies the expectation of the quadratic form by :math:`(m - 1) / (m - k - 2)`, and there is none for m of up to
    k + 2. So the fitted noise is too large: with a diagonal covariance matrix (k = 1 here) by a factor
    :math:`\sqrt{(m - 1) / (m - 3)}`, 1.13 for m = 10, and 1.02 for 50. Where the statistics are not Gaussian both are
    biased; the default is the less biased one if their tails are heavier (of exponential ones with m = 10 the fitted
    spread is 1.24 times the true one, and 1.41 times by the plug-in), and about as biased to the other side if they are
    lighter (of uniform ones 0.94, and 1.07).

    How many replicates: the variance of the loss is finite from m = k + 5 on (6 with a diagonal matrix), and the noise
    of the gradient with respect to a spread, whose standard deviation is :math:`\sqrt 2` for each entry by the data
    alone, is 2.7 at m = 6, 1.8 at 10 and 1.6 at 20 there. About k + 10 are a good start.

    Args:
        statistics: s, as for :class:`~pyrobirds.losses.Moments`; None for the entries of the series themselves, of
            which missing ones are left out.
        covariance: ``"full"``, one matrix of all k, or ``"diagonal"``, a product of one Gaussian for each statistic,
            with k = 1 in all that is said of m. The latter treats statistics as independent. Where they are not, as
            neighbours in a series are not, it takes each for evidence of its own and is too sure of itself; w above 1
            makes up for it.
        noise: standard deviation of an error of observation of the statistics, in their units, whose square is added
            to the variances. A statistic that does not vary between replicates, such as the first value of a walk, has
            no density, and neither have statistics that determine each other: without noise the loss is NaN then, that
            is, a failed run. Give a noise, or no such statistic (for entries of the series: NaN in y).
        unbiased: estimate the log-density without bias, see above, which needs m of at least k + 3 and no ``noise``; or
            else plug in, which needs m above k, and with a ``noise`` at least 2. None: without bias if there is no
            noise, for which no unbiased estimate is known.

    Called with x of shape ``(B, m, *event)`` and y of shape ``(B, *event)``, NaN where missing, it returns one loss per
    batch element, shape ``(B,)``, in nats.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or out of range, there are too few replicates, or the
            shapes of x and y or of the statistics are others.

    Example:
        >>> x = torch.tensor([[[-1.0], [0.0], [1.0]]])  # one draw, three replicates, mean 0, variance 1
        >>> SyntheticLikelihood(unbiased=False)(x, torch.tensor([[0.0]]))
        tensor([0.9189])
        >>> SyntheticLikelihood()
        SyntheticLikelihood(unbiased=True)
    """

    statistics: Statistics | None = None
    covariance: Literal["full", "diagonal"] = "full"
    noise: float = 0.0
    unbiased: bool | None = None

    def __post_init__(self) -> None:
        _set_common(self, self.statistics, self.noise)
        if self.covariance not in ("full", "diagonal"):
            raise ValueError(f"SyntheticLikelihood: covariance must be 'full' or 'diagonal', got {self.covariance!r}")
        if self.unbiased is None:
            object.__setattr__(self, "unbiased", self.noise == 0)
        _checks.boolean("unbiased", self.unbiased)
        if self.unbiased and self.noise:
            raise ValueError(
                "SyntheticLikelihood: unbiased=True takes the log of the replicates' own density, to which a noise "
                f"cannot be added, got noise={self.noise!r}: leave one of them out"
            )

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        compared = _compare("SyntheticLikelihood", self.statistics, x, y)
        m, k = compared.simulated.shape[1:]
        own = 1 if self.covariance == "diagonal" else k  # the statistics of one Gaussian
        least = own + 3 if self.unbiased else own + 1
        if m < least and (self.unbiased or not self.noise):
            remedy = "" if self.covariance == "diagonal" else ", or take fewer statistics, or covariance='diagonal'"
            raise ValueError(
                f"SyntheticLikelihood: {m} replicates of {k} statistics, but {self!r} needs at least {least}: pass "
                f"replicates={least} to the Simulator{remedy}"
            )
        value = self._diagonal(compared) if self.covariance == "diagonal" else self._full(compared)
        return value + 0.5 * _LOG_2PI * compared.observed.sum(1)

    def _diagonal(self, compared: _Compared) -> Tensor:
        _, deviations, errors, observed = compared
        m = deviations.shape[1]
        variance = _variances(compared, self.noise)
        log, squared = variance.log(), errors.square() / variance
        if self.unbiased:
            log = log + math.log((m - 1) / 2) - _digammas(1, m).to(log)
            squared = squared * ((m - 3) / (m - 1)) - 1 / m
        return 0.5 * torch.where(observed, log + squared, 0).sum(1)

    def _full(self, compared: _Compared) -> Tensor:
        simulated, deviations, errors, observed = compared
        m, k = simulated.shape[1:]
        covariance = deviations.mT @ deviations / (m - 1)
        # Missing statistics are 0 in all replicates. A variance of 1 makes them independent of the others, with a
        # density that does not depend on anything.
        added = torch.where(observed, self.noise**2, 1.0)
        covariance = covariance + torch.diag_embed(added.to(covariance))
        factor, failed = torch.linalg.cholesky_ex(covariance)
        whitened = torch.linalg.solve_triangular(factor, errors.unsqueeze(2), upper=False).squeeze(2)
        pivots, variances = factor.diagonal(dim1=1, dim2=2), covariance.diagonal(dim1=1, dim2=2)
        half_log = pivots.log().sum(1)
        squared = whitened.square().sum(1)
        if self.unbiased:
            count = observed.sum(1)
            table = torch.nn.functional.pad(_digammas(k, m).cumsum(0), (1, 0)).to(squared)
            half_log = half_log + 0.5 * (count * math.log((m - 1) / 2) - table[count])
            squared = squared * ((m - 2 - count) / (m - 1)) - count / m
        # What is left of a variance given the other statistics is nothing but rounding if they determine it.
        independent = pivots.square() > 8 * k * torch.finfo(pivots.dtype).eps * variances
        varies = independent if self.noise else independent & _varies(simulated, variances)
        has_density = (failed == 0) & varies.all(1)
        return torch.where(has_density, half_log + 0.5 * squared, torch.nan)


class _Robust(ValueObject, ABC):
    """A score of each observed statistic by a Gaussian density of its own, summed."""

    statistics: Statistics | None
    noise: float

    @abstractmethod
    def _score(self, log_density: Tensor, log_variance: Tensor) -> Tensor:
        """Of each statistic, by its log-density and the log of its variance."""

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        name = type(self).__name__
        compared = _compare(name, self.statistics, x, y)
        variance = _variances(compared, self.noise)
        log_variance = variance.log()
        log_density = -0.5 * (_LOG_2PI + log_variance + compared.errors.square() / variance)
        return torch.where(compared.observed, self._score(log_density, log_variance), 0).sum(1)


@dataclass(frozen=True, eq=False, repr=False)
class BetaSyntheticLikelihood(_Robust):
    r"""The beta-loss (density power loss) of a Gaussian synthetic likelihood, robust to outliers in the data.

    .. math:: \ell_b = \sum_{i \in O_b} \left( -\frac{f_i(s_i(y_b))^{\beta - 1} - 1}{\beta - 1} + \frac{1}{\beta}
        \int f_i(z)^\beta dz - 1 \right), \qquad f_i = N(\hat\mu_{b,i}, \hat\sigma_{b,i}^2), \qquad
        \int f_i^\beta = \frac{(2 \pi \hat\sigma_{b,i}^2)^{(1 - \beta) / 2}}{\sqrt\beta},

    with the mean and the unbiased variance over replicates of each statistic, :math:`O_b` the observed ones. It is the
    loss of Knoblauch, Jewson and Damoulas (https://arxiv.org/abs/1806.02261, https://arxiv.org/abs/1904.02063; first
    Basu, Harris, Hjort and Jones 1998, https://doi.org/10.1093/biomet/85.3.549, whose alpha is :math:`\beta - 1`) plus
    a constant by which it is :math:`-\log f_i` in the limit of :math:`\beta \to 1`:
    :class:`~pyrobirds.losses.SyntheticLikelihood` with a diagonal covariance matrix and ``unbiased=False``.

    An outlier is one statistic that no parameter explains, such as a single time of a series. Its score is bounded,
    where that of the log-density grows with the square of its distance; so each statistic has its own Gaussian here,
    and a density of all together, which one outlier would put out, is not offered. It is as sure of itself about
    dependent statistics as the diagonal synthetic likelihood.

    The loss depends on the units of the data, as a power of a density does: for a standard deviation far from 1 one of
    its two terms dwarfs the other. Scale the data to a spread of about 1, or take
    :class:`~pyrobirds.losses.GammaSyntheticLikelihood`, which units multiply by a constant only. The plug-in of
    estimates biases it by a term of order 1 / m.

    Far from the data every statistic is an outlier, so that the loss is flat and its gradient vanishes: start a fit
    where the simulations overlap with the data, for instance from a fit by another loss, or with a large ``noise``.

    Args:
        beta: above 1. The greater, the more robust, at the price of efficiency; 1.05 to 1.5 are usual.
        statistics: as for :class:`~pyrobirds.losses.SyntheticLikelihood`; by default the entries of the series.
        noise: as for :class:`~pyrobirds.losses.SyntheticLikelihood`.

    Called with x of shape ``(B, m, *event)``, m of at least 2, and y of shape ``(B, *event)``, NaN where missing, it
    returns one loss per batch element, shape ``(B,)``.

    Raises:
        TypeError, ValueError: as for :class:`~pyrobirds.losses.SyntheticLikelihood`, or ``beta`` is not above 1.

    Example:
        >>> x = torch.tensor([[[-1.0], [0.0], [1.0]]])
        >>> loss = BetaSyntheticLikelihood(beta=1.5)
        >>> loss(x, torch.tensor([[0.0]])), loss(x, torch.tensor([[10.0]])), loss(x, torch.tensor([[1000.0]]))
        (tensor([0.0806]), tensor([1.3438]), tensor([1.3438]))
    """

    beta: float
    statistics: Statistics | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        _set_common(self, self.statistics, self.noise)
        object.__setattr__(self, "beta", _checked_power("beta", self.beta))

    def _score(self, log_density: Tensor, log_variance: Tensor) -> Tensor:
        power = self.beta - 1
        log_integral = -0.5 * (power * (_LOG_2PI + log_variance) + math.log(self.beta))
        return -torch.expm1(power * log_density) / power + log_integral.exp() / self.beta - 1


@dataclass(frozen=True, eq=False, repr=False)
class GammaSyntheticLikelihood(_Robust):
    r"""The gamma-loss of a Gaussian synthetic likelihood, robust to outliers in the data.

    .. math:: \ell_b = \sum_{i \in O_b} -\frac{\gamma}{\gamma - 1} \left( \frac{f_i(s_i(y_b))^{\gamma - 1}}
        {(\int f_i(z)^\gamma dz)^{(\gamma - 1) / \gamma}} - 1 \right), \qquad
        f_i = N(\hat\mu_{b,i}, \hat\sigma_{b,i}^2),

    with the mean and the unbiased variance over replicates of each statistic, :math:`O_b` the observed ones, and the
    integral of :class:`~pyrobirds.losses.BetaSyntheticLikelihood`. It is the loss of Knoblauch, Jewson and Damoulas
    (https://arxiv.org/abs/1904.02063; from the gamma-divergence of Fujisawa and Eguchi 2008,
    https://doi.org/10.1016/j.jmva.2008.02.004) plus the constant by which it is :math:`-\log f_i` in the limit of
    :math:`\gamma \to 1`. Why each statistic has its own Gaussian is said at
    :class:`~pyrobirds.losses.BetaSyntheticLikelihood`, and what robustness costs far from the data. Other units of the
    data multiply it by a constant and shift it.

    Args:
        gamma: above 1. The greater, the more robust, at the price of efficiency; 1.05 to 1.5 are usual.
        statistics: as for :class:`~pyrobirds.losses.SyntheticLikelihood`; by default the entries of the series.
        noise: as for :class:`~pyrobirds.losses.SyntheticLikelihood`.

    Called with x of shape ``(B, m, *event)``, m of at least 2, and y of shape ``(B, *event)``, NaN where missing, it
    returns one loss per batch element, shape ``(B,)``, of at most :math:`\gamma / (\gamma - 1)` for each statistic.

    Raises:
        TypeError, ValueError: as for :class:`~pyrobirds.losses.SyntheticLikelihood`, or ``gamma`` is not above 1.

    Example:
        >>> x = torch.tensor([[[-1.0], [0.0], [1.0]]])
        >>> loss = GammaSyntheticLikelihood(gamma=1.5)
        >>> loss(x, torch.tensor([[0.0]])), loss(x, torch.tensor([[10.0]])), loss(x, torch.tensor([[1000.0]]))
        (tensor([0.6371]), tensor([3.]), tensor([3.]))
    """

    gamma: float
    statistics: Statistics | None = None
    noise: float = 0.0

    def __post_init__(self) -> None:
        _set_common(self, self.statistics, self.noise)
        object.__setattr__(self, "gamma", _checked_power("gamma", self.gamma))

    def _score(self, log_density: Tensor, log_variance: Tensor) -> Tensor:
        power = self.gamma - 1
        log_integral = -0.5 * (power * (_LOG_2PI + log_variance) + math.log(self.gamma))
        return -torch.expm1(power * (log_density - log_integral / self.gamma)) * (self.gamma / power)


class _Compared(NamedTuple):
    """Statistics of replicates and data, all 0 where they are missing."""

    simulated: Tensor  # (B, m, k)
    deviations: Tensor  # from their mean, (B, m, k)
    errors: Tensor  # s(y) - their mean, (B, k)
    observed: Tensor  # where they are not missing, (B, k)


def _set_common(loss: ValueObject, statistics: object, noise: object) -> None:
    if statistics is not None:
        check_statistics(type(loss).__name__, statistics)
    object.__setattr__(loss, "noise", _checks.non_negative("noise", noise))


def _checked_power(name: str, value: object) -> float:
    power = _checks.finite(name, value)
    if power <= 1:
        raise ValueError(f"{name} must be above 1, got {value!r}: its limit at 1 is SyntheticLikelihood")
    return power


def _compare(name: str, statistics: Statistics | None, x: Tensor, y: Tensor) -> _Compared:
    check_replicates(name, x, y, 2)
    dtype = common_dtype(x, y)
    x, y = x.to(dtype), y.to(dtype)
    if statistics is None:
        batch, k = y.shape[0], y.shape[1:].numel()
        simulated, data = x.reshape(batch, x.shape[1], k), y.reshape(batch, k)
        observed = ~data.isnan()
        simulated, data = torch.where(observed.unsqueeze(1), simulated, 0), torch.where(observed, data, 0)
    else:
        simulated, data = of_both(name, statistics, x, y)
        observed = torch.ones_like(data, dtype=torch.bool)
    # Relative to the first replicate: equal ones deviate by exactly 0 then, however large they are.
    origin = simulated[:, :1].detach()
    relative = simulated - origin
    mean = relative.mean(1, keepdim=True)
    return _Compared(simulated, relative - mean, (data.unsqueeze(1) - origin - mean).squeeze(1), observed)


def _variances(compared: _Compared, noise: float) -> Tensor:
    """Over replicates, with the noise's; 1 where missing, NaN where there is none."""
    simulated, deviations, _, observed = compared
    variance = deviations.square().sum(1) / (deviations.shape[1] - 1) + noise**2
    if not noise:
        variance = torch.where(_varies(simulated, variance), variance, torch.nan)
    return torch.where(observed, variance, 1)


def _varies(simulated: Tensor, variance: Tensor) -> Tensor:
    """Whether a variance is more than the rounding of equal replicates."""
    rounding = 8 * torch.finfo(simulated.dtype).eps
    return variance > (rounding * simulated.detach()).square().mean(1)


def _digammas(k: int, m: int) -> Tensor:
    """Of (m - 1) / 2 to (m - k) / 2, which the expected log-determinant of k statistics of m replicates has."""
    return torch.special.digamma((m - torch.arange(1, k + 1, dtype=torch.float64)) / 2)
