"""Arrays with named dimensions to the groups of ArviZ, and back.

ArviZ below 1 keeps its groups in an ``arviz.InferenceData``, ArviZ 1 and later in an ``xarray.DataTree``. Each reads
the netCDF files of the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from arviz import InferenceData

SAMPLE_DIMS = ("chain", "draw")
STEP_DIMS = ("chain", "step")

# What ArviZ writes into each group beside the root.
_OF_EVERY_GROUP = ("created_at", "inference_library", "inference_library_version")


class Variable(NamedTuple):
    """An array with named dimensions.

    Attributes:
        values: the array.
        dims: a name for each of its dimensions; those of draws begin with ``SAMPLE_DIMS``, those of the steps of a fit
            with ``STEP_DIMS``.
        attrs: such as ``long_name`` and ``units``; values as :func:`dataset` takes them.
    """

    values: np.ndarray
    dims: tuple[str, ...]
    attrs: Mapping[str, Any] = {}


def dataset(
    variables: Mapping[str, Variable],
    coords: Mapping[str, ArrayLike] | None = None,
    attrs: Mapping[str, Any] | None = None,
    coord_attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> xr.Dataset:
    """A group of ArviZ.

    ``/`` in a name, which netCDF keeps for groups, becomes ``.``. Attributes become what a netCDF file gives back:
    numbers, text and lists of them; a list of one is its entry, a boolean 0 or 1, a mapping its JSON; None is left out.

    Args:
        variables: by name.
        coords: labels by dimension; those of dimensions that do not occur are ignored. A dimension without labels is
            numbered from 0.
        attrs: of the group.
        coord_attrs: attributes of labels, such as their ``units``, by dimension; others are ignored.

    Raises:
        ValueError: names clash, lengths do not agree, or an attribute cannot be written to a netCDF file.

    Example:
        >>> draws = np.zeros((1, 4, 2))
        >>> group = dataset({"rate": Variable(draws, ("chain", "draw", "region"))}, {"region": ["north", "south"]})
        >>> group["rate"].sel(region="north").dims
        ('chain', 'draw')
    """
    dims = _renamed({dim: None for variable in variables.values() for dim in variable.dims}, "dimensions")
    named = {
        name: Variable(np.asarray(values), tuple(dims[dim] for dim in old), _plain_attributes(of_variable))
        for name, (values, old, of_variable) in zip(
            _renamed(variables, "sites").values(), variables.values(), strict=True
        )
    }
    sizes = _sizes(named)
    labels = {dims[dim]: np.asarray(values) for dim, values in (coords or {}).items() if dim in dims}
    for dim, values in labels.items():
        if values.shape != (sizes[dim],):
            raise ValueError(f"coords[{dim!r}] must have shape ({sizes[dim]},), as the data do, got {values.shape}")
    sampled = any(variable.dims[:2] == SAMPLE_DIMS for variable in named.values())
    of_labels = {dims[dim]: _plain_attributes(of_dim) for dim, of_dim in (coord_attrs or {}).items() if dim in dims}
    return xr.Dataset(
        {name: (variable.dims, variable.values, variable.attrs) for name, variable in named.items()},
        {dim: (dim, labels.get(dim, np.arange(size)), of_labels.get(dim, {})) for dim, size in sizes.items()},
        {**_plain_attributes(attrs or {}), **({"sample_dims": [*SAMPLE_DIMS]} if sampled else {})},
    )


def collect(groups: Mapping[str, xr.Dataset], attrs: Mapping[str, Any] | None = None) -> InferenceData | xr.DataTree:
    """Groups in the container of the ArviZ that is installed; groups without variables are left out.

    Args:
        groups: by name, from :func:`dataset`.
        attrs: of the whole, as :func:`dataset` takes them.

    Raises:
        ValueError: an attribute cannot be written to a netCDF file.

    Example:
        >>> data = collect({"observed_data": dataset({"x": Variable(np.arange(3.0), ("time",))})}, {"w": 100})
        >>> group_names(data), attributes(data)
        (('observed_data',), {'w': 100})
    """
    root = _plain_attributes(attrs or {})
    shared = {name: root[name] for name in _OF_EVERY_GROUP if name in root}
    filled = {name: one.assign_attrs({**shared, **one.attrs}) for name, one in groups.items() if one.data_vars}
    if arviz_generation() < 1:
        from arviz import InferenceData

        return InferenceData(attrs=root, **filled)
    return xr.DataTree.from_dict({"/": xr.Dataset(attrs=root), **filled})


def arviz_generation() -> int:
    """The major version of the ArviZ that is installed: 0 or 1."""
    # Names do not tell them apart: 1.x has an InferenceData too, with a warning.
    return int(version("arviz").split(".")[0])


def group(data: InferenceData | xr.DataTree, name: str) -> xr.Dataset:
    """A group of exported data.

    Raises:
        TypeError: these are no exported data.
        ValueError: there is no such group.
    """
    groups = _groups(data)
    if name not in groups:
        how = "fit=result" if name == "history" else f"groups=[{name!r}, ...]"
        raise ValueError(
            f"the data have no group {name!r}, only {', '.join(groups) or 'none'}: export it with "
            f"to_inference_data(..., {how})"
        )
    found = groups[name]
    return found if isinstance(found, xr.Dataset) else found.to_dataset()


def group_names(data: InferenceData | xr.DataTree) -> tuple[str, ...]:
    """The names of the groups of exported data.

    Raises:
        TypeError: these are no exported data.
    """
    return tuple(_groups(data))


def attributes(data: InferenceData | xr.DataTree) -> dict[str, Any]:
    """The attributes of exported data as a whole."""
    return {str(name): value for name, value in data.attrs.items()}


def _groups(data: InferenceData | xr.DataTree) -> Mapping[str, Any]:
    if not (isinstance(data, Mapping) and hasattr(data, "attrs")) or isinstance(data, xr.Dataset):
        raise TypeError(
            "data must be an arviz.InferenceData or an xarray.DataTree, as to_inference_data() and arviz.from_netcdf() "
            f"return them, got {type(data).__name__}"
        )
    return getattr(data, "children", data)  # a DataTree itself holds more than its groups


def _renamed(names: Iterable[str], what: str) -> dict[str, str]:
    """The names without what netCDF keeps for groups."""
    new = {name: name.replace("/", ".") for name in names}
    owners: dict[str, str] = {}
    for name, renamed in new.items():
        if (first := owners.setdefault(renamed, name)) != name:
            raise ValueError(f"the {what} {first!r} and {name!r} would both be written as {renamed!r}: rename one")
    return new


def _sizes(variables: Mapping[str, Variable]) -> dict[str, int]:
    """The length of each dimension; raise where names clash or lengths do not agree."""
    seen: dict[str, tuple[int, str]] = {}
    for name, (values, dims, _) in variables.items():
        if values.ndim != len(dims):
            raise ValueError(f"{name!r} has shape {values.shape}, but {len(dims)} dimensions are named: {dims}")
        own = dims[2:] if dims[:2] in (SAMPLE_DIMS, STEP_DIMS) else dims
        if taken := set(own) & set(SAMPLE_DIMS):
            raise ValueError(
                f"{name!r} has the dimensions {dims}, but ArviZ keeps {sorted(taken)} for the draws: give the plate or "
                "dimension another name"
            )
        if len(set(dims)) < len(dims):
            raise ValueError(f"{name!r} has a dimension twice: {dims}. Name each once, with dims=")
        for dim, size in zip(dims, values.shape, strict=True):
            if dim in variables:
                raise ValueError(
                    f"{dim!r} is both a site and a dimension of {name!r}: rename the site, or the plate or dimension"
                )
            if (known := seen.setdefault(dim, (size, name)))[0] != size:
                raise ValueError(
                    f"the dimension {dim!r} has length {known[0]} in {known[1]!r} and {size} in {name!r}: name them "
                    "differently, with dims="
                )
    return {dim: size for dim, (size, _) in seen.items()}


def _plain_attributes(attrs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _plain(name, value) for name, value in attrs.items() if value is not None}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return json.dumps(value)
    array = np.asarray(value)
    if array.ndim > 1 or array.dtype.kind not in "biufU":
        raise ValueError(f"the attribute {name!r} must be a number, text, a list of them or a mapping, got {value!r}")
    if array.dtype.kind == "b":
        array = array.astype(int)
    return array.item() if array.size == 1 else array.tolist()
