"""The model of Cont's returns with clustered volatility."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyrobirds import losses, simulators
from pyrobirds.models.construction import Loss, shared_simulator

_MMD = losses.MMD()


def rama_cont(
    y: Tensor | None = None,
    *,
    n_timesteps: int = 100,
    n_agents: int = 1000,
    s: float = 0.1,
    tau: float = 1.0,
    gradient_horizon: int | None = None,
    checkpoint_every: int | None = None,
    loss: Loss = _MMD,
    **options: Any,
) -> Tensor:
    r"""Returns with clustered volatility, with priors for daily returns.

    .. math:: \mu \sim N(\log 0.001, 1), \qquad \log \frac{\varsigma}{0.5} \sim N(0, 0.5^2), \qquad
        \log \frac{\sigma}{0.001} \sim N(0, 0.5^2), \qquad \log \frac{\eta}{10} \sim N(0, 0.5^2).

    Sites: ``nu_loc``, ``nu_scale``, ``sigma`` and ``eta``, scalars with the units of
    :func:`pyrobirds.simulators.rama_cont`; ``x``, the returns, shape ``(n_timesteps,)``, dimension ``time``.

    Args:
        y: the observed returns, shape ``(n_timesteps,)``; NaN where missing. Without it the model draws returns.
        n_timesteps: number of values of a path, the first, 0, included.
        n_agents: number of traders.
        s: chance of a trader to adapt the threshold in a time step.
        tau: temperature of the gradient; see :func:`pyrobirds.simulators.rama_cont`.
        gradient_horizon: see :func:`pyrobirds.simulators.rama_cont`.
        checkpoint_every: see :func:`pyrobirds.simulators.rama_cont`.
        loss: compares simulated returns with the observed ones; see :mod:`pyrobirds.losses`. Must be hashable, as
            functions are. By default :class:`pyrobirds.losses.MMD`, which compares the values and not their order.
        **options: further keywords of :class:`pyrobirds.Simulator`, such as ``replicates`` or ``differentiation``.

    Start guides at the medians of the priors, by ``init_loc_fn=init_to_median``: Pyro's own start, near 0 in the space
    of logarithms, is a sigma and an eta of 1, where returns depend on hardly anything.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal, init_to_median
        >>> from pyro.optim import Adam
        >>> from pyrobirds import GeneralizedELBO, models
        >>> y = models.rama_cont(n_agents=100)
        >>> guide = AutoNormal(models.rama_cont, init_loc_fn=init_to_median)
        >>> svi = SVI(models.rama_cont, guide, Adam({"lr": 0.05}), GeneralizedELBO(w=0.1))
        >>> isinstance(svi.step(y, n_agents=100), float)
        True
    """
    nu_loc = pyro.sample("nu_loc", dist.Normal(math.log(0.001), 1.0))
    nu_scale = pyro.sample("nu_scale", dist.LogNormal(math.log(0.5), 0.5))
    sigma = pyro.sample("sigma", dist.LogNormal(math.log(0.001), 0.5))
    eta = pyro.sample("eta", dist.LogNormal(math.log(10.0), 0.5))
    returns = shared_simulator(
        simulators.rama_cont,
        loss,
        n_timesteps=n_timesteps,
        n_agents=n_agents,
        s=s,
        tau=tau,
        gradient_horizon=gradient_horizon,
        checkpoint_every=checkpoint_every,
        **options,
    )
    names: Any = {"event_dims": ["time"]}  # a key that Pyro does not know
    return pyro.sample("x", returns(nu_loc, nu_scale, sigma, eta), obs=y, infer=names)
