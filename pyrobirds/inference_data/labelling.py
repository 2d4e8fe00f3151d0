"""Groups as arrays whose dimensions have names, as ArviZ wants them."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from pyrobirds._checks import shape_text
from pyrobirds.arviz_groups import SAMPLE_DIMS, STEP_DIMS, Variable
from pyrobirds.fit_result import FitResult
from pyrobirds.inference_data.contents import Contents
from pyrobirds.inference_data.origins import Origin
from pyrobirds.sampling import Model, Site

_OF_VALUES = {"posterior", "posterior_predictive", "prior", "prior_predictive", "observed_data"}  # in a site's units
_LONG_NAMES = {
    "lp": "log-density of the generalised posterior, not normalised",
    "log_q": "log-density of the guide",
    "log_weight": "log importance weight, not normalised",
    "loss": "loss",
    "loss_variance": "variance of the loss over the runs of a draw",
    "num_failed": "runs that failed",
    "diverging": "divergent transition",
}


class Labels:
    """Names the dimensions of sites: plates by their own names, those of an event by the model's or the user's.

    Args:
        sites: the sites by name.
        dims: names by site: of its event's dimensions, or of all.
    """

    def __init__(self, sites: Mapping[str, Site], dims: Mapping[str, Sequence[str]]) -> None:
        self._sites = sites
        self.axes = {name: _axes(site, dims.get(name)) for name, site in sites.items()}

    def of_values(self, name: str, draws: Tensor) -> Variable:
        """Values of a site, (chains, draws, *its shape)."""
        return _variable(self._counted(name, draws), SAMPLE_DIMS, self.axes[name])

    def of_data(self, name: str, value: Tensor) -> Variable:
        """The value of a site in one run."""
        return _variable(self._counted(name, value), (), self.axes[name])

    def _counted(self, name: str, values: Tensor) -> Tensor:
        """Whole numbers as such, for torch draws counts as floats, and ArviZ tells them by their type."""
        whole = self._sites[name].is_discrete and bool(values.isfinite().all())
        return values.long() if whole else values

    def of_batch(self, name: str, draws: Tensor) -> Variable:
        """What there is for each element of a site's plates, such as a log-probability."""
        n = self._sites[name].num_plate_dims
        return _variable(draws, SAMPLE_DIMS, {axis: dim for axis, dim in self.axes[name].items() if axis < n})

    def of_unconstrained(self, name: str, draws: Tensor) -> Variable:
        """Values of a site mapped to unconstrained space, where its event may have another shape."""
        site = self._sites[name]
        if draws.shape[len(SAMPLE_DIMS) :] == site.shape:
            return self.of_values(name, draws)
        n = site.num_plate_dims
        axes = {axis: dim for axis, dim in self.axes[name].items() if axis < n}
        n_event = draws.dim() - len(SAMPLE_DIMS) - n
        axes |= {n + axis: f"{name}_unconstrained_dim_{axis}" for axis in range(n_event)}
        return _variable(draws, SAMPLE_DIMS, axes)


def _variable(values: Tensor, sample_dims: tuple[str, ...], axes: Mapping[int, str]) -> Variable:
    """Without the dimensions that have no name: they have length 1, and stand for plates that the site is not in."""
    n = len(sample_dims)
    shape = values.shape[:n] + torch.Size(values.shape[n + axis] for axis in axes)
    return Variable(values.reshape(shape).cpu().numpy(), (*sample_dims, *axes.values()))


def _axes(site: Site, given: Sequence[str] | None) -> dict[int, str]:
    """Names of the dimensions that are kept."""
    n = site.num_plate_dims
    event = [*range(n, len(site.shape))]
    kept = [axis for axis in range(n) if site.plates[axis] is not None or site.shape[axis] != 1] + event
    names: dict[int, str | None] = {axis: site.plates[axis] if axis < n else None for axis in kept}
    if given is not None:
        if isinstance(given, str) or len(given) not in (len(event), len(kept)):
            every = f", or all {len(kept)} dimensions with those of its plates" if len(kept) > len(event) else ""
            raise ValueError(
                f"dims[{site.name!r}] must name the {len(event)} dimensions of its event{every} "
                f"(its shape is {shape_text(site.shape)}), got {given!r}"
            )
        names.update(zip(event if len(given) == len(event) else kept, given, strict=True))
    elif site.event_dims is not None:
        names.update(zip(event, site.event_dims, strict=True))
    unnamed = [axis for axis, name in names.items() if name is None]
    return {axis: name or f"{site.name}_dim_{unnamed.index(axis)}" for axis, name in names.items()}


class Variables:
    """The groups as arrays with named dimensions."""

    def __init__(
        self,
        model: Model,
        origin: Origin,
        dims: Mapping[str, Sequence[str]],
        attrs: Mapping[str, Mapping[str, Any]],
    ) -> None:
        sites = model.sites
        self._sites, self._bounds = sites, model.bounds
        self._origin, self._dims, self._attrs = origin, dims, attrs
        data = [site for site in sites.values() if site.kind == "observed"]
        self._constants = _constants(origin, [one for site in data for one in (site.value, site.data)])
        if unknown := [name for name in dims if name not in sites and name not in self._constants]:
            raise ValueError(f"dims names {unknown}, the sites are {[*sites]}, constant data {[*self._constants]}")
        self._labels = Labels(sites, dims)

    def all(self, contents: list[Contents], prior: Contents) -> dict[str, dict[str, Variable]]:
        """By group and name, of the contents of each chain and of the prior."""
        stacked = {
            group: {name: torch.stack([chain[group][name] for chain in contents]) for name in contents[0][group]}
            for group in contents[0]
        }
        stacked |= {
            group: {name: draws.unsqueeze(0) for name, draws in found.items()} for group, found in prior.items()
        }
        label = {"log_likelihood": self._labels.of_batch, "log_prior": self._labels.of_batch}
        label |= {"sample_stats": _statistic, "unconstrained_posterior": self._labels.of_unconstrained}
        made = {
            group: {name: label.get(group, self._labels.of_values)(name, draws) for name, draws in found.items()}
            for group, found in stacked.items()
        }
        made["observed_data"] = {
            name: self._labels.of_data(name, site.data) for name, site in self._sites.items() if site.kind == "observed"
        }
        for group in _OF_VALUES & made.keys():
            made[group] = {
                name: variable._replace(attrs={**self._known(group, name), **self._attrs.get(name, {})})
                for name, variable in made[group].items()
            }
        made["constant_data"] = {
            name: Variable(value, _constant_dims(name, value, self._dims.get(name), made["observed_data"].values()))
            for name, value in self._constants.items()
        }
        made["history"] = _history(self._origin.fits)
        return made

    def _known(self, group: str, name: str) -> dict[str, Any]:
        """What pictures want to know of a site."""
        if group == "observed_data":
            axes, n = self._labels.axes[name], self._sites[name].num_plate_dims
            return {"plates": [dim.replace("/", ".") for axis, dim in axes.items() if axis < n] or None}  # as exported
        return self._bounds[name]._asdict() if name in self._bounds and group in ("posterior", "prior") else {}


def _statistic(name: str, draws: Tensor) -> Variable:
    return Variable(draws.cpu().numpy(), SAMPLE_DIMS, {"long_name": _LONG_NAMES[name]})


def _constants(origin: Origin, data: list[Tensor]) -> dict[str, np.ndarray]:
    """The tensors, arrays and numbers among the model's arguments that are not the data."""
    constants = {}
    for name, value in _arguments(origin).items():
        if isinstance(value, Tensor | np.ndarray | np.generic | int | float):
            array = _array(value)
            if array.dtype.kind in "biufUM" and not any(_is_data(value, array, one) for one in data):
                constants[name] = array
    return constants


def _is_data(value: Any, array: np.ndarray, data: Tensor) -> bool:
    """Whether an argument is the data: the same tensor, or an array of the same values, NaN included."""
    if value is data:
        return True
    equal = array.size > 1 and array.shape == data.shape and array.dtype.kind in "biuf"
    return equal and np.array_equal(array, _array(data), equal_nan=True)


def _array(value: Any) -> np.ndarray:
    return np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value)


def _arguments(origin: Origin) -> dict[str, Any]:
    """The model's arguments by name, as far as it says their names."""
    fn = poutine.unwrap(origin.model)
    fn = fn.forward if isinstance(fn, torch.nn.Module) else fn
    try:
        bound = inspect.signature(fn).bind_partial(*origin.args, **origin.kwargs)
    except (TypeError, ValueError):
        return origin.kwargs
    named = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is not inspect.Parameter.VAR_POSITIONAL:
            named[name] = value
    return named


def _constant_dims(
    name: str, value: np.ndarray, given: Sequence[str] | None, of_data: Iterable[Variable]
) -> tuple[str, ...]:
    """Those that are given, else those of the data of the same shape, if all of these have the same."""
    if given is None:
        known = {one.dims for one in of_data if one.values.shape == value.shape}
        return known.pop() if len(known) == 1 else tuple(f"{name}_dim_{axis}" for axis in range(value.ndim))
    if isinstance(given, str) or len(given) != value.ndim:
        raise ValueError(f"dims[{name!r}] must name its {value.ndim} dimensions, got {given!r}")
    return tuple(given)


def _history(fits: Sequence[FitResult]) -> dict[str, Variable]:
    """The steps of each fit as a chain, filled up with NaN where others are longer."""
    rows = [fit.history.reindex(step_numbers(fits)) for fit in fits]
    return {
        str(name): Variable(np.stack([row[name].values for row in rows]), STEP_DIMS, rows[0][name].attrs)
        for name in (rows[0].data_vars if rows else ())
        if all(name in row for row in rows)
    }


def step_numbers(fits: Sequence[FitResult]) -> dict[str, np.ndarray]:
    """The coordinates of the history: steps from 1 to the last of the longest fit."""
    return {"step": np.arange(1, max((fit.num_steps for fit in fits), default=0) + 1)}
