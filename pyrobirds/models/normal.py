"""The model of independent normal values."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyrobirds import losses, simulators
from pyrobirds.models.construction import Loss, shared_simulator

_LOSS = losses.MMD()


def normal(
    y: Tensor | None = None,
    *,
    n_timesteps: int = 100,
    loss: Loss = _LOSS,
    **options: Any,
) -> Tensor:
    r"""Independent normal values with a normal prior on their mean and a log-normal one on their standard deviation.

    .. math:: \mu \sim N(0, 1), \qquad \log \sigma \sim N(0, 1), \qquad x \sim \mathrm{normal}(\mu, \sigma).

    Sites: ``mu`` and ``sigma``, scalars, in the units of x; ``x``, the series, shape ``(n_timesteps,)``, dimension
    ``time``.

    Args:
        y: the observed series, shape ``(n_timesteps,)``; NaN where missing. Without it the model draws a series.
        n_timesteps: number of values of the series.
        loss: compares a simulated series with the observed one; see :mod:`pyrobirds.losses`. Must be hashable, as
            functions are. By default the values are compared as a sample, regardless of their order. The mean squared
            error would not do: its expectation, :math:`\sigma^2 + \overline{(y_t - \mu)^2}`, is least at sigma = 0.
        **options: further keywords of :class:`pyrobirds.Simulator`, such as ``replicates`` or ``differentiation``.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro.optim import Adam
        >>> from pyrobirds import GeneralizedELBO, models
        >>> y = models.normal()
        >>> svi = SVI(models.normal, AutoNormal(models.normal), Adam({"lr": 0.05}), GeneralizedELBO(w=0.01))
        >>> svi.step(y) > 0
        True
    """
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    names: Any = {"event_dims": ["time"]}  # a key that Pyro does not know
    values = shared_simulator(simulators.normal, loss, n_timesteps=n_timesteps, **options)
    return pyro.sample("x", values(mu, sigma), obs=y, infer=names)
