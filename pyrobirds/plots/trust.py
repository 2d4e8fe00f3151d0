"""Pictures of how far to trust a posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator
from scipy import stats

from pyrobirds.diagnostics import importance
from pyrobirds.diagnostics.coverage_result import BAND, Coverage
from pyrobirds.plots import panels
from pyrobirds.plots.panels import BLACK, BLUE, GREY, ORANGE
from pyrobirds.series import chosen

if TYPE_CHECKING:
    from arviz import InferenceData

_MOST_NAMED = 8  # fits in a legend
_CALIBRATED = {"color": GREY, "alpha": 0.2, "linewidth": 0, "zorder": 0, "label": f"{BAND:.0%} if calibrated"}


def coverage(
    coverage: Coverage | xr.Dataset,
    var_names: str | Sequence[str] | None = None,
    *,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """The shares of datasets whose posterior intervals hold the true parameter, by the level of the intervals.

    One panel for each parameter, or element of it. The band is where each share lies with a probability of 95% if the
    posterior is calibrated, for one level at a time.

    Args:
        coverage: what :func:`pyrobirds.diagnostics.coverage` returned, or its ``data``, as read from a file.
        var_names: the sites to show. None: all.
        ax: the axes to draw on, one for each panel. None: those of a new figure.

    Returns:
        The axes, one for each panel.

    Raises:
        ValueError: a site is not there, or ``ax`` is not one for each panel.
        TypeError: ``coverage`` is something else, or ``ax`` holds something else than Axes.

    Example:
        >>> from pyrobirds.diagnostics.coverage_result import collect, compare
        >>> rng = np.random.default_rng(0)
        >>> posterior = xr.Dataset({"theta": (("chain", "draw"), rng.normal(size=(1, 99)))})
        >>> compared = [compare(posterior, {"theta": theta}, [0.5, 0.9], rng) for theta in rng.normal(size=100)]
        >>> [ax.get_ylabel() for ax in coverage(collect(compared, [0.5, 0.9], seed=0))]
        ['share that holds the true theta']
        >>> import matplotlib.pyplot as plt
        >>> plt.close()
    """
    table = Coverage(_of_sites(coverage, var_names)).table()
    curves = [*table.groupby("element", sort=False)]
    axes = panels.axes_for(ax, [str(label) for label, _ in curves], square=True)
    for panel, (label, curve) in zip(axes, curves, strict=True):
        panel.fill_between(curve["expected"], curve["lower"], curve["upper"], **_CALIBRATED)
        panel.plot([0, 1], [0, 1], color=GREY, linewidth=panels.thin())
        for column, color, name in (("central", BLUE, "central"), ("hdi", ORANGE, "highest density")):
            panel.plot(curve["expected"], curve[column], color=color, label=name)
        panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        panels.label_axes(panel, "level of the interval", f"share that holds the true {label}")
    panels.add_legend(axes, shared=ax is None)
    return axes


def ranks(
    coverage: Coverage | xr.Dataset,
    var_names: str | Sequence[str] | None = None,
    *,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Histograms of where the true parameters lie in their posteriors, a panel for each parameter or element of it.

    A rank is the share of the posterior below the true value. The histogram is flat if the posterior is calibrated; the
    band holds each bar with a probability of 95%. A valley in the middle says that posteriors are too narrow, a hill
    that they are too wide, a slope that they are shifted.

    Args:
        coverage: what :func:`pyrobirds.diagnostics.coverage` returned, or its ``data``, as read from a file.
        var_names: the sites to show. None: all.
        ax: the axes to draw on, one for each panel. None: those of a new figure.

    Returns:
        The axes, one for each panel.

    Raises:
        ValueError: a site is not there, or ``ax`` is not one for each panel.
        TypeError: ``coverage`` is something else, or ``ax`` holds something else than Axes.

    Example:
        >>> from pyrobirds.diagnostics.coverage_result import collect, compare
        >>> rng = np.random.default_rng(0)
        >>> posterior = xr.Dataset({"theta": (("chain", "draw"), rng.normal(size=(1, 99)))})
        >>> compared = [compare(posterior, {"theta": theta}, [0.5, 0.9], rng) for theta in rng.normal(size=100)]
        >>> [ax.get_xlabel() for ax in ranks(collect(compared, [0.5, 0.9], seed=0))]
        ['rank of the true theta']
        >>> import matplotlib.pyplot as plt
        >>> plt.close()
    """
    data = _of_sites(coverage, var_names)
    labels = [str(label) for label in data["element"].values]
    axes = panels.axes_for(ax, labels)
    num_datasets = data.sizes["dataset"]
    num_bins = min(20, max(2, num_datasets // 10))
    low, high = stats.binom(num_datasets, 1 / num_bins).interval(BAND)
    for panel, label, shares in zip(axes, labels, data["pit"].transpose("element", "dataset").values, strict=True):
        panel.hist(shares, bins=num_bins, range=(0, 1), color=BLUE, alpha=0.4)
        panel.axhspan(low, high, **_CALIBRATED)
        panel.axhline(num_datasets / num_bins, color=GREY, linewidth=panels.thin())
        panel.set_xlim(0, 1)
        panels.label_axes(panel, f"rank of the true {label}", "datasets")
    panels.add_legend(axes, shared=ax is None)
    return axes


def _of_sites(coverage: Coverage | xr.Dataset, var_names: str | Sequence[str] | None) -> xr.Dataset:
    data = coverage.data if isinstance(coverage, Coverage) else coverage
    if not isinstance(data, xr.Dataset) or not {"pit", "site", "element"} <= {*data.variables}:
        raise TypeError(
            f"coverage must be what pyrobirds.diagnostics.coverage returned, or its data, got {type(coverage).__name__}"
        )
    sites = data["site"].values
    names = chosen(var_names, [*dict.fromkeys(map(str, sites))], "the coverage")
    return data.isel(element=np.isin(sites, names))


def khat(data: InferenceData | xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """The tail of the importance weights: how many draws have a larger weight, and the generalised Pareto fit of it.

    Axes are logarithmic. In the title is k-hat, the shape of the tail: the slope towards the right is -1 / k-hat where
    k-hat is above 0, so the flatter the tail, the fewer draws decide. Several fits have a tail each. If the losses are
    too noisy, or numbers too coarse, for k-hat to be judged, the title says that instead.

    Args:
        data: exported data, with the group ``sample_stats``.
        ax: the axes to draw on. None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: the data hold no weights; see :func:`pyrobirds.diagnostics.psis`.
        TypeError: ``ax`` is not one Axes.

    Example:
        >>> from pyrobirds.arviz_groups import Variable, collect, dataset
        >>> log_weight = Variable(np.random.default_rng(0).normal(size=(1, 500)), ("chain", "draw"))
        >>> stats = dataset({"log_weight": log_weight}, attrs={"noisy": False})
        >>> khat(collect({"sample_stats": stats})).get_xlabel()
        'importance weight / mean weight'
        >>> import matplotlib.pyplot as plt
        >>> plt.close()
    """
    raw = importance.log_weights(data).values
    chains = [importance.smooth(of_chain) for of_chain in raw]
    ax = panels.one_axes(ax)
    many, fit_drawn = len(chains) > 1, False
    objection = importance.noise(data, np.stack([chain.log_weights for chain in chains])).objection
    for number, (of_chain, chain) in enumerate(zip(raw, chains, strict=True)):
        again, place = divmod(number, len(panels.BY_CHAIN))
        color, marker = panels.BY_CHAIN[place], panels.MARKERS[again % len(panels.MARKERS)]
        judged = "" if objection else f": k-hat {_in_words(chain.khat)}"
        label = f"fit {number + 1}{judged}" if many else "draws"
        dots, fit = _tail(of_chain, chain)
        ax.plot(*dots, marker, color=color, alpha=0.4 if many else 1, label=label if number < _MOST_NAMED else None)
        if math.isfinite(chain.khat) and fit.size:
            ax.plot(*fit, color=color if many else BLACK)
            fit_drawn = True
    if len(chains) > _MOST_NAMED:
        ax.plot([], [], " ", label=f"and {len(chains) - _MOST_NAMED} others")
    if fit_drawn:
        ax.plot([], [], color=BLACK, label="generalised Pareto fit")
    worst, threshold = np.max([chain.khat for chain in chains]), min(chain.threshold for chain in chains)
    if objection:
        title = f"k-hat cannot be judged:\n{objection}"
    elif np.isnan(worst):
        title = "k-hat cannot be fitted:\ntoo few weights, or too many equal ones"
    else:
        trusted = worst < threshold
        title = (
            f"k-hat {_in_words(worst)}, {'' if trusted else 'not '}below {threshold:.2f}:\n"
            f"the weights {'can' if trusted else 'cannot'} be trusted"
        )
    panels.set_title(ax, title)
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel="importance weight / mean weight", ylabel="share of draws with a larger weight")
    low, high = ax.get_xlim()
    if high < 10 * low:  # powers of ten would leave the axis without numbers
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    for handle in ax.legend(frameon=False, markerscale=2).legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    return ax


def _in_words(khat: float) -> str:
    if math.isnan(khat):
        return "cannot be fitted"
    return f"{khat:.2f}" if math.isfinite(khat) else "infinite" if khat > 0 else "minus infinity"


def _tail(raw: np.ndarray, chain: importance.Smoothed) -> tuple[np.ndarray, np.ndarray]:
    """The larger half of the weights, and the quantiles that smoothing put in the place of the largest.

    Returns:
        Of both the weights and the shares of draws with a larger one, (2, number of weights).
    """
    positive = raw > -np.inf
    order = np.argsort(raw[positive])[::-1]
    raw, smoothed = raw[positive][order], chain.log_weights[positive][order]
    share = (np.arange(raw.size) + 0.5) / positive.size
    log_mean = raw[0] + np.log(np.exp(raw - raw[0]).sum() / positive.size)
    half = slice(0, max(1, raw.size // 2))
    smoothed = smoothed + raw[-1] - smoothed[-1]  # what is not in the tail is unchanged but for the norm
    fitted = slice(0, importance.tail_length(raw.size))
    inside = smoothed[fitted] < raw[0] - 1e-9  # larger ones were cut off there
    return (
        np.stack([np.exp(raw[half] - log_mean), share[half]]),
        np.stack([np.exp(smoothed[fitted][inside] - log_mean), share[fitted][inside]]),
    )
