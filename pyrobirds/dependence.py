"""Which latents of a guide have a closed form, and what depends on what: found out by runs of model and guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.overrides import TorchFunctionMode

from pyrobirds import traces
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


def analyse(
    model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Dependence:
    """Run model and guide a few times, without scoring observed sites, on random numbers of their own."""
    # Validation looks at values, which would count as leaks.
    with poutine.block(), forked_rng(), torch.enable_grad(), pyro.validation_enabled(False):
        with _Leaks() as leaks:
            recorded = traces.run(model, guide, args, kwargs, around_guide=_TrackLatents())
        model_sites, guide_sites = map(traces.sample_sites, recorded)
        model_sites = {name: site for name, site in model_sites.items() if not site["is_observed"]}
        direct = {name: _depends_on(site) | leaks.names for name, site in guide_sites.items()}
        guide_deps = {name: _with_ancestors(names, direct) for name, names in direct.items()}
        latents = [name for name, site in guide_sites.items() if _is_latent(site)]
        values = {name: detach_provenance(guide_sites[name]["value"]) for name in latents}
        prior_deps = {
            name: _with_ancestors(_depends_on(site) | _connected(site, values) | leaks.names, direct)
            for name, site in model_sites.items()
        }
        # Where marks were lost for all that (of an integer in torch.vmap, say), other draws of the rest show it.
        for held in {*guide_deps.values(), *prior_deps.values()}:
            again = traces.run(model, poutine.replay(guide, trace=_held(held, guide_sites)), args, kwargs)
            for deps, before, trace in ((prior_deps, model_sites, again[0]), (guide_deps, guide_sites, again[1])):
                for name in [name for name, names in deps.items() if names == held]:
                    if not _is_same(before[name], traces.sample_sites(trace).get(name)):
                        deps[name] = frozenset(latents)
        # What was found that way concerns all who depend on it.
        guide_deps, prior_deps = (
            {name: _with_ancestors(names, guide_deps) for name, names in deps.items()}
            for deps in (guide_deps, prior_deps)
        )
        closed = _closed(latents, model_sites, guide_sites, prior_deps)
    return Dependence(closed, guide_deps, prior_deps)


def _closed(
    latents: list[str], model_sites: dict[str, Any], guide_sites: dict[str, Any], prior_deps: dict[str, Names]
) -> dict[str, dict[str, Tensor | None]]:
    """See :class:`Dependence`."""
    closed: dict[str, dict[str, Tensor | None]] = {}
    ruled_out: set[str] = set()
    for name, site in model_sites.items():
        above = get_provenance(site["value"])
        if not above:
            continue
        latent = max(above, key=latents.index)
        drawn_before = {*latents[: latents.index(latent)]}
        if (
            above == {latent}
            and prior_deps[name] <= drawn_before
            and _is_cut_out(guide_sites[name], guide_sites[latent])
        ):
            closed.setdefault(latent, {})[name] = _index(site["value"], guide_sites[latent]["value"])
        else:
            ruled_out.add(latent)
    return {latent: sites for latent, sites in closed.items() if latent not in ruled_out}


class _Leaks(TorchFunctionMode):
    """Notices where the value of a tensor goes on without its marks: into Python (a branch), NumPy, or another tensor.

    What happens in the run is then taken to depend on it, wherever it happens.
    """

    INTO_PYTHON = (
        *("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
        *("__contains__", "__format__", "equal", "allclose", "is_nonzero"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: Names = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        result = func(*args, **kwargs)
        into = get_provenance((args, kwargs))
        if name in self.INTO_PYTHON:
            self.names |= into
        elif name in ("__setitem__", "__set__") or (name.endswith("_") and not name.endswith("__")):
            self.names |= into - get_provenance(args[0])
        elif "out" in kwargs:
            self.names |= into - get_provenance(kwargs["out"])
        elif isinstance(result, Tensor):
            self.names |= into - get_provenance(result)
        return result


class _TrackLatents(Messenger):
    """Marks the value of each latent with its name; a Delta hands on the marks of what it is computed from."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["type"] == "sample" and _is_latent(msg):
            value = detach_provenance(msg["value"])
            if value.is_floating_point() and not value.requires_grad:
                value.requires_grad_()  # for _connected
            msg["value"] = track_provenance(value, frozenset({msg["name"]}))


def _is_latent(site: Any) -> bool:
    return not site["is_observed"] and not site_is_subsample(site) and type(base(site["fn"])).__name__ != "Delta"


def _depends_on(site: Any) -> Names:
    return get_provenance(site["fn"].log_prob(detach_provenance(site["value"])))


def _held(names: Names, guide_sites: dict[str, Any]) -> Trace:
    """A trace of these latents as they were drawn."""
    trace = Trace()
    for name in names:
        site = guide_sites[name]
        trace.add_node(name, **{**site, "value": detach_provenance(site["value"])})
    return trace


def _is_same(site: Any, again: Any) -> bool:
    """Whether the distributions of a site in two runs have the same density at the value of the first."""
    value = detach_provenance(site["value"])
    try:
        here, there = (detach_provenance(run["fn"].log_prob(value)) for run in (site, again))
    except Exception:  # of a site that is gone, or of a distribution that can't score another's draw
        return False
    return torch.equal(here, there)


def _with_ancestors(names: Names, direct: dict[str, Names]) -> Names:
    """Who depends on a latent depends on what that latent depends on."""
    found: set[str] = set()
    to_follow = [*names]
    while to_follow:
        name = to_follow.pop()
        if name not in found:
            found.add(name)
            to_follow += direct[name]
    return frozenset(found)


def _connected(site: Any, latents: dict[str, Tensor]) -> Names:
    """The latents that the distribution of a site depends on by autograd, whose graph leads through torch.vmap, too."""
    score = detach_provenance(site["fn"].log_prob(detach_provenance(site["value"]).detach()))
    smooth = {name: value for name, value in latents.items() if value.requires_grad}
    if not score.requires_grad or not smooth:
        return frozenset()
    gradients = torch.autograd.grad(score.sum(), [*smooth.values()], retain_graph=True, allow_unused=True)
    return frozenset(name for name, gradient in zip(smooth, gradients, strict=True) if gradient is not None)


def _is_cut_out(site: Any, latent: Any) -> bool:
    """Whether a site of the guide is made of entries of a latent as they stand, without a transform."""
    if site is latent:
        return True
    value, drawn = detach_provenance(site["value"]), detach_provenance(latent["value"])
    # Entries that share the latent's memory went through no transform; the strides then tell which entries they are.
    return (
        value.untyped_storage().data_ptr() == drawn.untyped_storage().data_ptr()
        and drawn.is_contiguous()
        and (drawn.dim() == 1 or _same_layout(value, drawn))
        and bool((detach_provenance(site["fn"].log_prob(site["value"])) == 0).all())
        and _all_different(_index(value, drawn))  # entries used twice are not independent
    )


def _index(value: Tensor, drawn: Tensor) -> Tensor | None:
    value, drawn = detach_provenance(value), detach_provenance(drawn)
    if _same_layout(value, drawn):
        return None
    entries = torch.arange(drawn.numel(), device=drawn.device)
    return entries.as_strided(value.shape, value.stride(), value.storage_offset() - drawn.storage_offset())


def _all_different(index: Tensor | None) -> bool:
    return index is None or index.unique().numel() == index.numel()


def _same_layout(value: Tensor, drawn: Tensor) -> bool:
    layouts = ((t.shape, t.stride(), t.storage_offset()) for t in (value, drawn))
    return next(layouts) == next(layouts)
