"""Scores of the sites of a run: expected log-densities in closed form, and the gradients of log-densities."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from pyro.distributions.score_parts import ScoreParts
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.util import MultiFrameTensor
from pyro.poutine import Trace
from torch import Tensor

from pyrobirds import closed_forms
from pyrobirds.closed_forms import base
from pyrobirds.dependence import Dependence, Names
from pyrobirds.traces import sample_sites


def in_closed_form(model_sites: dict[str, Any], guide_sites: dict[str, Any], known: Dependence) -> dict[str, Names]:
    """Give sites their expected log-density under the guide instead of that of the draw, where it is known.

    Returns:
        By name of a site so scored, the latents on which its score depends.
    """
    closed: dict[str, Names] = {}
    for latent, parts in known.closed.items():
        if latent not in guide_sites or not (parts.keys() <= model_sites.keys() and parts.keys() <= guide_sites.keys()):
            continue  # the structure changes from run to run
        drawn = guide_sites[latent]
        q = drawn["fn"]
        own = closed_forms.expected_own_log_prob(q)
        under = {
            name: closed_forms.expected_log_prob(model_sites[name]["fn"], q)
            if index is None
            else closed_forms.expected_log_prob_of_part(
                model_sites[name]["fn"], q, index, guide_sites[name]["value"].shape
            )
            for name, index in parts.items()
        }
        if own is None or any(expected is None for expected in under.values()):
            continue
        own = scale_and_mask(own, drawn["scale"], drawn["mask"])
        pathwise_only = closed_forms.is_gaussian(q) and q.has_rsample
        score: Any = 0 if pathwise_only else q.score_parts(drawn["value"]).score_function
        drawn.update(log_prob=own, log_prob_sum=own.sum(), score_parts=ScoreParts(own, score, own))
        closed[latent] = known.guide[latent]
        for name, expected in under.items():
            site = model_sites[name]
            expected = scale_and_mask(expected, site["scale"], site["mask"])
            site.update(log_prob=expected, log_prob_sum=expected.sum())
            closed[name] = known.guide[latent] | known.prior[name]
    return closed


def pathwise(site: Any) -> Tensor:
    """The summed log-density of a site of the guide, with the part of its gradient that does not vanish on average."""
    parts: ScoreParts = site["score_parts"]
    if parts.entropy_term is parts.log_prob:
        return site["log_prob_sum"]
    value = site["log_prob_sum"].detach()
    if is_identically_zero(parts.entropy_term):
        return value
    pathwise = parts.entropy_term.sum()
    return value + (pathwise - pathwise.detach())


class Cost(NamedTuple):
    """A part of the cost of a particle."""

    stack: Any  # the plates that it lies in, a tuple of Pyro's CondIndepStackFrame
    value: Tensor
    depends_on: Collection[str] | None  # latents of the guide on which it may depend; None: on any of them


class Score(NamedTuple):
    """The log-density of a site of the guide whose gradient is the score function."""

    name: str
    stack: Any
    value: Tensor


def scores(guide_sites: dict[str, Any]) -> list[Score]:
    """Of the sites whose draws pass no gradient on."""
    return [
        Score(name, site["cond_indep_stack"], site["score_parts"].score_function)
        for name, site in guide_sites.items()
        if not is_identically_zero(site["score_parts"].score_function)
    ]


def scores_at_fixed_draws(guide_trace: Trace) -> list[Score]:
    """Of all sites, from a run of the guide at draws that pass no gradient on.

    As everywhere in Pyro scale and mask of a site do not weigh its score: the costs that it multiplies have theirs.
    """
    guide_trace.compute_log_prob()
    return [
        Score(name, site["cond_indep_stack"], site["unscaled_log_prob"])
        for name, site in sample_sites(guide_trace).items()
        if type(base(site["fn"])).__name__ != "Delta"
    ]


def check_same_density(scored: list[Score], guide_sites: dict[str, Any]) -> None:
    """Raise if a guide, run again at the same draws, has another density there."""
    for score in scored:
        site = guide_sites[score.name]
        if not torch.allclose(score.value, site["fn"].log_prob(site["value"]), rtol=1e-4, atol=1e-4, equal_nan=True):
            raise ValueError(
                f"the guide has another density of {score.name!r} when it is run again at the same draws: it must not "
                "draw random numbers outside of its sites (dropout, say) if failures are penalised"
            )


def score_function_term(costs: list[Cost], scored: list[Score]) -> Tensor:
    r"""A scalar whose gradient is :math:`\sum_s C_s \nabla \log q(z_s)` over scored sites of the guide.

    :math:`C_s` is the cost that may depend on site s, as far as plates (as in :class:`pyro.infer.Trace_ELBO`) and
    ``depends_on`` tell: what does not depend on s only adds variance (Rao-Blackwellisation; Ranganath, Gerrish and Blei
    2014, https://arxiv.org/abs/1401.0118).
    """
    terms = []
    for site in scored:
        downstream = MultiFrameTensor(
            *(
                (cost.stack, cost.value.detach())
                for cost in costs
                if cost.depends_on is None or site.name in cost.depends_on
            )
        )
        terms.append((downstream.sum_to(site.stack) * site.value).sum())
    return sum(terms[1:], terms[0])
