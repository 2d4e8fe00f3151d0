"""Pictures of how far to trust a posterior."""

from __future__ import annotations

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

_CALIBRATED = {"color": GREY, "alpha": 0.2, "linewidth": 0, "zorder": 0, "label": f"{BAND:.0%} if calibrated"}


def coverage(coverage: Coverage, var_names: str | Sequence[str] | None = None, *, ax: Axes | None = None) -> Axes:
    """The shares of datasets whose posterior intervals hold the true parameter, by the level of the intervals.

    The band is where each share lies with a probability of 95% if the posterior is calibrated, for one level at a time.
    Several parameters, or elements, have a line each.

    Args:
        coverage: what :func:`pyrobirds.diagnostics.coverage` returned.
        var_names: the sites to show. None: all.
        ax: the axes to draw on. None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: a site is not there.
        TypeError: ``coverage`` is something else, or ``ax`` is not one Axes.
    """
    table = Coverage(_of_sites(coverage, var_names)).table()
    curves = [curve for _, curve in table.groupby("element", sort=False)]
    ax = panels.one_axes(ax)
    ax.fill_between(curves[0]["expected"], curves[0]["lower"], curves[0]["upper"], **_CALIBRATED)
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=panels.thin())
    for column, color, label in (("central", BLUE, "central"), ("hdi", ORANGE, "highest density")):
        lines = np.stack([curve[column] for curve in curves])
        panels.plot_each(ax, curves[0]["expected"], lines, color=color, label=label)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set(xlabel="level of the interval", ylabel="share that holds the true value")
    ax.legend(frameon=False)
    return ax


def ranks(
    coverage: Coverage,
    var_names: str | Sequence[str] | None = None,
    *,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Histograms of where the true parameters lie in their posteriors, a panel for each parameter or element of it.

    A rank is the share of the posterior below the true value. The histogram is flat if the posterior is calibrated; the
    band holds each bar with a probability of 95%. A valley in the middle says that posteriors are too narrow, a hill
    that they are too wide, a slope that they are shifted.

    Args:
        coverage: what :func:`pyrobirds.diagnostics.coverage` returned.
        var_names: the sites to show. None: all.
        ax: the axes to draw on, one for each panel. None: those of a new figure.

    Returns:
        The axes, one for each panel.

    Raises:
        ValueError: a site is not there, or ``ax`` is not one for each panel.
        TypeError: ``coverage`` is something else.
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
        panel.set(xlim=(0, 1), xlabel=f"rank of the true {label}", ylabel="datasets")
    panels.add_legend(axes, shared=ax is None)
    return axes


def _of_sites(coverage: Coverage, var_names: str | Sequence[str] | None) -> xr.Dataset:
    if not isinstance(coverage, Coverage):
        raise TypeError(
            f"coverage must be what pyrobirds.diagnostics.coverage returned, got {type(coverage).__name__}: of a file "
            "it is Coverage(xarray.load_dataset(path))"
        )
    sites = coverage.data["site"].values
    names = chosen(var_names, [*dict.fromkeys(map(str, sites))], "the coverage")
    return coverage.data.isel(element=np.isin(sites, names))


def khat(data: InferenceData | xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """The tail of the importance weights: how many draws have a larger weight, and the generalised Pareto fit of it.

    Axes are logarithmic. In the title is k-hat, the shape of the tail: the slope towards the right is -1 / k-hat where
    k-hat is above 0, so the flatter the tail, the fewer draws decide. Several fits have a tail each.

    Args:
        data: exported data, with the group ``sample_stats``.
        ax: the axes to draw on. None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: the data hold no weights; see :func:`pyrobirds.diagnostics.psis`.
        TypeError: ``ax`` is not one Axes.
    """
    raw = importance.log_weights(data).values
    chains = [importance.smooth(of_chain) for of_chain in raw]
    ax = panels.one_axes(ax)
    for number, (of_chain, chain) in enumerate(zip(raw, chains, strict=True)):
        label = f"fit {number + 1}: k-hat {chain.khat:.2f}" if len(chains) > 1 else "draws"
        _tail(ax, of_chain, chain.log_weights, color=panels.BY_CHAIN[number % len(panels.BY_CHAIN)], label=label)
    ax.plot([], [], color=BLACK, label="generalised Pareto fit")
    worst, threshold = max(chain.khat for chain in chains), min(chain.threshold for chain in chains)
    trusted = worst < threshold
    ax.set_title(
        f"k-hat {worst:.2f}, {'' if trusted else 'not '}below {threshold:.2f}:\n"
        f"the weights {'can' if trusted else 'cannot'} be trusted"
    )
    ax.set(xscale="log", yscale="log")
    ax.set(xlabel="importance weight / mean weight", ylabel="share of draws with a larger weight")
    low, high = ax.get_xlim()
    if high < 10 * low:  # powers of ten would leave the axis without numbers
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter("{x:g}")
    ax.legend(frameon=False)
    return ax


def _tail(ax: Axes, raw: np.ndarray, smoothed: np.ndarray, *, color: str, label: str) -> None:
    """The larger half of the weights as dots, and the quantiles that smoothing put in the place of the largest."""
    positive = raw > -np.inf
    order = np.argsort(raw[positive])[::-1]
    raw, smoothed = raw[positive][order], smoothed[positive][order]
    share = (np.arange(raw.size) + 0.5) / positive.size
    log_mean = raw[0] + np.log(np.exp(raw - raw[0]).sum() / positive.size)
    half = slice(0, max(1, raw.size // 2))
    ax.plot(np.exp(raw[half] - log_mean), share[half], ".", color=color, label=label)
    smoothed = smoothed + raw[-1] - smoothed[-1]  # what is not in the tail is unchanged but for the norm
    fitted = slice(0, importance.tail_length(raw.size))
    inside = smoothed[fitted] < raw[0]  # larger ones were cut off there
    ax.plot(np.exp(smoothed[fitted][inside] - log_mean), share[fitted][inside], color=BLACK)
