"""Runs of a model and its guide, recorded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from pyro import poutine
from pyro.infer.util import is_validation_enabled
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape

from pyrobirds._rng import forked_rng
from pyrobirds.closed_forms import base


def run(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    max_plate_nesting: float = float("inf"),
    around_guide: AbstractContextManager[Any] | None = None,
) -> tuple[Trace, Trace]:
    """Trace the guide, and the model replayed against it, without scoring them; takes Pyro's guide messengers too.

    Returns:
        The trace of the model and that of the guide, without subsampling sites.
    """
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, GuideMessenger):
        with around_guide or nullcontext():
            guide(*args, **kwargs)
        model_trace, guide_trace = messenger.get_traces()
    else:
        with around_guide or nullcontext():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    if is_validation_enabled():
        check_model_guide_match(model_trace, guide_trace, max_plate_nesting)
    return prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)


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
                fn, value = site["fn"], site["value"]
                batch_shape = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
                check_site_shape({**site, "log_prob": torch.empty(batch_shape)}, float("inf"))  # type: ignore[arg-type]


def is_loss(site: Any) -> bool:
    """Whether a sample site of a model makes part of the loss: it is observed.

    Observed Deltas are not: they are deterministic, or Pyro's reparameterisations keep densities of the prior in them.
    """
    return site["is_observed"] and type(base(site["fn"])).__name__ != "Delta"


def is_reparameterised(trace: Trace) -> bool:
    """Whether every draw of a guide passes gradients on to how it was drawn."""
    return all(site["fn"].has_rsample for site in sample_sites(trace).values())


def has_params(trace: Trace) -> bool:
    """Whether there is anything to train."""
    return any(site["type"] == "param" for site in trace.nodes.values())


def sample_sites(trace: Trace) -> dict[str, Any]:
    """The sample sites of a trace by name."""
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
