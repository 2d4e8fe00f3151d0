"""Where the draws of a posterior come from: guides that were fitted to a model, or an MCMC that was run on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from pyrobirds import _checks, sampling, traces, trained
from pyrobirds._checks import shape_text
from pyrobirds.fit_result import FitResult
from pyrobirds.inference_data.contents import Chain
from pyrobirds.sampling import Model

Fn = Callable[..., Any]


@dataclass(frozen=True)
class Origin:
    """Where draws come from: a model with its arguments, and guides or an MCMC that was fitted to it."""

    model: Fn
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    w: float | None  # as it was given
    guides: list[Fn]
    fits: list[FitResult]
    num_chains: int
    sampler: str | None = None

    @property
    def has_weights(self) -> bool:
        """Whether the chains aim at the generalised posterior under the Kullback-Leibler divergence."""
        return all(fit.divergence == "KL" for fit in self.fits)


def of_guides(
    model: Any,
    guide: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    w: float | None,
    fit: FitResult | Sequence[FitResult] | None,
) -> Origin:
    """Guides and what was fitted to what, checked."""
    if not callable(model):
        raise TypeError(f"model must be a Pyro model or a pyro.infer.MCMC that was run, got {model!r}")
    guides = [*guide] if isinstance(guide, list | tuple) else [guide]
    if not guides or not all(callable(one) for one in guides):
        raise TypeError(f"guide must be the fitted Pyro guide, or a list of them, got {guide!r}")
    fits: list[Any] = [] if fit is None else [*fit] if isinstance(fit, list | tuple) else [fit]
    for one in fits:
        if not isinstance(one, FitResult):
            raise TypeError(f"fit must be what pyrobirds.fit returned, or a list of that, got {one!r}")
    if len(guides) == 1 and len(fits) > 1:
        guides *= len(fits)  # one guide that was fitted several times
    if fits and len(fits) != len(guides):
        raise ValueError(f"fit must be one result for each of the {len(guides)} guides, got {len(fits)}")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise TypeError(f"model_kwargs must be a dict of keyword arguments, got {kwargs!r}")
    if isinstance(model, AutoGuide):
        raise TypeError(f"model must be the Pyro model, got the guide {type(model).__name__}: it comes second")
    return Origin(model, args, {**(kwargs or {})}, w, guides, fits, len(guides))


def of_mcmc(mcmc: MCMC, w: float | None) -> Origin:
    """The model and arguments of an MCMC that was run."""
    model = getattr(mcmc.kernel, "model", None)
    if model is None:
        raise ValueError("the MCMC runs on a potential function: make its kernel of a Pyro model, as in NUTS(model)")
    if mcmc._samples is None or mcmc._args is None or mcmc._kwargs is None:
        raise ValueError("the MCMC was not run yet: call mcmc.run(...)")
    return Origin(model, mcmc._args, mcmc._kwargs, w, [], [], mcmc.num_chains, type(mcmc.kernel).__name__)


def weight(w: float | None, fit: FitResult | None, of_model: float) -> float:
    """The weight of the divergence: the one given, or that of the fit, or of the tempered model, or 1.

    Args:
        w: as the user gave it.
        fit: whose ``w`` counts if none was given.
        of_model: that of ``tempered(model, w)``, 1 of any other model.

    Raises:
        TypeError, ValueError: it is not a number above 0, or the model is tempered and there is one besides.
    """
    name, value = ("w", w) if w is not None or fit is None else ("the fit's w", fit.w)
    if value is None:
        return of_model
    if of_model != 1:
        raise ValueError(f"the model is tempered by w={of_model:g}, and {name} is {value:g}: w would count twice")
    if fit is not None and w is None and value == 0:
        raise ValueError("the fit has w=0, under which there is no posterior: pass w")
    return _checks.positive("w", value)


Chains = Generator[tuple[Model, Chain], None, None]


def guide_chains(origin: Origin, num_samples: int, batch_size: int, parallel: bool) -> Chains:
    """Draws from each guide, while its parameters are in place."""
    several = len(origin.guides) > 1
    for number, guide in enumerate(origin.guides):
        fit = origin.fits[number] if origin.fits else None
        with (
            _alone(guide)
            if several and fit is None
            else parameters_of(fit, origin.model, guide, origin.args, origin.kwargs)
        ):
            trace, first = sampling.draw_once(origin.model, guide, origin.args, origin.kwargs)
            model = Model(origin.model, origin.args, origin.kwargs, first, traces.depth(trace), parallel)
            if several and fit is None and model.params:
                raise ValueError(
                    f"the model has parameters of its own, {model.params}, in Pyro's parameter store, where there is "
                    "room for one fit: pass the results of the fits too, fit=[...]"
                )
            drawn = _drawn(model, first, "guide")
            draws = sampling.draw_guide(model, guide, num_samples, drawn, batch_size)
            log_q = draws.log_q if sampling.has_density(model, trace, draws.values) else None
            yield model, Chain(draws.values, log_q, weight(origin.w, fit, model.tempered), origin.has_weights)


def mcmc_chains(mcmc: MCMC, origin: Origin, parallel: bool) -> Chains:
    """The draws of each chain."""
    samples = mcmc.get_samples(group_by_chain=True)
    first = {name: draws[0, 0] for name, draws in samples.items()}
    model = Model(origin.model, origin.args, origin.kwargs, first, 0, parallel)
    drawn = _drawn(model, first, "MCMC")
    w = weight(origin.w, None, model.tempered)
    for number in range(origin.num_chains):
        values = {name: samples[name][number] for name in drawn}
        n = len(next(iter(values.values())))
        diverging = torch.zeros(n, dtype=torch.bool)
        diverging[(mcmc._diagnostics[number] or {}).get("divergences", [])] = True
        yield model, Chain(values, None, w, has_weights=False, diverging=diverging)


def _drawn(model: Model, draw: Mapping[str, Tensor], by: str) -> list[str]:
    """The latents that a guide or an MCMC has drawn."""
    latents = model.named("latent")
    if missing := [name for name in latents if name not in draw]:
        warnings.warn(
            f"the {by} has no draws of the latents {missing}: theirs are drawn from the prior, given the others",
            stacklevel=5,
        )
    if len(missing) == len(latents):
        raise ValueError(f"the {by} draws {[*draw]}, of which none is a latent of the model; these are {latents}")
    return [name for name in latents if name in draw]


@contextmanager
def parameters_of(
    fit: FitResult | None, model: Fn, guide: Fn, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """Give model and guide the parameters that a fit left them in, in a parameter store of their own.

    Without a fit they keep those that they have.

    Raises:
        ValueError: the fit is of other parameters.
    """
    if fit is None:
        yield
        return
    with pyro.get_param_store().scope():
        with poutine.trace(param_only=True) as capture:
            traces.run(model, guide, args, kwargs)
        tensors, values = traces.unconstrained(capture.trace), fit.states[fit.state]
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        if not shapes.items() <= {name: value.shape for name, value in values.items()}.items():
            raise ValueError(
                f"fit is of other parameters, {_shapes(values)}, than model and guide have, {_shapes(tensors)}"
            )
        before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        trained.load(tensors, {name: values[name] for name in tensors})
        try:
            yield
        finally:
            trained.load(tensors, before)


@contextmanager
def _alone(guide: Fn) -> Iterator[None]:
    """Keep a guide's own parameters from others of the same names."""
    if not isinstance(poutine.unwrap(guide), torch.nn.Module):
        raise ValueError(
            f"the parameters of {guide!r} are in Pyro's parameter store, where there is room for one fit: pass the "
            "results of the fits too, fit=[...]"
        )
    with pyro.get_param_store().scope():
        yield


def _shapes(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {shape_text(tensor.shape)}" for name, tensor in tensors.items()) or "none"
