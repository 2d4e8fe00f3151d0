"""Expectations of log-densities that are known in closed form."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

# Exact types only: a subclass may have a density of its own, and some of the forms that torch registers for other
# families are wrong for batches (Wishart) or not there for them (Multinomial).
_KNOWN = tuple(
    getattr(module, name)
    for name in (
        *("Bernoulli", "Beta", "Categorical", "Dirichlet", "Exponential", "Gamma", "Geometric", "Laplace", "LogNormal"),
        "OneHotCategorical",
    )
    for module in (torch.distributions, dist)
)
_NORMAL = (torch.distributions.Normal, dist.Normal)
_JOINT_NORMAL = (
    torch.distributions.MultivariateNormal,
    dist.MultivariateNormal,
    torch.distributions.LowRankMultivariateNormal,
    dist.LowRankMultivariateNormal,
)


def base(d: Distribution) -> Any:
    """The distribution below every :class:`~torch.distributions.Independent`."""
    while isinstance(d, torch.distributions.Independent):
        d = d.base_dist
    return d


def is_gaussian(d: Distribution) -> bool:
    """Whether d is a Gaussian over scalars or vectors, independent over further dimensions."""
    return type(base(d)) in (*_NORMAL, *_JOINT_NORMAL)


def expected_own_log_prob(q: Distribution) -> Tensor | None:
    """E_q[log q(z)], minus the entropy of q, of the batch shape of q; None where it is not known."""
    return -q.entropy() if is_gaussian(q) or type(base(q)) in _KNOWN else None


def expected_log_prob(p: Distribution, q: Distribution) -> Tensor | None:
    r"""E_q[log p(z)] of two distributions over the same z, of their common batch shape; None where it is not known.

    Between Gaussians :math:`E_q \log p(z) = \log p(\mu_q) - \tfrac12 \mathrm{tr}(\Sigma_p^{-1} \Sigma_q)`; elsewhere
    :math:`-KL(q \| p) - H(q)`, for pairs of common families of which torch or Pyro know the divergence.

    Example:
        >>> p, q = dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0)
        >>> expected_log_prob(p, q)  # log p(1) - 4 / 2
        tensor(-3.4189)
    """
    q_base = base(q)
    if type(q_base) in _NORMAL:
        return _under_gaussian(p, q.mean, q.variance, None)
    if type(q_base) in _JOINT_NORMAL:
        return _under_gaussian(p, q.mean, q.variance, q_base.covariance_matrix)
    if type(q_base) not in _KNOWN or type(base(p)) not in _KNOWN or p.event_shape != q.event_shape:
        return None
    try:
        return -kl_divergence(q, p) - q.entropy()
    except NotImplementedError:
        return None


def expected_log_prob_of_part(p: Distribution, q: Distribution, index: Tensor, shape: torch.Size) -> Tensor | None:
    """E_q[log p(z[index])] for a joint Gaussian q over vectors z; None where it is not known.

    Args:
        p: distribution of the part, whose draws have ``shape``.
        q: joint distribution, of draws ``(*batch, n)``.
        index: which entries of z the part is made of, in the shape of a part without ``batch``.
        shape: ``batch`` broadcast against the part's own dimensions to the left, then its event.
    """
    q_base = base(q)
    if len(q.event_shape) != 1 or not is_gaussian(q):
        return None
    flat = index.flatten()
    mean, variance = (moment[..., flat].reshape(shape) for moment in (q.mean, q.variance))
    covariance = None
    if type(q_base) in _JOINT_NORMAL and type(base(p)) in _JOINT_NORMAL:  # elsewhere the variances are all that matters
        rows, columns = index.unsqueeze(-1), index.unsqueeze(-2)
        covariance = q_base.covariance_matrix[..., rows, columns].reshape(*shape, shape[-1])
    return _under_gaussian(p, mean, variance, covariance)


def _under_gaussian(p: Distribution, mean: Tensor, variance: Tensor, covariance: Tensor | None) -> Tensor | None:
    """E[log p(z)] for Gaussian p and z of the given moments; ``covariance`` None where z's entries are independent."""
    p_base = base(p)
    if type(p_base) in _NORMAL:
        trace = variance / p_base.variance
    elif type(p_base) in _JOINT_NORMAL:
        precision = p_base.precision_matrix
        if covariance is None:
            trace = (variance * precision.diagonal(dim1=-2, dim2=-1)).sum(-1)
        else:
            trace = (covariance * precision).sum((-2, -1))
    else:
        return None
    event_dim = len(p.event_shape) - len(p_base.event_shape)
    return p.log_prob(mean) - sum_rightmost(trace, event_dim) / 2  # type: ignore[operator]
