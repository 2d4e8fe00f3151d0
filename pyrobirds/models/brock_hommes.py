"""The model of Brock and Hommes' asset prices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from pyrobirds import losses, simulators
from pyrobirds.models.construction import Loss, shared_simulator

# The mean and standard deviation of the parameter, or of its logarithm.
_NORMAL = {
    "g1": (0.0, 0.3),
    "b1": (0.0, 0.3),
    "g2": (0.5, 0.3),
    "b2": (0.5, 0.3),
    "g3": (0.5, 0.3),
    "b3": (-0.5, 0.3),
    "g4": (0.5, 0.3),
    "b4": (0.0, 0.3),
}
_LOG_NORMAL = {
    "beta": (math.log(120.0), 1.0),
    "sigma": (math.log(0.04), 0.5),
    "r": (math.log(0.01), 0.5),
}
_MMD = losses.MMD()


def brock_hommes(
    y: Tensor | None = None,
    *,
    n_timesteps: int = 100,
    free: Iterable[str] = ("g2", "b2", "g3", "b3"),
    bound: float = 1e3,
    gradient_horizon: int | None = None,
    compile: bool = False,
    loss: Loss = _MMD,
    **options: Any,
) -> Tensor:
    r"""Asset prices with four types of traders, with priors on the chosen parameters.

    .. math:: g_h \sim N(m_h, 0.3^2), \qquad b_h \sim N(a_h, 0.3^2), \qquad
        \log \frac{\beta}{120} \sim N(0, 1), \qquad
        \log \frac{\sigma}{0.04} \sim N(0, 0.5^2), \qquad \log \frac{r}{0.01} \sim N(0, 0.5^2),

    with :math:`m = (0, 0.5, 0.5, 0.5)` and :math:`a = (0, 0.5, -0.5, 0)`: mean and standard deviation of the uniform
    priors on [0, 1], for b3 on [-1, 0], that are customary for g2, b2, g3 and b3, with room to leave these intervals.

    Sites: those of ``free``, scalars with the units of :func:`pyrobirds.simulators.brock_hommes`; ``x``, the price,
    shape ``(n_timesteps,)``, dimension ``time``.

    Args:
        y: the observed prices as deviations from the fundamental one, shape ``(n_timesteps,)``; NaN where missing.
            Without it the model draws prices.
        n_timesteps: number of values of a path, the first, 0, included.
        free: names of the parameters that have a prior; the others have the defaults of the simulator.
        bound: prices are cut off at plus and minus this.
        gradient_horizon: see :func:`pyrobirds.simulators.brock_hommes`.
        compile: whether to compile the simulator's time loop.
        loss: compares simulated prices with the observed ones; see :mod:`pyrobirds.losses`. Must be hashable, as
            functions are. By default :class:`pyrobirds.losses.MMD`, which compares the values and not their order:
            two paths of the same parameters soon have nothing in common but their distribution.
        **options: further keywords of :class:`pyrobirds.Simulator`, such as ``replicates`` or ``differentiation``, and
            values, by name, of parameters that are not free.

    Raises:
        ValueError: ``free`` is empty, names what is not a parameter, or names one twice or with a value.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro.optim import Adam
        >>> from pyrobirds import GeneralizedELBO, models
        >>> y = models.brock_hommes()
        >>> guide = AutoNormal(models.brock_hommes)
        >>> svi = SVI(models.brock_hommes, guide, Adam({"lr": 0.05}), GeneralizedELBO(w=0.1))
        >>> isinstance(svi.step(y), float)
        True
    """
    names = (free,) if isinstance(free, str) else tuple(free)
    if not names or isinstance(free, str) or not {*names} <= {*_NORMAL, *_LOG_NORMAL}:
        raise ValueError(
            f"free must name at least one parameter out of {[*_NORMAL, *_LOG_NORMAL]}, got {free!r}: pass a tuple of "
            "names"
        )
    if twice := sorted({name for name in names if names.count(name) > 1 or name in options}):
        raise ValueError(f"free names {twice} twice, or beside a value: give each parameter once")
    theta = {
        name: pyro.sample(name, dist.Normal(*_NORMAL[name]) if name in _NORMAL else dist.LogNormal(*_LOG_NORMAL[name]))
        for name in names
    }
    prices = shared_simulator(
        simulators.brock_hommes,
        loss,
        n_timesteps=n_timesteps,
        bound=bound,
        gradient_horizon=gradient_horizon,
        compile=compile,
        **options,
    )
    dims: Any = {"event_dims": ["time"]}  # a key that Pyro does not know
    return pyro.sample("x", prices(**theta), obs=y, infer=dims)
