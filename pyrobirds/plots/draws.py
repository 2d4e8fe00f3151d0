"""Pictures of draws: what they predict, and how far they moved from the prior."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from pyrobirds import arviz_groups
from pyrobirds.arviz_groups import SAMPLE_DIMS
from pyrobirds.plots import panels
from pyrobirds.plots.panels import BLACK, BLUE, GREY, VERMILLION
from pyrobirds.series import Series, chosen, elements, matched

if TYPE_CHECKING:
    from arviz import InferenceData


_WIDE = 10  # a prior so many times as wide as the posterior is not shown whole
_ALL = 0.995  # a share that would be written as 100%


def predictive(
    data: InferenceData | xr.DataTree,
    var_names: str | Sequence[str] | None = None,
    *,
    group: str = "posterior_predictive",
    dim: str | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """The data among replicated ones: their median and the bands that hold 50% and 90% of them at each time.

    One panel for each output, and for each series of it; a single number is shown as a histogram. Elements of a plate,
    of which none comes before another, are points with intervals in place of lines and bands. Several fits have a
    median and the ends of the 90% band each, or a histogram or points with intervals each.

    Missing data are gaps. Draws that are not finite where there are data are left out. The bands are the quantiles of
    what the model makes at each time, as they are: those of a walk on whole numbers, which is even at even times, jump
    between times.

    Args:
        data: exported data, with the groups ``observed_data`` and ``group``.
        var_names: the outputs to show. None: all.
        group: where the replicated data are, ``"posterior_predictive"`` or ``"prior_predictive"``.
        dim: the dimension along x, joined by lines. None: the last one of each output that is not a plate.
        ax: the axes to draw on, one for each panel. None: those of a new figure.

    Returns:
        The axes, one for each panel.

    Raises:
        ValueError: a group, an output or ``dim`` is not there, all draws of an output failed, or ``ax`` is not one for
            each panel.
        TypeError: ``ax`` holds something else than Axes.

    Example:
        >>> from pyrobirds.arviz_groups import Variable, collect, dataset
        >>> rng = np.random.default_rng(0)
        >>> y, x = rng.normal(size=50).cumsum(), rng.normal(size=(1, 200, 50)).cumsum(-1)
        >>> data = collect(
        ...     {
        ...         "observed_data": dataset({"x": Variable(y, ("time",))}),
        ...         "posterior_predictive": dataset({"x": Variable(x, ("chain", "draw", "time"))}),
        ...     }
        ... )
        >>> [(ax.get_xlabel(), ax.get_ylabel()) for ax in predictive(data)]
        [('time', 'x')]
        >>> import matplotlib.pyplot as plt
        >>> plt.close()
    """
    shown = [*matched(data, group, var_names, dim)]
    for series in shown:
        if not len(series.draws):
            raise ValueError(f"all {series.num_failed:,} draws of {series.label} in {group} failed: there is no band")
    remedy = "choose outputs by var_names, the dimension along x by dim"
    axes = panels.axes_for(ax, [series.label for series in shown], remedy)
    for panel, series in zip(axes, shown, strict=True):
        draw = _histogram if series.observed.size == 1 else _fan if series.ordered else _intervals
        draw(panel, series, [series.draws[series.chains == chain] for chain in np.unique(series.chains)])
    panels.add_legend(axes, shared=ax is None)
    return axes


def _fan(ax: Axes, series: Series, fits: list[np.ndarray]) -> None:
    at, y = panels.places(ax, series.observed[series.dim]), series.observed.values
    middle = np.stack([_quantiles(draws, 0.5) for draws in fits])
    if len(fits) == 1:
        for level, alpha in ((0.9, 0.2), (0.5, 0.3)):
            low, high = _ends(fits[0], level)
            ax.fill_between(at, low, high, color=BLUE, alpha=alpha, linewidth=0, label=f"{level:.0%} of draws")
    else:
        ends = np.concatenate([_ends(draws, 0.9) for draws in fits])
        panels.plot_each(ax, at, ends, color=BLUE, label="ends of 90% of draws", linestyle=":")
    panels.plot_each(ax, at, middle, color=BLUE, label=f"median of {_count(series, fits)}")
    known = np.pad(np.isfinite(y), 1)
    if known.any():
        ax.plot(at, y, color=BLACK, label="data")
    alone = known[1:-1] & ~known[:-2] & ~known[2:]  # between two gaps, where no line shows it
    ax.plot(at[alone], y[alone], ".", color=BLACK)
    panels.label_axes(ax, panels.name_of(series.observed[series.dim]), panels.name_of(series.observed, series.label))


def _intervals(ax: Axes, series: Series, fits: list[np.ndarray]) -> None:
    at, y = panels.places(ax, series.observed[series.dim]), series.observed.values
    gap = np.diff(np.unique(at)).min(initial=np.ptp(at) or 1)
    shifts = (np.arange(len(fits)) - (len(fits) - 1) / 2) * 0.6 * gap / len(fits)
    for number, (shift, draws) in enumerate(zip(shifts, fits, strict=True)):
        for level, width in ((0.9, panels.thin()), (0.5, 4 * panels.thin())):
            label = "" if number else f"{level:.0%} of {_count(series, fits)}"
            ax.vlines(at + shift, *_ends(draws, level), color=BLUE, linewidth=width, label=label)
    if np.isfinite(y).any():
        ax.plot(at, y, "o", color=BLACK, markersize=0.6 * plt.rcParams["lines.markersize"], label="data")
    panels.label_axes(ax, panels.name_of(series.observed[series.dim]), panels.name_of(series.observed, series.label))


def _histogram(ax: Axes, series: Series, fits: list[np.ndarray]) -> None:
    one = len(fits) == 1
    values = panels.finite(series.draws)
    if panels.are_whole(values):
        bins = panels.whole_edges(int(values.min()), int(values.max())).tolist()
    else:
        bins = np.histogram_bin_edges(values, "auto").tolist()
    for number, draws in enumerate(fits):
        label = None if number else _count(series, fits)
        kind: dict[str, Any] = {"alpha": 0.4} if one else {"histtype": "step", "linewidth": panels.thin()}
        ax.hist(panels.finite(draws), bins=bins, color=BLUE, label=label, **kind)
    if np.isfinite(series.observed.values).all():
        ax.axvline(float(series.observed.values.item()), color=BLACK, label="data")
    panels.label_axes(ax, panels.name_of(series.observed, series.label), "draws")


def _ends(draws: np.ndarray, level: float) -> np.ndarray:
    return _quantiles(draws, [(1 - level) / 2, (1 + level) / 2])


def _quantiles(draws: np.ndarray, at: float | list[float]) -> np.ndarray:
    """Of the draws that are finite, at each time; NaN where none is."""
    some = np.isfinite(draws).any(0)
    found = np.full((*np.shape(at), draws.shape[1]), np.nan)
    found[..., some] = np.nanquantile(np.where(np.isfinite(draws), draws, np.nan)[:, some], at, axis=0)
    return found


def _count(series: Series, fits: list[np.ndarray]) -> str:
    of_fits = f", {len(fits)} fits" if len(fits) > 1 else ""
    failed = f", {series.num_failed:,} failed" if series.num_failed else ""
    return f"{len(series.draws):,} draws{of_fits}{failed}"


def prior_posterior(
    data: InferenceData | xr.DataTree,
    var_names: str | Sequence[str] | None = None,
    *,
    true_values: Mapping[str, ArrayLike] | None = None,
    ax: Axes | Sequence[Axes] | np.ndarray | None = None,
) -> np.ndarray:
    """Densities of the prior and the posterior, a panel for each parameter or element of it.

    Densities are ArviZ's estimates from the draws, reflected at the bounds of the site. These are its attributes
    ``lower`` and ``upper`` in the posterior, which :func:`~pyrobirds.to_inference_data` exports of latent sites and
    takes for others by ``attrs=``. A density that vanishes at a bound is drawn too high there. Of whole numbers the
    shares of draws are shown. Where the prior is more than ten times as wide as the posterior only a part of it is
    shown, and the label says how much. Several fits have a line each.

    Args:
        data: exported data, with the groups ``prior`` and ``posterior``.
        var_names: the sites to show. None: all that have a prior.
        true_values: values to mark by site, of the site's shape; NaN where there is none.
        ax: the axes to draw on, one for each panel. None: those of a new figure.

    Returns:
        The axes, one for each panel.

    Raises:
        ValueError: a group or a site is not there or has no finite draw, a true value is no number or has another shape
            than its site, or ``ax`` is not one for each panel.
        TypeError: ``true_values`` is no dict, or ``ax`` holds something else than Axes.

    Example:
        >>> from pyrobirds.arviz_groups import Variable, collect, dataset
        >>> rng = np.random.default_rng(0)
        >>> draws = {name: Variable(rng.normal(size=(1, 200)), ("chain", "draw")) for name in ("theta", "phi")}
        >>> data = collect({"prior": dataset(draws), "posterior": dataset(draws)})
        >>> [ax.get_xlabel() for ax in prior_posterior(data, true_values={"theta": 0.3})]
        ['theta', 'phi']
        >>> import matplotlib.pyplot as plt
        >>> plt.close()
    """
    prior, posterior = arviz_groups.group(data, "prior"), arviz_groups.group(data, "posterior")
    names = chosen(var_names, [str(name) for name in posterior if name in prior], "prior and posterior")
    truths = _true_values(true_values or {}, posterior, names)
    shown = [element for name in names for element in _elements(prior[name], posterior[name], truths.get(name))]
    axes = panels.axes_for(ax, [element.label for element in shown])
    for panel, element in zip(axes, shown, strict=True):
        share = _distributions(panel, element)
        note = "" if share is None else f"\n{share:.0%} of the prior in view"
        name = panels.name_of(element.posterior, element.label)
        panels.label_axes(panel, name + note, "share of draws" if element.whole else "density")
        panel.set_ylim(0, None)
    panels.add_legend(axes, shared=ax is None)
    return axes


class _View(NamedTuple):
    """What of the axis is shown."""

    low: float
    high: float
    clipped: bool


class _Element(NamedTuple):
    """What is drawn in a panel."""

    label: str
    prior: xr.DataArray
    posterior: xr.DataArray
    truth: float | None
    whole: bool
    view: _View


def _true_values(
    true_values: Mapping[str, ArrayLike], posterior: xr.Dataset, names: Sequence[str]
) -> dict[str, xr.DataArray]:
    if not isinstance(true_values, Mapping):
        raise TypeError(f"true_values must be a dict of values by site, got {type(true_values).__name__}")
    truths = {}
    for name, value in true_values.items():
        if name not in names:
            raise ValueError(f"true_values must be of sites that are shown, {[*names]}, got {name!r}")
        dims = [dim for dim in posterior[name].dims if dim not in SAMPLE_DIMS]
        shape, array = tuple(posterior.sizes[dim] for dim in dims), _numbers(name, value)
        if array.shape != shape:
            raise ValueError(f"true_values[{name!r}] must have the shape {shape} of the site, got {array.shape}")
        truths[name] = xr.DataArray(array, dims=dims)
    return truths


def _numbers(name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value, dtype=float)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"true_values[{name!r}] must be a number or an array of them, got {value!r}") from error


def _elements(prior: xr.DataArray, posterior: xr.DataArray, truths: xr.DataArray | None) -> list[_Element]:
    """Those of a site, in one view unless some would be spikes in it."""
    whole = panels.are_whole(prior.values) and panels.are_whole(posterior.values)
    found = []
    for label, at in elements(posterior, SAMPLE_DIMS):
        before, after = prior.isel(at), posterior.isel(at)
        for group, draws in (("prior", before), ("posterior", after)):
            if not np.isfinite(draws).any():
                raise ValueError(f"no draw of {label} in the {group} is finite: there is no density")
        truth = math.nan if truths is None else float(truths.isel(at))
        truth = None if math.isnan(truth) else truth
        view = _view(panels.finite(before.values), panels.finite(after.values), truth)
        found.append(_Element(label, before, after, truth, whole, view))
    lows, highs, clipped = zip(*(element.view for element in found), strict=True)
    view = _View(min(lows), max(highs), any(clipped))
    if view.high - view.low > _WIDE * min(element.view.high - element.view.low for element in found):
        return found
    return [element._replace(view=view) for element in found]


def _distributions(ax: Axes, element: _Element) -> float | None:
    """Draw both, and return the share of the prior in view, None if that is all."""
    _, prior, posterior, truth, whole, view = element
    chains = [panels.finite(of_chain) for of_chain in posterior.transpose("chain", "draw").values]
    before = panels.finite(prior.values)
    label = "posterior" if len(chains) == 1 else f"posterior, {len(chains)} fits"
    if whole:
        _bars(ax, before, chains, view, label)
    else:
        bounds = (float(posterior.attrs.get("lower", -math.inf)), float(posterior.attrs.get("upper", math.inf)))
        _density(ax, before, view, bounds, color=GREY, label="prior")
        for number, of_chain in enumerate(chains):
            name = None if number else label
            _density(ax, of_chain, view, bounds, color=BLUE, label=name, fill=len(chains) == 1)
    if truth is not None:
        ax.axvline(truth, color=VERMILLION, linestyle="--", label="true value")
    ax.set_xlim(view.low - whole / 2, view.high + whole / 2)
    share = float(np.mean((before >= view.low) & (before <= view.high)))
    return share if view.clipped and share < _ALL else None


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


def _bars(ax: Axes, prior: np.ndarray, chains: list[np.ndarray], view: _View, label: str) -> None:
    """The shares of whole numbers, of several together where there are many."""
    edges = panels.whole_edges(math.floor(view.low), math.ceil(view.high))
    step = edges[1] - edges[0]
    width = 0.8 * step / (1 + len(chains))
    names = ["prior", label, *[None] * (len(chains) - 1)]
    for number, (draws, name) in enumerate(zip([prior, *chains], names, strict=True)):
        shares = np.histogram(draws, edges)[0] / max(1, draws.size)
        at = edges[:-1] + 0.1 * step + width * number
        ax.bar(at, shares, width, align="edge", color=BLUE if number else GREY, label=name)
    ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True))


def _density(
    ax: Axes,
    draws: np.ndarray,
    view: _View,
    bounds: tuple[float, float],
    *,
    color: str,
    label: str | None,
    fill: bool = True,
) -> None:
    if draws.size and np.ptp(draws) == 0:  # a point mass
        ax.axvline(float(draws[0]), color=color, label=label)
        return
    at, density = _kde(draws, view, bounds)
    ax.plot(at, density, color=color, label=label, linewidth=None if fill else panels.thin())
    if fill:
        ax.fill_between(at, density, color=color, alpha=0.2, linewidth=0)


def _kde(draws: np.ndarray, view: _View, bounds: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """ArviZ's estimate of the density in view and a little around it: where, and the density.

    ArviZ reflects at both ends of the range that it is given. So the range ends at a bound, and elsewhere so far from
    all draws that there is nothing to reflect.
    """
    inside = draws[(draws >= view.low) & (draws <= view.high)]
    if inside.size < 2 or np.ptp(inside) == 0:
        return np.empty(0), np.empty(0)
    bandwidth = _arviz_kde(inside)[2]
    pad = 4 * bandwidth
    near = draws[(draws >= view.low - pad) & (draws <= view.high + pad)]
    least, most = near.min(), near.max()
    limits = (min(least, max(least - pad, bounds[0])), max(most, min(most + pad, bounds[1])))
    at, density, _ = _arviz_kde(near, bw=bandwidth, custom_lims=limits)
    return at, density * near.size / draws.size


def _arviz_kde(draws: np.ndarray, **settings: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Where, the density and the bandwidth."""
    if arviz_groups.arviz_generation() < 1:
        from arviz import kde

        found: Any = kde(draws, bw_return=True, **settings)
    else:
        from arviz_stats.base.array import array_stats

        found = array_stats.kde(draws, **settings)
    at, density, bandwidth = found
    return np.asarray(at), np.asarray(density), float(bandwidth)
