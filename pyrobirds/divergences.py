"""Divergences of the guide q from the prior pi: small value objects."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor
from torch.distributions import Distribution

from pyrobirds import _checks, closed_forms


class Divergence(ABC):
    """How far the guide q is from the prior pi, estimated from joint log-densities at draws of q.

    The interface that divergences share. :class:`~pyrobirds.GeneralizedELBO` takes :class:`KL` alone so far, and adds
    it up site by site.
    """

    @abstractmethod
    def estimate(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        """Estimate D(q || pi).

        Args:
            log_q: log-density under q of each particle, all latent sites together, shape ``(num_particles,)``.
            log_p: log-density under the prior of the same particles, same shape.

        Returns:
            A scalar.
        """

    def exact(self, q: Distribution, p: Distribution) -> Tensor | None:
        """D(q || p) of two distributions over the same space, by their batch shape; None where no form is known."""
        return None


@dataclass(frozen=True)
class KL(Divergence):
    r"""The Kullback-Leibler divergence.

    .. math:: KL(q \| \pi) = E_q[\log q(\theta) - \log \pi(\theta)].

    It adds over sites, so that some of them can be taken in closed form while others are estimated. Kullback and
    Leibler 1951 (https://doi.org/10.1214/aoms/1177729694); as the divergence of generalised variational inference:
    Knoblauch, Jewson and Damoulas (https://arxiv.org/abs/1904.02063).

    Args:
        analytic: take the closed form where it is right, and Monte Carlo elsewhere. The unit of choice is a latent of
            the guide (one per site for AutoNormal, one for all sites in a joint guide such as AutoMultivariateNormal).
            It has a closed form if every model site under it has one, reached without a transform, and the parameters
            of the site's prior depend on no latent that the guide draws jointly with it or after it. The expectation of
            the divergence and of its gradient is the same either way; a closed form has no variance.
        num_particles: how many particles estimate the divergence, if not as many as the loss. They come from a second
            pass that scores latent sites only and runs no lazy simulation.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind, or ``num_particles`` below 1.

    Example:
        >>> import pyro.distributions as dist
        >>> KL().exact(dist.Normal(1.0, 1.0), dist.Normal(0.0, 1.0))
        tensor(0.5000)
    """

    analytic: bool = True
    num_particles: int | None = None

    def __post_init__(self) -> None:
        _checks.boolean("analytic", self.analytic)
        if self.num_particles is not None:
            _checks.positive_int("num_particles", self.num_particles)

    def estimate(self, log_q: Tensor, log_p: Tensor) -> Tensor:
        return (log_q - log_p).mean()

    def exact(self, q: Distribution, p: Distribution) -> Tensor | None:
        own, cross = closed_forms.expected_own_log_prob(q), closed_forms.expected_log_prob(p, q)
        return None if own is None or cross is None else own - cross
