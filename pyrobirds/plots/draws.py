"""Pictures of draws: what they predict, and how far they moved from the prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

from pyrobirds import arviz_groups
from pyrobirds.arviz_groups import SAMPLE_DIMS
from pyrobirds.plots import panels
from pyrobirds.plots.panels import BLACK, BLUE, GREY, VERMILLION
from pyrobirds.series import Series, chosen, elements, matched

if TYPE_CHECKING:
    from arviz import InferenceData


_WIDE = 10  # a prior so many times as wide as the posterior is not shown whole


def predictive(
    data: InferenceData | xr.DataTree,
    var_names: str | Sequence[str] | None = None,
    *,
    group: str = "posterior_predictive",
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """The data among replicated ones: their median and the bands that hold 50% and 90% of them at each time.

    One panel for each output, and for each series of it; a single number is shown as a histogram. Missing data are
    gaps; draws that are not finite are left out. The bands are the quantiles of what the model makes at each time, as
    they are: those of a walk on whole numbers, which is even at even times, jump between times.

    Args:
        data: exported data, with the groups ``observed_data`` and ``group``.
        var_names: the outputs to show. None: all.
        group: where the replicated data are, ``"posterior_predictive"`` or ``"prior_predictive"``.
        ax: the axes to draw on, one for each panel. None: those of a new figure.

    Returns:
        The axes, one for each panel.

    Raises:
        ValueError: a group or an output is not there, all its draws failed, or ``ax`` is not one for each panel.
    """
    shown = [*matched(data, group, var_names)]
    axes = panels.axes_for(ax, [series.label for series in shown])
    for panel, series in zip(axes, shown, strict=True):
        if not len(series.draws):
            raise ValueError(f"all {series.num_failed:,} draws of {series.label} in {group} failed: there is no band")
        (_histogram if series.observed.size == 1 else _fan)(panel, series)
    panels.add_legend(axes, shared=ax is None)
    return axes


def _fan(ax: Axes, series: Series) -> None:
    at, y = series.observed[series.dim], series.observed
    for level, alpha in ((0.9, 0.2), (0.5, 0.3)):
        low, high = np.quantile(series.draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
        ax.fill_between(at.values, low, high, color=BLUE, alpha=alpha, linewidth=0, label=f"{level:.0%} of draws")
    ax.plot(at.values, np.median(series.draws, axis=0), color=BLUE, label=f"median of {_count(series)}")
    ax.plot(at.values, y.values, color=BLACK, label="data")
    known = np.pad(np.isfinite(y.values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]  # between two gaps, where no line shows it
    ax.plot(at.values[alone], y.values[alone], ".", color=BLACK)
    ax.set(xlabel=panels.name_of(at), ylabel=panels.name_of(y, series.label))


def _histogram(ax: Axes, series: Series) -> None:
    ax.hist(series.draws.ravel(), bins="auto", color=BLUE, alpha=0.4, label=_count(series))
    ax.axvline(float(series.observed.values.item()), color=BLACK, label="data")
    ax.set(xlabel=panels.name_of(series.observed, series.label), ylabel="draws")


def _count(series: Series) -> str:
    failed = f", {series.num_failed:,} failed" if series.num_failed else ""
    return f"{len(series.draws):,} draws{failed}"


def prior_posterior(
    data: InferenceData | xr.DataTree,
    var_names: str | Sequence[str] | None = None,
    *,
    true_values: Mapping[str, ArrayLike] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Densities of the prior and the posterior, a panel for each parameter or element of it.

    Densities are ArviZ's estimates from the draws, reflected at bounds. Where the prior is more than ten times as wide
    as the posterior only a part of it is shown, and the label says how much. Several fits have a line each.

    Args:
        data: exported data, with the groups ``prior`` and ``posterior``.
        var_names: the sites to show. None: all that have a prior.
        true_values: values to mark by site, of the site's shape.
        ax: the axes to draw on, one for each panel. None: those of a new figure.

    Returns:
        The axes, one for each panel.

    Raises:
        ValueError: a group or a site is not there, a true value has another shape than its site, or ``ax`` is not one
            for each panel.
    """
    prior, posterior = arviz_groups.group(data, "prior"), arviz_groups.group(data, "posterior")
    names = chosen(var_names, [str(name) for name in posterior if name in prior], "prior and posterior")
    truths = _true_values(true_values or {}, posterior, names)
    shown = [(label, name, at) for name in names for label, at in elements(posterior[name], SAMPLE_DIMS)]
    axes = panels.axes_for(ax, [label for label, _, _ in shown])
    for panel, (label, name, at) in zip(axes, shown, strict=True):
        before, after = prior[name].isel(at), posterior[name].isel(at)
        share = _densities(panel, before, after, float(truths[name].isel(at)) if name in truths else None)
        note = "" if share is None else f"\n{share:.0%} of the prior in view"
        panel.set(xlabel=panels.name_of(after, label) + note, ylabel="density", ylim=(0, None))
    panels.add_legend(axes, shared=ax is None)
    return axes


def _true_values(
    true_values: Mapping[str, ArrayLike], posterior: xr.Dataset, names: Sequence[str]
) -> dict[str, xr.DataArray]:
    truths = {}
    for name, value in true_values.items():
        if name not in names:
            raise ValueError(f"true_values must be of sites that are shown, {[*names]}, got {name!r}")
        dims = [dim for dim in posterior[name].dims if dim not in SAMPLE_DIMS]
        shape, array = tuple(posterior.sizes[dim] for dim in dims), np.asarray(value, dtype=float)
        if array.shape != shape:
            raise ValueError(f"true_values[{name!r}] must have the shape {shape} of the site, got {array.shape}")
        truths[name] = xr.DataArray(array, dims=dims)
    return truths


def _densities(ax: Axes, prior: xr.DataArray, posterior: xr.DataArray, truth: float | None) -> float | None:
    """Draw both, and return the share of the prior in view, None if that is all."""
    chains = [panels.finite(of_chain) for of_chain in posterior.transpose("chain", "draw").values]
    before = panels.finite(prior.values)
    view = _view(before, np.concatenate(chains), truth)
    _density(ax, before, view, color=GREY, label="prior")
    label = "posterior" if len(chains) == 1 else f"posterior, {len(chains)} fits"
    for number, of_chain in enumerate(chains):
        _density(ax, of_chain, view, color=BLUE, label=None if number else label, fill=len(chains) == 1)
    if truth is not None:
        ax.axvline(truth, color=VERMILLION, linestyle="--", label="true value")
    ax.set_xlim(view.low, view.high)
    return float(np.mean((before >= view.low) & (before <= view.high))) if view.clipped else None


class _View(NamedTuple):
    """What of the axis is shown."""

    low: float
    high: float
    clipped: bool


def _view(prior: np.ndarray, posterior: np.ndarray, truth: float | None) -> _View:
    """The posterior in whole, and the prior too unless the posterior would be a spike in it."""
    spans = np.array([np.quantile(draws, [0.005, 0.995]) for draws in (prior, posterior)])
    wide, narrow = np.ptp(spans, axis=1)
    clipped = bool(wide > _WIDE * narrow > 0)
    low, high = spans[1] if clipped else (spans.min(), spans.max())
    margin = (1.5 if clipped else 0.1) * (high - low) or 0.5
    draws = np.concatenate([prior, posterior])
    low, high = max(low - margin, draws.min() - margin / 20), min(high + margin, draws.max() + margin / 20)
    if truth is not None:
        low, high = min(low, truth - margin / 3), max(high, truth + margin / 3)
    return _View(float(low), float(high), clipped)


def _density(ax: Axes, draws: np.ndarray, view: _View, *, color: str, label: str | None, fill: bool = True) -> None:
    inside = draws[(draws >= view.low) & (draws <= view.high)]
    if draws.size and np.ptp(draws) == 0:  # a point mass
        ax.axvline(float(draws[0]), color=color, label=label)
        return
    at, density = _kde(inside) if inside.size > 1 and np.ptp(inside) > 0 else (np.empty(0), np.empty(0))
    density = density * inside.size / draws.size
    ax.plot(at, density, color=color, label=label, linewidth=None if fill else panels.thin())
    if fill:
        ax.fill_between(at, density, color=color, alpha=0.2, linewidth=0)


def _kde(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ArviZ's own estimate of a density, reflected at the smallest and the largest draw: where, and the density."""
    if arviz_groups.arviz_generation() < 1:
        from arviz import kde

        at, density = kde(draws)[:2]
    else:
        from arviz_stats.base.array import array_stats

        at, density = array_stats.kde(draws)[:2]
    return np.asarray(at), np.asarray(density)
