"""Summary statistics of series, and how losses take them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text

Statistics = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SeriesMoments:
    r"""The usual moments of a time series: location, scale, shape, and memory.

    Of a series :math:`z_1, \dots, z_T` with the mean :math:`\bar z` and :math:`c_k = \sum_t (z_t - \bar z)
    (z_{t+k} - \bar z) / T`, in this order:

    .. math:: \bar z, \quad \sqrt{c_0}, \quad \frac{\sum_t (z_t - \bar z)^3}{T c_0^{3/2}}, \quad
        \frac{\sum_t (z_t - \bar z)^4}{T c_0^2} - 3, \quad \rho_k = \frac{c_k}{c_0} \ (k \in K), \quad
        \rho_k \text{ of } |z| \ (k \in K).

    ``names`` says which is which. The autocorrelations of the absolute values are those that tell of volatility
    clusters; their usual lags in finance go up to 100 (Franke and Westerhoff 2012, section 3, who also take the mean of
    the absolute returns and the Hill estimator of their tail: https://doi.org/10.1016/j.jedc.2011.10.004).

    Missing values (NaN) do not count: the means are over what is there, and :math:`c_k` is the sum over the pairs that
    are there. Of a constant series, and where nothing is there, what is not defined is 0, with a gradient of 0.

    Args:
        lags: K, whole numbers of at least 1.

    Called with series of shape ``(B, T)``, it returns their moments, shape ``(B, 4 + 2 len(lags))``: the first two in
    the units of the series, the others without units.

    Raises:
        TypeError, ValueError: a lag is not a whole number of at least 1, or none that the series have, or the series
            are not of shape ``(B, T)``.

    Example:
        >>> moments = SeriesMoments(lags=(1,))
        >>> moments.names
        ('mean', 'sd', 'skewness', 'excess_kurtosis', 'acf_1', 'acf_abs_1')
        >>> moments(torch.tensor([[1.0, -1.0, 1.0, -1.0]]))
        tensor([[ 0.0000,  1.0000,  0.0000, -2.0000, -0.7500,  0.0000]])
    """

    lags: tuple[int, ...] = (1, 5, 10)

    def __post_init__(self) -> None:
        if not isinstance(self.lags, tuple):
            raise TypeError(f"lags must be a tuple of whole numbers of at least 1, got {self.lags!r}")
        object.__setattr__(self, "lags", tuple(_checks.positive_int("each of lags", lag) for lag in self.lags))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the moments, in their order."""
        own, absolute = (tuple(f"{name}_{lag}" for lag in self.lags) for name in ("acf", "acf_abs"))
        return ("mean", "sd", "skewness", "excess_kurtosis", *own, *absolute)

    def __call__(self, series: Tensor) -> Tensor:
        if series.dim() < 2:
            raise ValueError(
                f"SeriesMoments takes series of shape (B, T), got {shape_text(series.shape)}: data of one number have "
                "no moments over time, give the loss your own statistics, (B,) -> (B, k); to one series add a batch "
                "dimension, series[None]"
            )
        if series.dim() != 2:
            raise ValueError(
                f"SeriesMoments takes series of shape (B, T), got {shape_text(series.shape)}: for several series at "
                "once give the loss your own statistics, (B, *event) -> (B, k)"
            )
        if self.lags and max(self.lags) >= series.shape[1]:
            raise ValueError(
                f"SeriesMoments: series of {series.shape[1]} values have no lag {max(self.lags)}: pass shorter lags, "
                "such as SeriesMoments(lags=(1,))"
            )
        observed = ~series.isnan()
        count = observed.sum(1).clamp(min=1)
        series = torch.where(observed, series, 0)
        mean, deviations, variance, varies = _moments(series, observed, count)
        scale = torch.where(varies, variance, 1).sqrt()
        scaled = deviations / scale.unsqueeze(1)
        shape = [
            torch.where(varies, scale, 0),
            torch.where(varies, scaled.pow(3).sum(1) / count, 0),
            torch.where(varies, scaled.pow(4).sum(1) / count - 3, 0),
        ]
        _, absolute, absolute_variance, absolute_varies = _moments(series.abs(), observed, count)
        memory = [
            self._autocorrelations(deviations, variance * count, varies),
            self._autocorrelations(absolute, absolute_variance * count, absolute_varies),
        ]
        return torch.cat([torch.stack([mean, *shape], 1), *memory], 1)

    def _autocorrelations(self, deviations: Tensor, total: Tensor, varies: Tensor) -> Tensor:
        if not self.lags:
            return deviations[:, :0]
        products = [(deviations[:, lag:] * deviations[:, :-lag]).sum(1) for lag in self.lags]
        defined = varies.unsqueeze(1)
        return torch.where(defined, torch.stack(products, 1) / torch.where(defined, total.unsqueeze(1), 1), 0)


def _moments(series: Tensor, observed: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean, deviations from it, their variance, and whether that is more than the rounding of a constant."""
    mean = series.sum(1) / count
    deviations = torch.where(observed, series - mean.unsqueeze(1), 0)
    variance = deviations.square().sum(1) / count
    rounding = 8 * torch.finfo(series.dtype).eps
    return mean, deviations, variance, variance > (rounding * series.detach()).square().sum(1) / count


def check_statistics(name: str, statistics: object) -> None:
    """Raise unless ``statistics`` can be called."""
    if not callable(statistics):
        raise TypeError(f"{name}: statistics must be a callable (B, *event) -> (B, k), got {statistics!r}")


def of_both(name: str, statistics: Statistics, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The statistics of x, ``(B, m, *event)``, and of y, ``(B, *event)``, floating: ``(B, m, k)`` and ``(B, k)``.

    Where y is missing x is made so, too: the statistics of both are of equally many values at the same places.
    """
    x = torch.where(y.isnan().unsqueeze(1), torch.nan, x)
    own = evaluate(name, statistics, x.flatten(0, 1))
    return own.unflatten(0, x.shape[:2]), evaluate(name, statistics, y)


def evaluate(name: str, statistics: Statistics, series: Tensor) -> Tensor:
    """The statistics of ``(B, *event)``, checked to be ``(B, k)``."""
    found = statistics(series)
    if not isinstance(found, Tensor):
        raise TypeError(f"{name}: statistics returned a {type(found).__name__}, expected a tensor of shape (B, k)")
    if found.dim() != 2 or found.shape[0] != series.shape[0]:
        raise ValueError(
            f"{name}: statistics returned shape {shape_text(found.shape)} for series of shape "
            f"{shape_text(series.shape)}, expected ({series.shape[0]}, k), k statistics of each of {series.shape[0]} "
            "series: reduce over the event only, and stack by torch.stack(..., -1)"
        )
    return found
