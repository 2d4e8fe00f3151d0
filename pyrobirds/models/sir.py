"""The model of the SIR epidemic on a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyrobirds import losses, simulators
from pyrobirds.simulators import Graph, Simulator

_Loss = Callable[[Tensor, Tensor], Tensor]


@lru_cache
def _epidemic(graph: Any, n_timesteps: int, tau: float, infected: _Loss, recovered: _Loss) -> Simulator:
    # One Simulator for all calls of the model, so that its contract is checked, and a graph converted, only once.
    return Simulator(
        simulators.sir,
        loss={"infected": infected, "recovered": recovered},
        theta_event_dims=1,
        graph=graph if isinstance(graph, Graph) else Graph(graph),
        n_timesteps=n_timesteps,
        tau=tau,
    )


def sir(
    infected: Tensor | None = None,
    recovered: Tensor | None = None,
    *,
    graph: Any,
    n_timesteps: int = 100,
    tau: float = 0.1,
    loss: _Loss | Mapping[str, _Loss] = losses.mse,
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
        graph: the contacts, as for :func:`pyrobirds.simulators.sir`. What is not a Graph yet is converted once.
        n_timesteps: number of values, that at t = 0 included.
        tau: temperature of the straight-through gradient; see :func:`pyrobirds.simulators.sir`.
        loss: compares simulated with observed numbers; see :mod:`pyrobirds.losses`. One for both outputs, or a dict of
            them by output. Must be hashable, as functions are.

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
    simulator = _epidemic(graph, n_timesteps, tau, by_output["infected"], by_output["recovered"])
    contacts: Graph = simulator.settings["graph"]
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
