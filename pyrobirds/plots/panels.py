"""Axes to draw on, and what pictures share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from numpy.typing import ArrayLike

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLACK, GREY = "#000000", "#767676"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
BY_CHAIN = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)

_MOST_PANELS = 24


def one_axes(ax: Axes | None) -> Axes:
    """The axes, or those of a new figure."""
    if ax is None:
        return plt.subplots(layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be one matplotlib Axes, got {type(ax).__name__}")
    return ax


def axes_for(ax: Axes | Sequence[Axes] | np.ndarray | None, labels: Sequence[str]) -> np.ndarray:
    """As many axes as there are labels."""
    if len(labels) > _MOST_PANELS:
        raise ValueError(
            f"{len(labels)} panels ({', '.join(labels[:3])}, ...) are more than fit in a figure, {_MOST_PANELS}: "
            "choose sites by var_names, or select elements first, as in data.sel(region=['north', 'south'])"
        )
    if ax is None:
        return _new_panels(len(labels))
    axes = np.array([ax] if isinstance(ax, Axes) else ax, dtype=object).ravel()
    if len(axes) != len(labels) or not all(isinstance(one, Axes) for one in axes):
        raise ValueError(f"ax must be {len(labels)} matplotlib Axes, for {', '.join(labels)}, got {len(axes)}")
    return axes


def _new_panels(num: int) -> np.ndarray:
    """Axes in a new figure of matplotlib's size, higher if it must be, each with room for its text."""
    width, height = plt.rcParams["figure.figsize"]
    inches = plt.rcParams["font.size"] / 72
    columns = min(num, max(1, int(width / (20 * inches))))
    rows = math.ceil(num / columns)
    size = (width, max(height, rows * 13 * inches))
    _, grid = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for unused in grid.flat[num:]:
        unused.remove()
    return grid.ravel()[:num]


def add_legend(axes: np.ndarray, *, shared: bool) -> None:
    """One legend for all panels, above them if the figure is new, else in the first."""
    entries = {}
    for ax in axes:
        entries.update({label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)})
    if shared and len(axes) > 1:
        figure = axes[0].figure
        inches = sum(len(label) + 6 for label in entries) * 0.55 * plt.rcParams["font.size"] / 72
        columns = math.ceil(len(entries) / math.ceil(inches / figure.get_figwidth()))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns, frameon=False)
    else:
        axes[0].legend(entries.values(), entries.keys(), frameon=False)


def plot_each(ax: Axes, x: ArrayLike, lines: np.ndarray, *, color: str, label: str) -> None:
    """Lines of one kind, shape (number of lines, number of points), thin if there are several."""
    width = thin() if len(lines) > 1 else None
    for number, y in enumerate(lines):
        ax.plot(x, y, color=color, label=None if number else label, linewidth=width)


def thin() -> float:
    """The width of one line among many."""
    return plt.rcParams["lines.linewidth"] / 2


def name_of(array: xr.DataArray, label: str | None = None) -> str:
    """What an array, or the element of that label, is, with its units: ``time (days)``, ``ill[north] (people)``."""
    name, label = str(array.name), str(array.name) if label is None else label
    label = str(array.attrs.get("long_name", name)) + label.removeprefix(name)
    return f"{label} ({array.attrs['units']})" if array.attrs.get("units") else label


def finite(values: np.ndarray) -> np.ndarray:
    """The finite ones, as a list."""
    return values[np.isfinite(values)].astype(float)
