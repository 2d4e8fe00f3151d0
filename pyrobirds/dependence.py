"""Which latents of a guide have a closed form, and what depends on what: found once for a model and a guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
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
    """Run model and guide once, without scoring observed sites, on random numbers of their own."""
    # Validation looks at values, which would count as leaks.
    with poutine.block(), forked_rng(), torch.no_grad(), pyro.validation_enabled(False):
        with _Leaks() as leaks:
            recorded = traces.run(model, guide, args, kwargs, around_guide=_TrackLatents())
        model_sites, guide_sites = map(traces.sample_sites, recorded)
        model_sites = {name: site for name, site in model_sites.items() if not site["is_observed"]}
        direct = {name: _depends_on(site) | leaks.names for name, site in guide_sites.items()}
        guide_deps = {name: _with_ancestors(names, direct) for name, names in direct.items()}
        prior_deps = {
            name: _with_ancestors(_depends_on(site) | leaks.names, direct) for name, site in model_sites.items()
        }
        order = {name: i for i, (name, site) in enumerate(guide_sites.items()) if _is_latent(site)}

        closed: dict[str, dict[str, Tensor | None]] = {}
        ruled_out: set[str] = set()
        for name, site in model_sites.items():
            above = get_provenance(site["value"])
            if not above:
                continue
            latent = max(above, key=order.__getitem__)
            drawn_before = {other for other, i in order.items() if i < order[latent]}
            if (
                above == {latent}
                and prior_deps[name] <= drawn_before
                and _is_cut_out(guide_sites[name], guide_sites[latent])
            ):
                closed.setdefault(latent, {})[name] = _index(site["value"], guide_sites[latent]["value"])
            else:
                ruled_out.add(latent)
    return Dependence(
        closed={latent: sites for latent, sites in closed.items() if latent not in ruled_out},
        guide=guide_deps,
        prior=prior_deps,
    )


class _Leaks(TorchFunctionMode):
    """Notices where the value of a tensor goes on without its marks: into Python (a branch), NumPy, or a new tensor.

    What happens then is taken to depend on it wherever it happens.
    """

    INTO_PYTHON = (
        *("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__complex__", "__index__"),
        *("__contains__", "equal", "allclose", "is_nonzero"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: Names = frozenset()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        lost = get_provenance((args, kwargs or {})) - get_provenance(result)
        if isinstance(result, Tensor) or getattr(func, "__name__", "") in self.INTO_PYTHON:
            self.names |= lost
        return result


class _TrackLatents(Messenger):
    """Marks the value of each latent with its name; a Delta hands on the marks of what it is computed from."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["type"] == "sample" and _is_latent(msg):
            msg["value"] = track_provenance(detach_provenance(msg["value"]), frozenset({msg["name"]}))


def _is_latent(site: Any) -> bool:
    return not site["is_observed"] and not site_is_subsample(site) and type(base(site["fn"])).__name__ != "Delta"


def _depends_on(site: Any) -> Names:
    return get_provenance(site["fn"].log_prob(detach_provenance(site["value"])))


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
