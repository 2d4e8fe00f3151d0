"""Observed series, and what a model makes of them, picked from exported data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr

from pyrobirds import arviz_groups
from pyrobirds.arviz_groups import SAMPLE_DIMS

if TYPE_CHECKING:
    from arviz import InferenceData


class Series(NamedTuple):
    """One observed series and what the model makes of it.

    Attributes:
        label: ``x`` or ``x[north]``.
        dim: the name of its dimension; None for a single number.
        observed: shape (T,), with its coordinate; NaN where missing.
        draws: those that did not fail, shape (S, T).
        num_failed: how many draws are not finite where data were observed.
    """

    label: str
    dim: str | None
    observed: xr.DataArray
    draws: np.ndarray
    num_failed: int


def matched(
    data: InferenceData | xr.DataTree, group: str, var_names: str | Sequence[str] | None, dim: str | None = None
) -> Iterator[Series]:
    """Each observed series of the data with the draws of it.

    Raises:
        ValueError: a group, an output or ``dim`` is not there.
    """
    observed, replicated = arviz_groups.group(data, "observed_data"), arviz_groups.group(data, group)
    for name in chosen(var_names, [str(name) for name in observed if name in replicated], f"observed_data and {group}"):
        y, x = observed[name].astype(float), replicated[name].astype(float)
        along = dim if dim is not None else y.dims[-1] if y.dims else None
        if dim is not None and dim not in y.dims:
            raise ValueError(f"dim must be a dimension of {name!r}, which has {[*y.dims]}, got {dim!r}")
        core = () if along is None else (along,)
        x = x.transpose(*SAMPLE_DIMS, ...).stack(__draw=SAMPLE_DIMS, create_index=False)
        for label, at in elements(y, core):
            series, draws = y.isel(at), x.isel(at).transpose("__draw", *core).values
            seen = np.isfinite(series.values)
            finite = np.isfinite(draws) | ~seen
            kept = finite.reshape(len(draws), -1).all(1)
            yield Series(label, along, series, draws[kept], int((~kept).sum()))


def chosen(var_names: str | Sequence[str] | None, known: Sequence[str], where: str) -> list[str]:
    """The variables that a user chose, or all there are.

    Raises:
        ValueError: there is no such variable, or none at all.
    """
    names = [*known] if var_names is None else [var_names] if isinstance(var_names, str) else [*var_names]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"var_names must be among the variables of {where}, {[*known]}, got {unknown or 'none'}")
    return names


def elements(array: xr.DataArray, core: Sequence[Any] = ()) -> Iterator[tuple[str, dict[Any, int]]]:
    """Each element of an array, or each slice along the ``core`` dimensions: its label and its place."""
    dims = [dim for dim in array.dims if dim not in core]
    for places in product(*(range(array.sizes[dim]) for dim in dims)):
        names = [array[dim].values[place] for dim, place in zip(dims, places, strict=True)]
        label = f"{array.name}[{', '.join(map(str, names))}]" if dims else str(array.name)
        yield label, dict(zip(dims, places, strict=True))
