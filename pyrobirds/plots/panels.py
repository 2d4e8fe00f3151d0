"""Axes to draw on, and what pictures share."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, date2num
from numpy.typing import ArrayLike

# Okabe and Ito's colours, which colour-blind readers tell apart.
BLACK, GREY = "#000000", "#767676"
BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
BY_CHAIN = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY)
MARKERS = (".", "x", "^", "s")  # where there are more chains than colours

_MOST_PANELS = 24
_MOST_BARS = 40
# In font sizes. Letters are about so wide.
_LETTER = 0.55
_ROOMY, _TIGHT = (20, 13), (12, 9)  # width and height of a panel
_LEAST, _ENOUGH = 4, 6.5  # height of a panel without what is written around it: to keep the figure's, and else
_TALL = 60  # height of a panel with more than all that can be written around it
_OFFSET = 12  # letters of a date beside the axis


def one_axes(ax: Axes | None) -> Axes:
    """The axes, or those of a new figure."""
    if ax is None:
        return plt.subplots(layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be one matplotlib Axes, got {type(ax).__name__}")
    return ax


def axes_for(
    ax: Axes | Sequence[Axes] | np.ndarray | None,
    labels: Sequence[str],
    remedy: str = "choose sites by var_names",
    *,
    square: bool = False,
) -> np.ndarray:
    """As many axes as there are labels."""
    if len(labels) > _MOST_PANELS:
        raise ValueError(
            f"{len(labels)} panels ({', '.join(labels[:3])}, ...) are more than fit in a figure, {_MOST_PANELS}: "
            f"{remedy}, or select elements first, as in data.sel(region=['north', 'south'])"
        )
    if ax is None:
        return _new_panels(len(labels), square)
    axes = np.array([ax] if isinstance(ax, Axes) else ax, dtype=object).ravel()
    for one in axes:
        if not isinstance(one, Axes):
            raise TypeError(f"ax must be matplotlib Axes, got {type(one).__name__}: those of a figure are figure.axes")
    if len(axes) != len(labels):
        raise ValueError(f"ax must be {len(labels)} matplotlib Axes, for {', '.join(labels)}, got {len(axes)}")
    return axes


def _new_panels(num: int, square: bool) -> np.ndarray:
    """Axes in a new figure of matplotlib's size: as few columns as keep it, higher only where none do.

    Square ones are in as many columns as fit, for what they would gain in width is lost in height.
    """
    width, height = plt.rcParams["figure.figsize"]
    inches = plt.rcParams["font.size"] / 72
    fewest, most = (min(num, max(1, int(width / (columns * inches)))) for columns, _ in (_ROOMY, _TIGHT))
    fitting = [n for n in range(fewest, most) if math.ceil(num / n) * _ROOMY[1] * inches <= height]
    columns = most if square else min(fitting, default=most)
    rows = math.ceil(num / columns)
    size = (width, max(height, rows * _TIGHT[1] * inches))
    _, grid = plt.subplots(rows, columns, squeeze=False, figsize=size, layout="constrained")
    for unused in grid.flat[num:]:
        unused.remove()
    return grid.ravel()[:num]


def add_legend(axes: np.ndarray, *, shared: bool) -> None:
    """One legend for all panels, above them if the figure is new, else in the first."""
    entries = {}
    for ax in axes:
        entries.update({label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)})
    if shared:
        figure = axes[0].figure
        inches = sum(len(label) + 9 for label in entries) * _LETTER * plt.rcParams["font.size"] / 72
        columns = math.ceil(len(entries) / math.ceil(inches / figure.get_figwidth()))
        figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=columns, frameon=False)
        _heighten(axes)
    else:
        axes[0].legend(entries.values(), entries.keys(), frameon=False)


def _heighten(axes: np.ndarray) -> None:
    """Make a new figure higher if too little is left of its panels; as high as square ones need."""
    figure, inches = axes[0].figure, plt.rcParams["font.size"] / 72
    rows, height, aspect = axes[0].get_gridspec().nrows, figure.get_figheight(), axes[0].get_aspect()
    for ax in axes:
        ax.set_aspect("auto")  # the layout errs where panels do not fill their place
    tall = rows * _TALL * inches  # where nothing collapses
    figure.set_figheight(tall)
    figure.draw_without_rendering()
    place = axes[0].get_position(original=True)
    written, width = tall * (1 - rows * place.height), place.width * figure.get_figwidth()
    if aspect != "auto":
        least = written + rows * min(width, _ROOMY[1] * inches)
        figure.set_figheight(min(max(height, least), written + rows * width))
        figure.draw_without_rendering()
    else:
        enough = written + rows * _LEAST * inches <= height
        figure.set_figheight(height if enough else written + rows * _ENOUGH * inches)
    for ax in axes:
        ax.set_aspect(aspect)


def label_axes(ax: Axes, x: str, y: str) -> None:
    """Name the axes, x in several lines where it is too long, and y above the panel where there is no title."""
    width, height = _room(ax)
    if len(y) <= height or ax.get_title():
        ax.set_ylabel(_wrapped(y, height))
    else:
        ax.set_title(_wrapped(y, width), loc="left", fontsize=plt.rcParams["axes.labelsize"])
    if isinstance(ax.xaxis.get_major_formatter(), ConciseDateFormatter):  # it writes at the right
        ax.set_xlabel(_wrapped(x, max(_OFFSET, width - _OFFSET)), loc="left")
    else:
        ax.set_xlabel(_wrapped(x, int(1.25 * width)))  # there is room beside the axis


def set_title(ax: Axes, text: str) -> None:
    """A title in as many lines as it takes."""
    ax.set_title(_wrapped(text, _room(ax)[0]))


def _room(ax: Axes) -> tuple[int, int]:
    """About how many letters fit beside and above each other."""
    size, letter = ax.get_window_extent().size, _LETTER * plt.rcParams["font.size"] * ax.figure.dpi / 72
    height = size[1] if ax.get_aspect() == "auto" else min(size)
    return max(10, int(size[0] / letter)), max(10, int(height / letter))


def _wrapped(text: str, width: int) -> str:
    """Lines that break between words, at the brackets of words that are too long, and inside words only then."""
    text = re.sub(r"\S+", lambda word: word[0].replace("[", "\v[") if len(word[0]) > width else word[0], text)
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, width, replace_whitespace=False)]
    return "\n".join(lines).replace("\v", "")


def places(ax: Axes, labels: xr.DataArray) -> np.ndarray:
    """Where the labels of a dimension lie along x, which gets their ticks: numbers and dates as they are, text in turn.

    Of text as much is shown as there is room for.
    """
    if labels.dtype.kind == "M":
        ax.xaxis_date()
        locator = AutoDateLocator(maxticks=max(3, _room(ax)[0] // 8))
        ax.xaxis.set_major_locator(locator)
        ax.xaxis.set_major_formatter(ConciseDateFormatter(locator))
        return date2num(labels.values)
    if labels.dtype.kind in "iuf":
        return labels.values.astype(float)
    names = [name if len(name) <= 20 else f"{name[:19]}…" for name in map(str, labels.values)]
    width, _ = _room(ax)
    upright = sum(len(name) + 2 for name in names) <= width
    every = 1 if upright else math.ceil(4 * len(names) / width)
    slanted = {} if upright else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(0, len(names), every), names[::every], **slanted)
    return np.arange(len(names), dtype=float)


def plot_each(ax: Axes, x: ArrayLike, lines: np.ndarray, *, color: str, label: str, linestyle: str = "-") -> None:
    """Lines of one kind, shape (number of lines, number of points), thin if there are several."""
    width = thin() if len(lines) > 1 else None
    for number, y in enumerate(lines):
        ax.plot(x, y, color=color, label=None if number else label, linewidth=width, linestyle=linestyle)


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


def are_whole(values: np.ndarray) -> bool:
    """Whether the finite values are counts, as whole numbers or as floats."""
    values = finite(values)
    return bool(values.size and (np.rint(values) == values).all() and np.abs(values).max() < 2**53)


def whole_edges(low: int, high: int) -> np.ndarray:
    """Edges of bins that hold a whole number each, or equally many where there would be too many bins."""
    step = math.ceil((high - low + 1) / _MOST_BARS)
    return np.arange(low, high + step + 1, step) - 0.5
