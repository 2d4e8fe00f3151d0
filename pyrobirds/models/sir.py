"""The model of the SIR epidemic on a network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrobirds import losses, simulators
from pyrobirds.models.construction import Loss, shared_simulator
from pyrobirds.simulators import Graph, Simulator


def sir(
    infected: Tensor | None = None,
    recovered: Tensor | None = None,
    *,
    graph: Any,
    n_timesteps: int = 100,
    tau: float = 0.5,
    gradient_horizon: int | None = None,
    loss: Loss | Mapping[str, Loss] = losses.mse,
    **options: Any,
) -> dict[str, Tensor]:
    r"""The SIR epidemic on a network, with Gaussian priors on the decimal logarithms of its parameters.

    .. math::
        \log_{10} f \sim N(-2, 0.5), \qquad \log_{10} \beta \sim N(-\log_{10} k, 0.5), \qquad
        \log_{10} \gamma \sim N(-1, 0.5), \qquad x \sim \mathrm{sir}(f, \beta, \gamma),

    with k the mean number of contacts of an agent, 1 if that is less. So before there are data an infected agent
    infects about one other in a step, within a factor of 3 or so, and stays infected for about ten; one in a hundred
    is infected at first.

    Sites: ``log10_initial_fraction``, ``log10_beta`` and ``log10_gamma``, scalars; ``infected`` and ``recovered``, in
    agents, shape ``(n_timesteps,)``, dimension ``time``. The two share a run. If only one of them has data, the other
    is no site of the model.

    Args:
        infected: the observed numbers of infected agents, shape ``(n_timesteps,)``; NaN where missing.
        recovered: those of recovered agents. Without either the model draws both.
        graph: the contacts: a :class:`~pyrobirds.simulators.Graph`, or what one is made of. Make a Graph for a fit:
            what is none may change between calls, and is converted, and the simulator made anew, in every call.
        n_timesteps: number of values, that at t = 0 included.
        tau: temperature of the straight-through gradient, which is biased: see :func:`pyrobirds.simulators.sir`.
        gradient_horizon: see :func:`pyrobirds.simulators.sir`.
        loss: compares simulated with observed numbers; see :mod:`pyrobirds.losses`. One for both outputs, or a dict of
            them by output. Must be hashable, as functions are.
        **options: further keywords of :class:`pyrobirds.Simulator`, such as ``replicates`` or ``differentiation``.

    Returns:
        The values of the sites ``infected`` and ``recovered``, of those that there are.

    Raises:
        ValueError: ``loss`` is a dict and not of these two outputs.

    Example:
        >>> from pyro.infer import SVI
        >>> from pyro.infer.autoguide import AutoNormal
        >>> from pyro.optim import Adam
        >>> from pyrobirds import GeneralizedELBO, models
        >>> contacts = Graph.complete(100)
        >>> def model(infected=None):
        ...     return models.sir(infected, graph=contacts, n_timesteps=20)
        >>> infected = model()["infected"]
        >>> svi = SVI(model, AutoNormal(model), Adam({"lr": 0.05}), GeneralizedELBO(w=100))
        >>> svi.step(infected) > 0
        True
    """
    by_output = loss if isinstance(loss, Mapping) else {"infected": loss, "recovered": loss}
    if set(by_output) != {"infected", "recovered"}:
        raise ValueError(f"loss must be a function, or a dict of 'infected' and 'recovered', got one of {[*by_output]}")
    # A Graph that no other call will have would fill the cache.
    make = shared_simulator if isinstance(graph, Graph) else Simulator
    contacts = graph if isinstance(graph, Graph) else Graph(graph)
    simulator = make(
        simulators.sir,
        by_output,
        theta_event_dims=1,
        graph=contacts,
        n_timesteps=n_timesteps,
        tau=tau,
        gradient_horizon=gradient_horizon,
        **options,
    )
    at_first = pyro.sample("log10_initial_fraction", dist.Normal(-2.0, 0.5))
    log10_contacts = math.log10(max(contacts.n_edges / contacts.n_agents, 1))
    beta = pyro.sample("log10_beta", dist.Normal(-log10_contacts, 0.5))
    gamma = pyro.sample("log10_gamma", dist.Normal(-1.0, 0.5))
    run = simulator(torch.stack([at_first, beta, gamma], -1))
    names: Any = {"event_dims": ["time"]}  # a key that Pyro does not know
    data = {"infected": infected, "recovered": recovered}
    if any(y is not None for y in data.values()):
        data = {output: y for output, y in data.items() if y is not None}
    return {output: pyro.sample(output, run[output], obs=y, infer=names) for output, y in data.items()}
