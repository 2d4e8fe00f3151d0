"""Runs of a model and its guide, recorded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from pyrobirds._rng import forked_rng
from pyrobirds.closed_forms import base

_ANY_NESTING: Any = float("inf")  # of plates

Pair = tuple[Trace, Trace]  # of the model and of the guide


def run(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    max_plate_nesting: float = float("inf"),
    around_guide: AbstractContextManager[Any] | None = None,
) -> Pair:
    """Trace the guide, and the model replayed against it, without scoring them; takes Pyro's guide messengers too.

    Returns:
        The trace of the model and that of the guide, without subsampling sites.
    """
    return _pruned(_run(model, guide, args, kwargs, max_plate_nesting, around_guide or nullcontext()))


def run_and_rerun(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    max_plate_nesting: float = float("inf"),
) -> tuple[Pair, Pair]:
    """Trace guide and model, and then both again at the same draws and subsamples, which now pass no gradient on.

    The second pair has log-densities of the guide whose gradient is the score function, for reparameterised latents
    too, and observed sites whose gradient does not run through the draws.

    Raises:
        ValueError: the guide has no log-density at fixed draws, because it moves them by its parameters after drawing
            them (AutoDelta, AutoStructured), or is a guide messenger.
    """
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, GuideMessenger):
        raise ValueError(
            f"a {type(messenger).__name__} has no log-density at fixed draws: take an autoguide or a function as guide"
        )
    first = _run(model, guide, args, kwargs, max_plate_nesting, nullcontext())
    model_trace, guide_trace = (_with_detached_draws(trace) for trace in first)
    guide_again = poutine.trace(poutine.replay(guide, trace=guide_trace)).get_trace(*args, **kwargs)
    for name, site in sample_sites(guide_again).items():
        if type(base(site["fn"])).__name__ == "Delta" and base(site["fn"]).v.requires_grad:
            raise ValueError(
                f"the guide moves its draw of {name!r} by its parameters after drawing it, and so has no log-density "
                "at fixed draws: take another guide, such as AutoNormal or AutoMultivariateNormal"
            )
    model_again = poutine.trace(poutine.replay(model, trace=model_trace)).get_trace(*args, **kwargs)
    return _pruned(first), _pruned((model_again, guide_again))


def _run(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    max_plate_nesting: float,
    around_guide: AbstractContextManager[Any],
) -> Pair:
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, GuideMessenger):
        with around_guide:
            guide(*args, **kwargs)
        model_trace, guide_trace = messenger.get_traces()
    else:
        with around_guide:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    return model_trace, guide_trace


def _pruned(pair: Pair) -> Pair:
    model_trace, guide_trace = pair
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


def _with_detached_draws(trace: Trace) -> Trace:
    fixed = Trace()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"]:
            fixed.add_node(name, **{**site, "value": torch.as_tensor(site["value"]).detach()})
    return fixed


def particles(n: int, nesting: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Wraps a function so that it draws a batch of n particles at once, left of its plates, which nest so deep."""
    return pyro.plate("num_particles_vectorized", n, dim=-nesting - 1)


def plate_nesting(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    """How deep plates nest, from a run that simulates nothing; checks shapes as Pyro's own guess does."""
    with poutine.block():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    pair = _pruned((model_trace, guide_trace))
    if is_validation_enabled():
        for trace in reversed(pair):
            trace.compute_log_prob(lambda name, site: not (can_fail(site) and site["is_observed"]))
        for trace in pair:
            for site in sample_sites(trace).values():
                check_site_shape(site if "log_prob" in site else _with_shape(site), _ANY_NESTING)
    return max(depth(trace) for trace in pair)


def depth(trace: Trace) -> int:
    """How deep the plates of a trace nest."""
    frames = [frame for site in sample_sites(trace).values() for frame in site["cond_indep_stack"]]
    return -min((frame.dim for frame in frames if frame.vectorized), default=0)


def check_shapes(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Raise Pyro's error for sites whose batch dimensions are not those of their plates, without scoring them.

    It takes a run with one particle: in a batch of particles a dimension that no plate declares may pass for theirs.
    """
    if isinstance(poutine.unwrap(guide), GuideMessenger):
        return  # set up with a batch of particles, it may have parameters for each of them
    with poutine.block(), forked_rng(), torch.no_grad():
        for trace in run(model, guide, args, kwargs):
            for site in sample_sites(trace).values():
                check_site_shape(_with_shape(site), _ANY_NESTING)


def _with_shape(site: Any) -> Any:
    """A site that was not scored, with a log-probability of the shape that it would have."""
    fn, value = site["fn"], site["value"]
    batch_shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
    return {**site, "log_prob": torch.empty(batch_shape)}


def can_fail(site: Any) -> bool:
    """Whether a site is a simulator's, which marks runs that failed by NaN."""
    return getattr(innermost(site["fn"]), "can_fail", False)


def innermost(distribution: Any) -> Any:
    """The distribution below all that wrap it."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return distribution


def is_loss(site: Any) -> bool:
    """Whether a sample site of a model makes part of the loss: it is observed.

    Observed Deltas are not: they are deterministic, or Pyro's reparameterisations keep densities of the prior in them.
    """
    return site["is_observed"] and type(base(site["fn"])).__name__ != "Delta"


def is_reparameterised(trace: Trace) -> bool:
    """Whether every draw of a guide passes gradients on to how it was drawn."""
    return all(site["fn"].has_rsample for site in sample_sites(trace).values())


def params(trace: Trace) -> list[Tensor]:
    """What there is to train: the unconstrained parameters."""
    values = [site["value"] for site in trace.nodes.values() if site["type"] == "param"]
    return [value.unconstrained() for value in values]  # type: ignore[union-attr]


def unconstrained(trace: Trace) -> dict[str, Tensor]:
    """The unconstrained parameters by name, of a trace of parameters alone."""
    return {name: site["value"].unconstrained() for name, site in trace.nodes.items()}  # type: ignore[union-attr]


def sample_sites(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace by name."""
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
