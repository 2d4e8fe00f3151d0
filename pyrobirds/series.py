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
        ordered: whether neighbours along it belong together; not so in a plate, unless the user chose it.
        observed: shape (T,), with its coordinate; NaN where missing.
        draws: those that did not fail, shape (S, T); not finite only where data are missing.
        chains: the place of the chain that each comes from, shape (S,).
        num_failed: how many draws are not finite where data were observed.
    """

    label: str
    dim: str | None
    ordered: bool
    observed: xr.DataArray
    draws: np.ndarray
    chains: np.ndarray
    num_failed: int


def matched(
    data: InferenceData | xr.DataTree, group: str, var_names: str | Sequence[str] | None, dim: str | None = None
) -> Iterator[Series]:
    """Each observed series of the data with the draws of it.

    A series runs along ``dim``; without one along the last dimension that is not a plate, else along the last.

    Raises:
        ValueError: a group, an output or ``dim`` is not there.
    """
    observed, replicated = arviz_groups.group(data, "observed_data"), arviz_groups.group(data, group)
    for name in chosen(var_names, [str(name) for name in observed if name in replicated], f"observed_data and {group}"):
        y, x = observed[name].astype(float), replicated[name].astype(float)
        core, ordered = _axis(y, dim)
        chains = np.repeat(np.arange(x.sizes["chain"]), x.sizes["draw"])
        x = x.stack(__draw=SAMPLE_DIMS, create_index=False)
        for label, at in elements(y, core):
            series, draws = y.isel(at), x.isel(at).transpose("__draw", *core).values
            seen = np.isfinite(series.values)
            finite = np.isfinite(draws) | ~seen
            kept = finite.reshape(len(draws), -1).all(1)
            yield Series(
                label=label,
                dim=core[0] if core else None,
                ordered=ordered,
                observed=series,
                draws=draws[kept],
                chains=chains[kept],
                num_failed=int((~kept).sum()),
            )


def _axis(y: xr.DataArray, dim: str | None) -> tuple[list[str], bool]:
    """The dimension of the series, none for a single number, and whether neighbours along it belong together."""
    dims, plates = [*map(str, y.dims)], [*map(str, np.atleast_1d(y.attrs.get("plates", [])))]
    if dim is not None and dim not in dims:
        raise ValueError(f"dim must be a dimension of {y.name!r}, which has {dims}, got {dim!r}")
    events = [one for one in dims if one not in plates] if dim is None else [dim]
    return (events or dims)[-1:], bool(events)


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
