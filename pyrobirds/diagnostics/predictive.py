"""Whether data that the model makes look like the data that were observed."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from pyrobirds.series import Series, matched

if TYPE_CHECKING:
    from arviz import InferenceData

Statistic = Callable[..., Any]


def predictive_check(
    data: InferenceData | xr.DataTree,
    *,
    statistics: Mapping[str, Statistic] | None = None,
    group: str = "posterior_predictive",
    dim: str | None = None,
    var_names: str | Sequence[str] | None = None,
) -> pd.DataFrame:
    r"""Compare summaries of the observed data with those of data that the model makes.

    For a summary T the tail probability is that of replicated data x being as large as the observed data y,

    .. math:: p = \frac{1 + \#\{s: T(x_s) > T(y)\} + \tfrac{1}{2} \#\{s: T(x_s) = T(y)\}}{S + 1},

    over S draws; the one is y itself, so that p is never 0, and ties count half. A p near 0 says that the model makes
    data with a smaller T, one near 1 with a larger T. With draws from the posterior p is conservative, for y was used
    twice: over data from the model it gathers around 1/2, small values are rarer than they say, and a misfit that the
    posterior has adapted to does not show.

    Source: Gelman, Meng and Stern (1996), Posterior predictive assessment of model fitness via realized discrepancies,
    Statistica Sinica 6, 733-760.

    Missing data, which are those that are not finite, are missing from the draws too, so that all summaries are of the
    same times. Draws that are not finite where data were observed, such as those of failed runs, are left out.

    Args:
        data: what ``to_inference_data`` returned, with the groups ``observed_data`` and ``group``.
        statistics: summaries by name, in place of the mean, variance, autocorrelation (the correlation of neighbours,
            where both are observed) and quantiles. Each is called as ``statistic(x, axis=-1)`` with x of shape
            (..., T) of one series, NaN where data are missing, so that a statistic of neighbours sees the gaps, and
            returns shape (...): ``{"maximum": numpy.nanmax}``.
        group: where the replicated data are: ``"posterior_predictive"`` or ``"prior_predictive"``.
        dim: the dimension to summarise over. None: the last one of each output that is not a plate's, such
            as time, or else the last. An output without dimensions is its own summary, ``value``.
        var_names: the outputs to look at. None: all.

    Returns:
        A table with a row for each series (``x``, or ``x[north]`` if x has more dimensions) and statistic, and columns
        ``observed``; ``mean``, ``sd``, ``q05`` and ``q95`` of the replicated statistic; ``p_upper``, the p above;
        ``p_two_sided``, twice the smaller of both tails; ``num_draws``, the draws that have the statistic; and
        ``num_failed``, those that were left out. NaN where a statistic is undefined, such as the autocorrelation of a
        constant.

    Raises:
        ValueError: a group, an output or ``dim`` is not there, or a statistic returns another shape.

    Warns:
        UserWarning: one of ``statistics`` is NaN for data with missing values.

    Example:
        >>> from pyrobirds.arviz_groups import Variable, collect, dataset
        >>> rng = np.random.default_rng(0)
        >>> y, x = rng.normal(size=50), 2 * rng.normal(size=(1, 1000, 50))  # the model makes data twice as wide
        >>> data = collect(
        ...     {
        ...         "observed_data": dataset({"x": Variable(y, ("time",))}),
        ...         "posterior_predictive": dataset({"x": Variable(x, ("chain", "draw", "time"))}),
        ...     }
        ... )
        >>> predictive_check(data).loc["x", "p_upper"].round(2).to_dict()["variance"]
        1.0
    """
    rows = {}
    for series in matched(data, group, var_names, dim):
        for name, statistic in ({"value": _value} if series.dim is None else statistics or _STATISTICS).items():
            rows[series.label, name] = _row(name, statistic, series)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=_Row._fields)
    table.index = pd.MultiIndex.from_tuples(rows, names=("series", "statistic"))
    return table


class _Row(NamedTuple):
    observed: float = math.nan
    mean: float = math.nan
    sd: float = math.nan
    q05: float = math.nan
    q95: float = math.nan
    p_upper: float = math.nan
    p_two_sided: float = math.nan
    num_draws: int = 0
    num_failed: int = 0


def _row(name: str, statistic: Statistic, series: Series) -> _Row:
    seen = np.isfinite(series.observed.values)
    if not seen.any() or not len(series.draws):
        return _Row(num_failed=series.num_failed)
    y, x = (np.where(seen, values, np.nan) for values in (series.observed.values, series.draws))
    of_y = float(_apply(name, statistic, y, ()))
    if math.isnan(of_y) and not seen.all() and statistic not in _STATISTICS.values():
        warnings.warn(
            f"statistics[{name!r}] of {series.label!r} is NaN, and {series.label} has missing values: these are NaN, "
            "which a statistic must leave out, as numpy.nanmean does",
            stacklevel=3,
        )
    of_x = _apply(name, statistic, x, x.shape[:1])
    of_x = of_x[~np.isnan(of_x)]
    if not of_x.size:
        return _Row(of_y, num_failed=series.num_failed)
    upper, lower = (_tail(beyond, of_x == of_y) for beyond in (of_x > of_y, of_x < of_y))
    q05, q95 = np.quantile(of_x, [0.05, 0.95])
    return _Row(
        observed=of_y,
        mean=of_x.mean(),
        sd=of_x.std(),
        q05=q05,
        q95=q95,
        p_upper=math.nan if math.isnan(of_y) else upper,
        p_two_sided=math.nan if math.isnan(of_y) else min(1.0, 2 * min(upper, lower)),
        num_draws=of_x.size,
        num_failed=series.num_failed,
    )


def _tail(beyond: np.ndarray, ties: np.ndarray) -> float:
    return (1 + beyond.sum() + ties.sum() / 2) / (1 + beyond.size)


def _apply(name: str, statistic: Statistic, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    result = np.asarray(statistic(x, axis=-1), dtype=float)
    if result.shape != shape:
        raise ValueError(
            f"statistics[{name!r}] must reduce the last dimension and turn shape {x.shape} into {shape}, got "
            f"{result.shape}: it is called as statistic(x, axis=-1)"
        )
    return result


def _value(x: np.ndarray, axis: int) -> np.ndarray:
    return x


def _of_seen(x: np.ndarray, axis: int, statistic: Statistic) -> np.ndarray:
    """A statistic without the NaN, which are at the same times in all draws: faster than what looks at each draw."""
    return statistic(x[..., ~np.isnan(x).reshape(-1, x.shape[-1])[0]], axis=axis)


def _autocorrelation(x: np.ndarray, axis: int) -> np.ndarray:
    """The correlation of neighbours along the last dimension, over the pairs without NaN; NaN of constants."""
    first, second = x[..., :-1], x[..., 1:]
    missing = np.isnan(first) | np.isnan(second)
    first, second = (_centred(np.where(missing, np.nan, side)) for side in (first, second))
    scale = np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    return np.divide((first * second).sum(-1), scale, out=np.full(scale.shape, np.nan), where=scale > 0)


def _centred(x: np.ndarray) -> np.ndarray:
    """The differences from the mean of the last dimension without NaN, and 0 at NaN; exactly 0 of constants."""
    known = ~np.isnan(x)
    low, high = (edge(x, axis=-1, initial=start, where=known) for edge, start in ((np.min, np.inf), (np.max, -np.inf)))
    mean = x.sum(-1, where=known) / np.maximum(known.sum(-1), 1)
    mean = np.where(low == high, low, mean)  # which rounding would miss
    return np.where(known, x - mean[..., None], 0)


_STATISTICS: Mapping[str, Statistic] = {
    "mean": partial(_of_seen, statistic=np.mean),
    "variance": partial(_of_seen, statistic=np.var),
    "autocorrelation": _autocorrelation,
    "quantile 0.05": partial(_of_seen, statistic=partial(np.quantile, q=0.05)),
    "quantile 0.5": partial(_of_seen, statistic=partial(np.quantile, q=0.5)),
    "quantile 0.95": partial(_of_seen, statistic=partial(np.quantile, q=0.95)),
}
