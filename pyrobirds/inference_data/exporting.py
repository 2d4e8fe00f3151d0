"""Results for ArviZ."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro
import torch
import xarray as xr
from numpy.typing import ArrayLike
from pyro import poutine
from pyro.infer import MCMC
from tqdm.auto import tqdm

from pyrobirds import _checks, arviz_groups
from pyrobirds._rng import forked_rng
from pyrobirds.arviz_groups import Variable
from pyrobirds.fit_result import FitResult
from pyrobirds.inference_data.contents import Chain, Contents, Runs, summed_over
from pyrobirds.inference_data.labelling import Variables, step_numbers
from pyrobirds.inference_data.origins import Origin, guide_chains, mcmc_chains, of_guides, of_mcmc
from pyrobirds.progress import has_bar
from pyrobirds.sampling import Model, Site

if TYPE_CHECKING:
    from arviz import InferenceData

Fn = Callable[..., Any]

GROUPS = (
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "observed_data",
    "constant_data",
    "log_likelihood",
    "log_prior",
    "sample_stats",
    "history",
)
_UNCONSTRAINED = "unconstrained_posterior"
_NEED = {  # what it takes to make a group that may be missing
    "posterior_predictive": "no observed site of the model can be drawn",
    "prior_predictive": "no observed site of the model can be drawn",
    "log_likelihood": "the model has no data, or discrete latents of which there are no draws",
    "sample_stats": "the model has discrete latents of which there are no draws",
    "history": "it is that of a fit, fit=...",
}
_SECONDS = 2.0  # after which a bar is shown


def to_inference_data(
    model: Fn | MCMC,
    guide: Fn | Sequence[Fn] | None = None,
    *args: Any,
    w: float | None = None,
    num_samples: int = 1000,
    fit: FitResult | Sequence[FitResult] | None = None,
    coords: Mapping[str, ArrayLike] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Mapping[str, Any]] | None = None,
    groups: Collection[str] | None = None,
    unconstrained: bool = False,
    num_repeats: int = 1,
    batch_size: int = 100,
    parallel: bool = True,
    seed: int | None = None,
    progress: bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> InferenceData | xr.DataTree:
    r"""Draws from the posterior, and what the model makes of them, for ArviZ.

    For any Pyro model and guide, or for a :class:`pyro.infer.MCMC` that was run. The posterior is the generalised one,

    .. math:: \pi(\theta) \exp\bigl(-\tfrac{1}{w} E[\ell(\theta, y)]\bigr), \qquad \ell = -\log p(y | \theta),

    with the expectation over a simulator's noise. With ``w=1`` and an ordinary likelihood it is the usual one.

    ======================== ============================================================================
    group                    holds, by site
    ======================== ============================================================================
    ``posterior``            draws of latent and deterministic sites
    ``posterior_predictive`` data that the model makes of them, one for each draw
    ``prior``                draws from the prior
    ``prior_predictive``     data that the model makes of these
    ``observed_data``        the data
    ``constant_data``        tensors, arrays and numbers among the model's arguments that are not data
    ``log_likelihood``       generalised: log-probability of the data divided by ``w``
    ``log_prior``            log-density of latent sites
    ``sample_stats``         of each draw, see below
    ``history``              the steps of ``fit``
    ======================== ============================================================================

    ``sample_stats`` has ``loss``, the loss of all data; ``lp``, the log prior minus ``loss / w``; ``log_q``, the
    guide's log-density; ``log_weight = lp - log_q``, for :func:`pyrobirds.diagnostics.psis`. A guide that is a point
    mass (AutoDelta) has no log-density. ``log_weight`` is of the posterior above, at which only the Kullback-Leibler
    divergence aims, and left out for others. The loss of simulators is noisy: ``num_repeats`` averages it.

    Dimensions are ``chain``, ``draw`` and those of the site: its plates by name, those of its event as
    ``pyro.sample(..., infer={"event_dims": ["time"]})`` or ``dims`` say. Scaled and masked sites count as in the
    objective.

    Args:
        model: the Pyro model. Or a :class:`pyro.infer.MCMC` after its run, which brings its model and arguments, and
            its ``w`` if the model is ``tempered(model, w)``.
        guide: the fitted guide. A list of independently fitted ones gives one chain for each.
        *args: the arguments of model and guide, as ``svi.step`` takes them, data included.
        w: the weight of the divergence, above 0; else that of the last step of ``fit``, else 1.
        num_samples: how many draws, of each guide and of the prior.
        fit: what :func:`~pyrobirds.fit` returned, one for each guide. The guide's parameters are those of the state
            that the result is in (``fit.state``), whatever became of them since.
        coords: labels of dimensions.
        dims: names of the dimensions by site: those of the event, or all of them.
        attrs: attributes of sites and dimensions by name, such as ``{"x": {"units": "people"}}``; pictures show
            ``long_name`` and ``units``.
        groups: which groups to make. None: all that can be had.
        unconstrained: add ``unconstrained_posterior``, the latents mapped to unconstrained space.
        num_repeats: how many runs of the simulators the loss of a draw is averaged over.
        batch_size: how many runs to make at once; bounds the memory.
        parallel: run a batch of draws at once, as ``Predictive(parallel=True)`` does. False runs one after another, for
            models that do not declare their batch dimensions by ``pyro.plate``.
        seed: for the draws; the generators of torch, NumPy and Python are left as they were found.
        progress: show a bar if it takes more than some seconds.
        model_kwargs: keyword arguments of model and guide.

    Returns:
        An ``arviz.InferenceData`` with ArviZ below 1, else an ``xarray.DataTree``. Root attributes say how the draws
        came about: ``w``, divergence, guide, seed, steps, stop reason, versions.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or does not belong to the model.

    Warns:
        UserWarning: the prior cannot be drawn from, so that its groups are left out, or runs failed (they are NaN).

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro.optim import Adam
        >>> from pyrobirds import GeneralizedELBO, fit, models
        >>> y = models.random_walk()
        >>> guide = AutoNormal(models.random_walk)
        >>> svi = SVI(models.random_walk, guide, Adam({"lr": 0.05}), GeneralizedELBO(w=100))
        >>> result = fit(svi, y, num_steps=30, progress=False)
        >>> data = to_inference_data(models.random_walk, guide, y, fit=result, num_samples=50)
        >>> dict(data["posterior_predictive"]["x"].sizes)
        {'chain': 1, 'draw': 50, 'time': 100}
    """
    wanted = _wanted(groups, unconstrained)
    num_samples = _checks.positive_int("num_samples", num_samples)
    _checks.boolean("parallel", parallel)
    _checks.boolean("progress", progress)
    seed = None if seed is None else _checks.seed("seed", seed)
    runs = Runs(
        wanted,
        _checks.positive_int("num_repeats", num_repeats),
        _checks.positive_int("batch_size", batch_size),
        tqdm(unit=" runs", delay=_SECONDS, disable=not (progress and has_bar())),
    )
    with runs.bar, nullcontext() if seed is None else forked_rng(seed):
        if isinstance(model, MCMC):
            if guide is not None or args or fit is not None or model_kwargs:
                raise TypeError("an MCMC brings its own model and arguments: call to_inference_data(mcmc)")
            origin = of_mcmc(model, w)
            chains = mcmc_chains(model, origin, parallel)
        else:
            origin = of_guides(model, guide, args, model_kwargs, w, fit)
            chains = guide_chains(origin, num_samples, runs.batch_size, parallel)
        with closing(chains):  # at once also after an error: they hold the parameter store
            made = _Made.of(chains, runs, num_samples, origin.num_chains, required=groups is not None)
    _warn_of_failures(made.contents)
    variables = Variables(made.model, origin, dims or {}, attrs or {}).all(made.contents, made.prior)
    _check_names(coords or {}, attrs or {}, made.model.sites, variables)
    of_groups, of_steps = _attrs_of_groups(made, origin, runs), step_numbers(origin.fits)
    datasets = {
        name: arviz_groups.dataset(
            variables[name], of_steps if name == "history" else coords, of_groups.get(name), attrs
        )
        for name in (*GROUPS, _UNCONSTRAINED)
        if name in wanted and variables.get(name)
    }
    if missing := {*_NEED} & {*(groups or ())} - datasets.keys():
        raise ValueError("; ".join(f"the group {name!r} cannot be made: {_NEED[name]}" for name in sorted(missing)))
    return arviz_groups.collect(datasets, _attrs_of_root(made, origin, runs, seed))


class _Made(NamedTuple):
    """What there is to export, as tensors."""

    model: Model
    ws: list[float]  # of each chain
    contents: list[Contents]  # of each chain
    prior: Contents
    left_out: list[str]  # discrete latents without draws, and deterministic sites, which may depend on them

    @classmethod
    def of(
        cls, chains: Iterable[tuple[Model, Chain]], runs: Runs, num_samples: int, num_chains: int, *, required: bool
    ) -> _Made:
        made = None
        with_prior = not {"prior", "prior_predictive"}.isdisjoint(runs.wanted)
        for model, chain in chains:
            if made is None:
                summed = summed_over(model, chain)
                made = cls(model, [], [], {}, [*summed, *model.named("deterministic")] if summed else [])
                runs.bar.total = num_chains * runs.number(chain.num_draws) + num_samples * with_prior
            _check_same_shapes(made.model.sites, model.sites)
            made.ws.append(chain.w)
            made.contents.append(runs.of_chain(model, chain))
            if with_prior and not made.prior:
                made.prior.update(runs.of_prior(model, num_samples, required=required))
        if made is None:
            raise ValueError("there are no chains")
        return made


def _wanted(groups: Collection[str] | None, unconstrained: bool) -> frozenset[str]:
    _checks.boolean("unconstrained", unconstrained)
    extra = {_UNCONSTRAINED} if unconstrained else set()
    if groups is None:
        return frozenset(extra.union(GROUPS))
    if isinstance(groups, str) or not set(groups) <= {*GROUPS, _UNCONSTRAINED}:
        raise ValueError(f"groups must be some of {[*GROUPS, _UNCONSTRAINED]}, got {groups!r}")
    return frozenset(extra.union(groups))


def _check_same_shapes(sites: Mapping[str, Site], others: Mapping[str, Site]) -> None:
    shapes, other_shapes = ({name: site.shape for name, site in found.items()} for found in (sites, others))
    if shapes != other_shapes:
        names = [name for name in {**shapes, **other_shapes} if shapes.get(name) != other_shapes.get(name)]
        raise ValueError(f"chains must have the same sites of the same shapes, but differ in {names}")


def _warn_of_failures(contents: list[Contents]) -> None:
    noisy = [stats for chain in contents if "num_failed" in (stats := chain.get("sample_stats", {}))]
    failed = sum(int(stats["num_failed"].sum()) for stats in noisy)
    lost = sum(int(stats["loss"].isnan().sum()) for stats in noisy)
    if failed:
        warnings.warn(
            f"{failed} runs failed while the loss was computed: each draw's is the mean over the runs that worked, and "
            f"NaN for the {lost} draws of which none did; sample_stats.num_failed counts them",
            stacklevel=3,
        )


def _check_names(
    coords: Mapping[str, ArrayLike],
    attrs: Mapping[str, Mapping[str, Any]],
    sites: Mapping[str, Site],
    made: Mapping[str, Mapping[str, Variable]],
) -> None:
    groups = {name: variables for name, variables in made.items() if name != "history"}
    dims = {dim: None for variables in groups.values() for variable in variables.values() for dim in variable.dims}
    if unknown := [dim for dim in coords if dim not in dims]:
        raise ValueError(f"coords names {unknown}, the dimensions are {[*dims]}: name those of a site by dims")
    if unknown := [name for name in attrs if name not in dims and name not in sites]:
        raise ValueError(f"attrs names {unknown}, the sites are {[*sites]}, the dimensions {[*dims]}")


def _attrs_of_groups(made: _Made, origin: Origin, runs: Runs) -> dict[str, dict[str, Any]]:
    stats: dict[str, Any] = {
        "noisy": made.model.is_noisy,
        "frozen": made.model.is_frozen,
        "num_repeats": runs.num_repeats,
        "epsilon": made.model.epsilon,
    }
    if origin.guides and "log_weight" not in made.contents[0].get("sample_stats", {}):
        stats["note"] = (
            "no log_weight: the guide has no density at its draws (a point mass, auxiliary variables, a scaled site)"
            if origin.has_weights
            else "no log_weight: only under the Kullback-Leibler divergence does a fit aim at prior * exp(-E[loss] / w)"
        )
    windows = {
        "window_first": [fit.window[0] for fit in origin.fits],
        "window_last": [fit.window[1] for fit in origin.fits],
    }
    return {
        "sample_stats": stats,
        "log_likelihood": {"note": "generalised: log-probability of the data divided by w"},
        "posterior": {"note": f"without {made.left_out}"} if made.left_out else {},
        "history": windows if origin.fits else {},
    }


def _attrs_of_root(made: _Made, origin: Origin, runs: Runs, seed: int | None) -> dict[str, Any]:
    fits, same = origin.fits, _one_or_list
    return {
        "created_at": datetime.datetime.now(datetime.timezone.utc).isoformat(),
        "inference_library": "pyrobirds",
        "inference_library_version": version("pyrobirds"),
        "pyro_version": pyro.__version__,
        "torch_version": str(torch.__version__),
        "w": same(made.ws),
        "divergence": same([fit.divergence for fit in fits]),
        "guide": same([_class_name(guide) for guide in origin.guides]),
        "sampler": origin.sampler,
        "seed": same([fit.seed for fit in fits]),
        "num_steps": same([fit.num_steps for fit in fits]),
        "stop_reason": same([fit.stop_reason.value for fit in fits]),
        "state": same([fit.state for fit in fits]),
        "num_repeats": runs.num_repeats,
        "draws_seed": seed,
    }


def _one_or_list(values: list[Any]) -> Any:
    """What all chains have, else theirs by chain; None where nothing is known of some."""
    if not values or any(value is None for value in values):
        return None
    return values[0] if all(value == values[0] for value in values) else values


def _class_name(guide: Fn) -> str:
    fn = poutine.unwrap(guide)
    return getattr(fn, "__name__", type(fn).__name__)
