"""Which latents of a guide have a closed form, and what depends on what: found once for a model and a guide."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor

from pyrobirds._rng import forked_rng
from pyrobirds.closed_forms import base

Names = frozenset[str]


@dataclass(frozen=True)
class Dependence:
    """What is known of a model and its guide; empty where nothing could be found out.

    A latent is a sample site of the guide that is not a Delta; every set of names holds names of latents.
    """

    # By latent that may have a closed form: the model sites under it, with the entries of the latent's vector that each
    # is made of (None: the whole latent in its own shape).
    closed: dict[str, dict[str, Tensor | None]] = field(default_factory=dict)
    guide: dict[str, Names] = field(default_factory=dict)  # by guide site: what its distribution depends on
    prior: dict[str, Names] = field(default_factory=dict)  # by latent site of the model: what its prior depends on


def run(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    around_guide: AbstractContextManager[Any] | None = None,
) -> tuple[Trace, Trace]:
    """Trace the guide, and the model replayed against it; nothing is scored. Also takes Pyro's guide messengers."""
    messenger = poutine.unwrap(guide)
    with around_guide or nullcontext():
        if isinstance(messenger, poutine.guide.GuideMessenger):
            guide(*args, **kwargs)
            return messenger.get_traces()
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    return poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs), guide_trace


def analyse(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Dependence:
    """Run model and guide twice, without scoring observed sites, on random numbers of their own."""
    with poutine.block(), forked_rng(), torch.no_grad():
        tracked_model, tracked_guide = run(model, guide, args, kwargs, around_guide=_TrackLatents())
        other_model, _ = run(model, guide, args, kwargs)
    tracked_model, tracked_guide = prune_subsample_sites(tracked_model), prune_subsample_sites(tracked_guide)
    order = {name: i for i, (name, site) in enumerate(tracked_guide.nodes.items()) if _is_latent(site)}
    guide_deps = {name: _depends_on(site) for name, site in tracked_guide.nodes.items() if site["type"] == "sample"}
    prior_deps = {name: _depends_on(site) for name, site in tracked_model.iter_stochastic_nodes()}

    closed: dict[str, dict[str, Tensor | None]] = {}
    ruled_out: set[str] = set()
    for name, site in tracked_model.iter_stochastic_nodes():
        above = get_provenance(site["value"])
        if not above:
            continue
        latent = max(above, key=order.__getitem__)
        drawn_before = {other for other, i in order.items() if i < order[latent]}
        if (
            above == {latent}
            and prior_deps[name] <= drawn_before
            and (prior_deps[name] or _same_prior(name, tracked_model, other_model))
            and _is_cut_out(name, latent, tracked_guide)
        ):
            closed.setdefault(latent, {})[name] = _index(name, latent, tracked_guide)
        else:
            ruled_out.add(latent)
    return Dependence(
        closed={latent: sites for latent, sites in closed.items() if latent not in ruled_out},
        guide=guide_deps,
        prior=prior_deps,
    )


class _TrackLatents(Messenger):
    """Marks the value of each latent with its name; a Delta hands on the marks of what it is computed from."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if _is_latent(msg):
            msg["value"] = track_provenance(detach_provenance(msg["value"]), frozenset({msg["name"]}))


def _is_latent(site: Any) -> bool:
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and type(site["fn"]).__name__ != "_Subsample"
        and type(base(site["fn"])).__name__ != "Delta"
    )


def _depends_on(site: Any) -> Names:
    return get_provenance(site["fn"].log_prob(detach_provenance(site["value"])))


def _is_cut_out(name: str, latent: str, guide_trace: Trace) -> bool:
    """Whether the site's value is made of entries of the latent's as they stand, without a transform."""
    if name == latent:
        return True
    delta, drawn = guide_trace.nodes[name], detach_provenance(guide_trace.nodes[latent]["value"])
    value = detach_provenance(delta["value"])
    # Entries that share the latent's memory went through no transform; the strides then tell which entries they are.
    return (
        value.untyped_storage().data_ptr() == drawn.untyped_storage().data_ptr()
        and drawn.is_contiguous()
        and (drawn.dim() == 1 or _same_layout(value, drawn))
        and bool((detach_provenance(delta["fn"].log_prob(delta["value"])) == 0).all())
    )


def _index(name: str, latent: str, guide_trace: Trace) -> Tensor | None:
    value, drawn = (detach_provenance(guide_trace.nodes[site]["value"]) for site in (name, latent))
    if _same_layout(value, drawn):
        return None
    entries = torch.arange(drawn.numel(), device=drawn.device)
    return entries.as_strided(value.shape, value.stride(), value.storage_offset() - drawn.storage_offset())


def _same_layout(value: Tensor, drawn: Tensor) -> bool:
    layouts = ((t.shape, t.stride(), t.storage_offset()) for t in (value, drawn))
    return next(layouts) == next(layouts)


def _same_prior(name: str, tracked: Trace, other: Trace) -> bool:
    """Whether a prior that seems to depend on no latent is the same at other draws of them.

    Marks are lost where a value leaves torch (``.item()``, NumPy); the densities of two runs then differ.
    """
    value = detach_provenance(tracked.nodes[name]["value"])
    here, there = (trace.nodes[name]["fn"].log_prob(value) for trace in (tracked, other))
    return torch.equal(here, there)
