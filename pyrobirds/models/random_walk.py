"""The model of the random walk."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyrobirds import losses, simulators
from pyrobirds.models.construction import Loss, shared_simulator


def random_walk(
    y: Tensor | None = None,
    *,
    n_timesteps: int = 100,
    tau: float = 0.1,
    loss: Loss = losses.mse,
    **options: Any,
) -> Tensor:
    r"""The random walk with a Gaussian prior on the log-odds of a step upwards.

    .. math:: \theta \sim N(0, 1), \qquad x \sim \mathrm{random\_walk}(\theta).

    Sites: ``theta``, log-odds, scalar; ``x``, the walk, shape ``(n_timesteps,)``, dimension ``time``, in steps.

    Args:
        y: the observed walk, shape ``(n_timesteps,)``; NaN where missing. Without it the model draws a walk.
        n_timesteps: number of values of the walk, the first, 0, included.
        tau: temperature of the straight-through gradient; see :func:`pyrobirds.simulators.random_walk`.
        loss: compares a simulated walk with the observed one; see :mod:`pyrobirds.losses`. Must be hashable, as
            functions are.
        **options: further keywords of :class:`pyrobirds.Simulator`, such as ``replicates`` or ``differentiation``.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro.optim import Adam
        >>> from pyrobirds import GeneralizedELBO, models
        >>> y = models.random_walk()
        >>> svi = SVI(models.random_walk, AutoNormal(models.random_walk), Adam({"lr": 0.05}), GeneralizedELBO(w=100))
        >>> svi.step(y) > 0
        True
    """
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    names: Any = {"event_dims": ["time"]}  # a key that Pyro does not know
    walk = shared_simulator(simulators.random_walk, loss, n_timesteps=n_timesteps, tau=tau, **options)
    return pyro.sample("x", walk(theta), obs=y, infer=names)
