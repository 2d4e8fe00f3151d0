"""The gradient of an expected cost with respect to how its random choices were drawn, where they can't be
reparameterised."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from pyro.infer.util import MultiFrameTensor
from torch import Tensor


class Cost(NamedTuple):
    """A part of the cost of a particle."""

    stack: Any  # the plates that it lies in, a tuple of Pyro's CondIndepStackFrame
    value: Tensor
    depends_on: Collection[str] | None  # latents of the guide on which it may depend; None: on any of them


def score_function_term(costs: list[Cost], sites: list[Any]) -> Tensor:
    r"""A scalar whose gradient is :math:`\sum_s C_s \nabla \log q(z_s)` over ``sites`` of the guide.

    :math:`C_s` is the cost that may depend on site s, as far as plates (as in :class:`pyro.infer.Trace_ELBO`) and
    ``depends_on`` tell: what does not depend on s only adds variance (Rao-Blackwellisation; Ranganath, Gerrish and Blei
    2014, https://arxiv.org/abs/1401.0118, section 4.1).
    """
    terms = []
    for site in sites:
        downstream = MultiFrameTensor(
            *(
                (cost.stack, cost.value.detach())
                for cost in costs
                if cost.depends_on is None or site["name"] in cost.depends_on
            )
        )
        score = site["score_parts"].score_function
        terms.append((downstream.sum_to(site["cond_indep_stack"]) * score).sum())
    return sum(terms[1:], terms[0])
