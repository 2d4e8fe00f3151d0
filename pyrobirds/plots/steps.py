"""Pictures of the steps of a fit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator

from pyrobirds import arviz_groups
from pyrobirds.plots import panels
from pyrobirds.plots.panels import BLACK, BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from arviz import InferenceData


_COLORS = {"total": BLACK, "loss": BLUE, "divergence": ORANGE}
_LOG_FROM = 20  # ratio of the largest to the smallest value
_OUT_OF_VIEW = 10  # times the range of the curves away from it, on the scale of the axis
_FEWEST = 20  # steps of which some may be out of view
_NEIGHBOURS = 5


def losses(data: InferenceData | xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """Loss, divergence (times w) and their total at each step of the fit; the steps averaged over are shaded.

    The axis is logarithmic where the largest value is more than twenty times the smallest, on either side of a linear
    part around 0 if some are not above 0. Spikes of one or two steps count for nothing in this; where they would hide
    the curves they are out of view, and the label says how many. Several fits have a line each.

    Args:
        data: exported data, with the group ``history``.
        ax: the axes to draw on. None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: the group is not there.
        TypeError: ``ax`` is not one Axes.

    Example:
        >>> from pyrobirds.arviz_groups import Variable, collect, dataset
        >>> loss = Variable(100 + 900 * np.exp(-np.arange(50) / 5)[None], ("chain", "step"))
        >>> window = {"window_first": 26, "window_last": 50}
        >>> history = dataset({"total": loss, "loss": loss}, {"step": np.arange(1, 51)}, window)
        >>> losses(collect({"history": history})).get_xlabel()
        'optimisation step'
        >>> import matplotlib.pyplot as plt
        >>> plt.close()
    """
    history = arviz_groups.group(data, "history")
    divergence = arviz_groups.attributes(data).get("divergence", "D")
    divergence = divergence if isinstance(divergence, str) else "D"  # fits with different ones
    ax = panels.one_axes(ax)
    shown = {name: history[name].transpose("chain", "step").values for name in _COLORS if name in history}
    for name, values in shown.items():
        label = f"w {divergence}(q || prior)" if name == "divergence" else name
        panels.plot_each(ax, history["step"], values, color=_COLORS[name], label=label)
    windows = {*zip(*(np.atleast_1d(history.attrs[f"window_{end}"]) for end in ("first", "last")), strict=True)}
    alpha = max(0.1, 0.2 / len(windows))  # where windows overlap it adds up
    for number, (first, last) in enumerate(sorted(windows)):
        label = None if number else "averaged over"
        ax.axvspan(first, last, color=GREY, alpha=alpha, linewidth=0, label=label, zorder=0)
    num_hidden = _scale(ax, np.concatenate([*shown.values()]))
    note = f"\n{num_hidden:,} value{'s' * (num_hidden > 1)} out of view" if num_hidden else ""
    panels.label_axes(ax, "optimisation step", panels.name_of(history["total"].rename("objective")) + note)
    ax.legend(frameon=False)
    return ax


def _scale(ax: Axes, lines: np.ndarray) -> int:
    """Choose scale and limits of y for lines (number of lines, steps), and return how many values are out of view."""
    values, curves = panels.finite(lines), _without_spikes(lines)
    if not values.size:
        return 0
    low, high = curves.min(), curves.max()
    size = float(np.median(np.abs(curves)))
    if low > 0 and high > _LOG_FROM * low:
        ax.set_yscale("log")
    elif low <= 0 and max(-low, high) > _LOG_FROM * size > 0:
        ax.set_yscale("symlog", linthresh=10 ** math.floor(math.log10(size)))
    hidden = _hidden(ax, values, low, high)
    if ax.get_yscale() != "linear":
        _number_decades(ax)
    return hidden


def _without_spikes(lines: np.ndarray) -> np.ndarray:
    """The finite values, each the median of neighbouring steps if there are many; the first and last as they are."""
    if lines.shape[1] < _FEWEST:
        return panels.finite(lines)
    padded = np.pad(lines, ((0, 0), (_NEIGHBOURS // 2, _NEIGHBOURS // 2)), mode="edge")
    medians = panels.finite(np.median(np.lib.stride_tricks.sliding_window_view(padded, _NEIGHBOURS, axis=1), axis=2))
    return medians if medians.size else panels.finite(lines)


def _hidden(ax: Axes, values: np.ndarray, low: float, high: float) -> int:
    """Leave values that are far from the range of the curves out of view, and return how many."""
    on_axis = ax.yaxis.get_transform().transform
    bottom, top = on_axis(np.array([low, high]))
    reach = _OUT_OF_VIEW * (top - bottom)
    at = on_axis(values)
    near = (at >= bottom - reach) & (at <= top + reach)
    if reach == 0 or near.all():
        return 0
    margin = 0.05 * np.ptp(at[near])
    limits = np.array([at[near].min() - margin, at[near].max() + margin])
    ax.set_ylim(*ax.yaxis.get_transform().inverted().transform(limits))
    return int((~near).sum())


def _number_decades(ax: Axes) -> None:
    """Powers of ten as numbers, and numbers between them where there are few."""
    ax.yaxis.set_major_formatter("{x:g}")
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log" and high < 100 * low:
        ax.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        ax.yaxis.set_minor_formatter("{x:g}")
