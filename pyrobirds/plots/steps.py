"""Pictures of the steps of a fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from pyrobirds import arviz_groups
from pyrobirds.plots import panels
from pyrobirds.plots.panels import BLACK, BLUE, GREY, ORANGE

if TYPE_CHECKING:
    from arviz import InferenceData


_COLORS = {"total": BLACK, "loss": BLUE, "divergence": ORANGE}
_LOG_FROM = 20  # ratio of the largest to the smallest value


def losses(data: InferenceData | xr.DataTree, *, ax: Axes | None = None) -> Axes:
    """Loss, divergence (times w) and their total at each step of the fit; the steps averaged over are shaded.

    The axis is logarithmic if all values are above 0 and the largest is more than twenty times the smallest. Several
    fits have a line each.

    Args:
        data: exported data, with the group ``history``.
        ax: the axes to draw on. None: those of a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: the group is not there.
        TypeError: ``ax`` is not one Axes.
    """
    history = arviz_groups.group(data, "history")
    divergence = arviz_groups.attributes(data).get("divergence", "D")
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
    if _spread(np.concatenate([values.ravel() for values in shown.values()])) > _LOG_FROM:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:g}")
    ax.set(xlabel="optimisation step", ylabel=panels.name_of(history["total"].rename("objective")))
    ax.legend(frameon=False)
    return ax


def _spread(values: np.ndarray) -> float:
    """The largest value over the smallest; 0 if they are not all above 0."""
    values = panels.finite(values)
    return float(values.max() / values.min()) if values.size and values.min() > 0 else 0.0
