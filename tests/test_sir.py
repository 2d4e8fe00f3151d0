"""The SIR epidemic: its law against independent references, its limits, and what goes in and out."""

from __future__ import annotations

import math
import re
from typing import Any

import networkx
import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from pyrobirds import GeneralizedELBO, losses, models
from pyrobirds.simulators import Graph, sir

# The statistical tests compare at most 100 numbers, each within 4.5 standard errors: 1 in 1,000 seeds fails.
ERRORS = 4.5


def theta_of(fraction: float, beta: float, gamma: float, n_draws: int, **kind: Any) -> Tensor:
    return torch.tensor([fraction, beta, gamma], **kind).log10().expand(n_draws, 3)


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance over the runs, each with its squared standard error."""
    n = len(x)
    centred = x - x.mean(0)
    variance = (centred**2).mean(0)
    errors = np.stack([variance, (centred**4).mean(0) - variance**2]) / n
    return np.stack([x.mean(0), variance]), errors


def assert_within_errors(x: np.ndarray, reference: np.ndarray, squared_errors: np.ndarray) -> None:
    # A count that is certain has neither variance nor error.
    assert np.all((x - reference) ** 2 <= ERRORS**2 * squared_errors + 1e-18)


def agent_by_agent(
    graph: Any, fraction: float, beta: float, gamma: float, n_timesteps: int, n_runs: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """The epidemic in NumPy, one agent after another, for many runs."""
    nodes = list(graph.nodes)
    sources = graph.predecessors if graph.is_directed() else graph.neighbors
    status = {node: np.where(rng.random(n_runs) < fraction, "I", "S") for node in nodes}
    counts: dict[str, list[np.ndarray]] = {"infected": [], "recovered": []}
    for _ in range(n_timesteps):
        counts["infected"].append(sum((status[node] == "I").astype(float) for node in nodes))
        counts["recovered"].append(sum((status[node] == "R").astype(float) for node in nodes))
        after = {}
        for node in nodes:
            escapes = np.ones(n_runs)
            for source in sources(node):
                escapes *= np.where(status[source] == "I", 1 - beta, 1) ** graph.number_of_edges(source, node)
            catches = (status[node] == "S") & (rng.random(n_runs) >= escapes)
            recovers = (status[node] == "I") & (rng.random(n_runs) < gamma)
            after[node] = np.where(catches, "I", np.where(recovers, "R", status[node]))
        status = after
    return {output: np.stack(count, -1) for output, count in counts.items()}


NETWORKS = {
    "small world": networkx.watts_strogatz_graph(15, 4, 0.2, seed=1),
    "directed": networkx.gnp_random_graph(15, 0.25, seed=1, directed=True),
    "parallel edges": networkx.MultiGraph([*networkx.path_graph(8).edges, (0, 1), (0, 1), (3, 4)]),
    "complete": networkx.complete_graph(10),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("network", NETWORKS)
def test_law_is_that_of_a_loop_over_agents(network: str, dtype: torch.dtype) -> None:
    """Means and variances of both outputs at five times, and of the product of both, over 10,000 runs each."""
    graph, n_runs, times = NETWORKS[network], 10_000, [0, 1, 2, 5, 8]
    f, beta, gamma = 0.2, 0.15, 0.3
    reference = agent_by_agent(graph, f, beta, gamma, 9, n_runs, np.random.default_rng(0))
    got = sir(theta_of(f, beta, gamma, n_runs, dtype=dtype), graph, 9)
    assert all(count.dtype == dtype for count in got.values())
    together = [
        np.concatenate([i[:, times], r[:, times], i[:, [2, 5]] * r[:, [5, 8]]], -1)
        for i, r in [[reference["infected"], reference["recovered"]], [x.double().numpy() for x in got.values()]]
    ]
    (expected, error), (found, other_error) = map(moments, together)
    assert_within_errors(found, expected, error + other_error)


@pytest.mark.parametrize("gamma", [1.0, 0.4])
@pytest.mark.parametrize("complete", [Graph.complete(5), Graph(networkx.complete_graph(5, networkx.MultiGraph))])
def test_reed_frost_by_enumeration(gamma: float, complete: Graph) -> None:
    """The exact joint distribution after three steps, by chi-square: four tests at 0.1% each."""
    f, beta, n, n_runs = 0.3, 0.25, 5, 20_000
    binomial = scipy.stats.binom.pmf
    law = {(i, 0): binomial(i, n, f) for i in range(n + 1)}
    for _ in range(3):
        after: dict[tuple[int, int], float] = {}
        for (i, r), p in law.items():
            for new in range(n - i - r + 1):
                for out in range(i + 1):
                    there = p * binomial(new, n - i - r, 1 - (1 - beta) ** i) * binomial(out, i, gamma)
                    key = (i + new - out, r + out)
                    after[key] = after.get(key, 0) + there
        law = after
    law = {key: p for key, p in law.items() if p > 0}
    got = sir(theta_of(f, beta, gamma, n_runs), complete, 4)
    pairs = torch.stack([got["infected"][:, -1], got["recovered"][:, -1]], -1).int().tolist()
    observed = dict.fromkeys(law, 0)
    for i, r in pairs:
        observed[i, r] += 1  # what has no probability is not among the keys
    rare = [key for key in law if n_runs * law[key] < 5]
    seen = [observed[key] for key in law if key not in rare] + [sum(observed[key] for key in rare)] * bool(rare)
    expected = [n_runs * law[key] for key in law if key not in rare] + [n_runs * sum(law[k] for k in rare)] * bool(rare)
    assert scipy.stats.chisquare(seen, expected).pvalue > 1e-3


def test_without_transmission_there_are_only_recoveries() -> None:
    """Infected are Binomial(n, f (1 - gamma)^t)."""
    n, f, gamma, n_runs = 50, 0.4, 0.2, 20_000
    got = sir(theta_of(f, 0.0, gamma, n_runs), Graph.complete(n), 6)
    p = f * (1 - gamma) ** np.arange(6)
    (mean, variance), errors = moments(got["infected"].double().numpy())
    assert_within_errors(np.stack([mean, variance]), np.stack([n * p, n * p * (1 - p)]), errors)
    whole = got["infected"] + got["recovered"]
    assert torch.equal(whole, whole[:, :1].expand(-1, 6))


def test_an_infection_lasts_one_step_if_recovery_is_certain() -> None:
    got = sir(theta_of(0.1, 0.3, 1.0, 200), Graph.complete(30), 10)
    infected, recovered = got["infected"], got["recovered"]
    assert torch.equal(recovered.diff(), infected[:, :-1])
    assert bool(infected[:, 1:].any())


def test_nobody_recovers_if_recovery_is_impossible() -> None:
    got = sir(theta_of(0.1, 0.3, 0.0, 200), Graph.complete(30), 10)
    assert not bool(got["recovered"].any())
    assert bool((got["infected"].diff() >= 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_transmission_spreads_step_by_step(dtype: torch.dtype) -> None:
    """Along a directed ring by one agent a step, from one infected agent, and to everybody at once where all meet."""
    ring = Graph(torch.stack([torch.arange(20), torch.arange(20).roll(-1)]))
    infected = sir(theta_of(0.05, 1.0, 0.0, 1000, dtype=dtype), ring, 25)["infected"]
    one = infected[infected[:, 0] == 1]
    assert len(one) > 100
    assert torch.equal(one, (1 + torch.arange(25, dtype=dtype)).clamp(max=20).expand_as(one))
    infected = sir(theta_of(0.05, 1.0, 0.0, 1000, dtype=dtype), Graph.complete(20), 3)["infected"]
    assert torch.equal(infected[:, 1], torch.where(infected[:, 0] > 0, 20, 0).to(dtype))


def test_agents_are_conserved_and_draws_are_independent() -> None:
    got = sir(theta_of(0.1, 0.1, 0.1, 2000), NETWORKS["small world"], 20)
    infected, recovered = got["infected"], got["recovered"]
    assert bool(((infected >= 0) & (recovered >= 0) & (infected + recovered <= 15)).all())
    assert torch.equal(infected, infected.round())
    assert bool((recovered.diff() >= 0).all())
    assert bool(((infected + recovered).diff() >= 0).all())
    # The correlation of the ends of neighbouring draws is N(0, 1 / 1000).
    ends = recovered[:, -1].reshape(2, 1000)
    assert abs(float(torch.corrcoef(ends)[0, 1])) < ERRORS / math.sqrt(1000)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (0,), (2, 0, 3)])
def test_any_batch_of_parameters(shape: tuple[int, ...]) -> None:
    theta = torch.full((*shape, 3), -0.5, requires_grad=True)
    for graph in (Graph(NETWORKS["small world"]), Graph.complete(15)):
        got = sir(theta, graph, 6)
        assert [*got] == ["infected", "recovered"]
        assert all(count.shape == (*shape, 6) for count in got.values())
        got["infected"].sum().backward()
    assert theta.grad is not None
    assert sir(theta, Graph.complete(3), 1)["recovered"].tolist() == torch.zeros(*shape, 1).tolist()


def test_each_draw_has_its_own_parameters() -> None:
    theta = torch.tensor([[-math.inf, 0.0, 0.0], [0.0, -1.0, -math.inf], [0.0, -1.0, 0.0]])
    infected = sir(theta, Graph.complete(9), 3)["infected"]
    assert infected.tolist() == [[0, 0, 0], [9, 9, 9], [9, 0, 0]]


def test_the_global_seed_decides() -> None:
    theta = theta_of(0.1, 0.1, 0.1, 5)
    runs = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        runs.append(sir(theta, NETWORKS["small world"], 20)["infected"])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(sir(theta, NETWORKS["small world"], 20)["infected"], runs[2])


def test_no_nan_in_the_tails_of_the_priors() -> None:
    """100,000 draws from the model's priors, ten times as wide: from 1e-20 to certainty."""
    theta = torch.tensor([-2.0, -1.0, -1.0]) + 5 * torch.randn(100_000, 3)
    theta.requires_grad_()
    got = sir(theta, Graph(networkx.cycle_graph(6)), 4)
    assert all(bool(count.isfinite().all()) for count in got.values())
    (got["infected"].square().sum() + got["recovered"].square().sum()).backward()
    assert bool(theta.grad.isfinite().all())
    assert bool((theta.grad != 0).any(0).all())


def test_nan_stays_in_its_draw() -> None:
    theta = torch.zeros(4, 3)
    theta[[0, 1, 2], [0, 1, 2]] = math.nan
    for count in sir(theta, Graph.complete(5), 4).values():
        assert count.isnan().all(-1).tolist() == [True, True, True, False]
        assert not bool(count[3].isnan().any())


THETA = torch.zeros(3)
COMPLETE = Graph.complete(5)
WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "list": (
        lambda: sir([0, 0, 0], COMPLETE, 4),
        TypeError,
        "theta must be a tensor of float32 or float64, got a list",
    ),
    "half": (
        lambda: sir(THETA.half(), COMPLETE, 4),
        TypeError,
        "float32 or float64, got torch.float16: use theta.float()",
    ),
    "integers": (lambda: sir(THETA.long(), COMPLETE, 4), TypeError, "float32 or float64, got torch.int64"),
    "entries": (
        lambda: sir(torch.zeros(5, 2), COMPLETE, 4),
        ValueError,
        "theta has shape (5, 2), expected (*batch, 3)",
    ),
    "number": (lambda: sir(torch.tensor(0.0), COMPLETE, 4), ValueError, "theta has shape (), expected (*batch, 3)"),
    "tau": (lambda: sir(THETA, COMPLETE, 4, tau=1), ValueError, "tau must be below 1, got 1.0"),
    "no tau": (lambda: sir(THETA, COMPLETE, 4, tau=0), ValueError, "tau must be a finite number above 0, got 0"),
    "time": (lambda: sir(THETA, COMPLETE, 0), ValueError, "n_timesteps must be at least 1, got 0"),
    "graph": (lambda: sir(THETA, [(0, 1)], 4), TypeError, "graph must be a pyrobirds Graph, a networkx graph"),
    "contacts": (
        lambda: sir(THETA, Graph.complete(2**22 + 1), 4),
        ValueError,
        "an agent with 4194304 contacts, of which a step counts fewer than 4194304 in torch.float32: take float64",
    ),
    "more contacts": (
        lambda: sir(THETA.double(), Graph.complete(2**29 + 1), 4),
        ValueError,
        "fewer than 536870912 in torch.float64: take a sparser graph",
    ),
    "horizon": (
        lambda: sir(THETA, COMPLETE, 4, gradient_horizon=0),
        ValueError,
        "gradient_horizon must be at least 1, got 0",
    ),
    "loss": (
        lambda: models.sir(graph=COMPLETE, loss={"infected": losses.mse}),
        ValueError,
        "loss must be a function, or a dict of 'infected' and 'recovered', got one of ['infected']",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case: str) -> None:
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=re.escape(message)):
        call()


def sites(*data: Tensor | None) -> dict[str, Any]:
    trace = poutine.trace(models.sir).get_trace(*data, graph=COMPLETE, n_timesteps=4)
    return {name: node["is_observed"] for name, node in trace.nodes.items() if node["type"] == "sample"}


def test_the_model_has_a_site_for_each_output_with_data_or_for_both() -> None:
    parameters = {"log10_initial_fraction": False, "log10_beta": False, "log10_gamma": False}
    y = torch.zeros(4)
    assert sites() == {**parameters, "infected": False, "recovered": False}
    assert sites(y) == {**parameters, "infected": True}
    assert sites(None, y) == {**parameters, "recovered": True}
    assert sites(y, y) == {**parameters, "infected": True, "recovered": True}


def test_the_prior_of_beta_knows_the_number_of_contacts() -> None:
    for graph, contacts in [(Graph.complete(101), 100), (networkx.cycle_graph(9), 2), (networkx.empty_graph(3), 1)]:
        trace = poutine.trace(models.sir).get_trace(graph=graph, n_timesteps=2)
        assert float(trace.nodes["log10_beta"]["fn"].loc) == pytest.approx(-math.log10(contacts))


def test_the_model_is_fitted_and_predicts() -> None:
    """Data of a fast epidemic; the loss of predictions falls by a factor of ten, which the prior does not by chance."""
    graph = Graph(networkx.watts_strogatz_graph(100, 10, 0.1, seed=0))
    y = sir(torch.tensor([-1.0, -0.7, -0.5]), graph, 15)

    def model(infected: Tensor | None = None, recovered: Tensor | None = None) -> dict[str, Tensor]:
        return models.sir(
            infected, recovered, graph=graph, n_timesteps=15, loss={"infected": losses.mse, "recovered": losses.mse}
        )

    guide = AutoNormal(model)
    svi = SVI(model, guide, Adam({"lr": 0.05}), GeneralizedELBO(w=10))
    for _ in range(100):
        svi.step(**y)

    def error(**options: Any) -> float:
        draws = Predictive(model, num_samples=200, parallel=True, **options)()
        return float(sum((draws[output] - y[output]).square().mean() for output in y))

    assert error(guide=guide) < error() / 10
