"""Loss and gradient of one epoch, by pyrobirds and by blackbirds, on the same problems.

Ten draws from a Gaussian with a standard deviation for each parameter, 100 time steps after the initial state, one
thread. blackbirds runs its own `compute_and_differentiate_loss` with its own simulators and losses; pyrobirds runs the
objective with its divergence, through Pyro, and (second line) the simulator and the loss alone. Both take turns in one
process, so that a drift of the machine's speed hits both alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import types
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import networkx
import pyro
import torch
from pyro.infer.autoguide import AutoNormal, init_to_median
from torch import Tensor

from pyrobirds import GeneralizedELBO, losses, models, simulators

# blackbirds 1.3 imports names that torch no longer has, for its forward mode alone, which is not used here.
sys.modules["blackbirds.jacfwd"] = types.ModuleType("blackbirds.jacfwd")
sys.modules["blackbirds.jacfwd"].jacfwd = torch.func.jacfwd  # type: ignore[attr-defined]

import blackbirds.losses as peer_losses  # noqa: E402
from blackbirds.infer.vi import compute_and_differentiate_loss  # noqa: E402
from blackbirds.models.brock_hommes import BrockHommes  # noqa: E402
from blackbirds.models.rama_cont import RamaCont  # noqa: E402
from blackbirds.models.random_walk import RandomWalk  # noqa: E402
from blackbirds.models.sir import SIR  # noqa: E402

NUM_DRAWS = 10
NUM_STEPS = 100


class Gaussian(torch.nn.Module):
    """The family in the form that blackbirds asks for."""

    def __init__(self, mean: Tensor, sd: float = 0.02) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(mean.clone())
        self.log_sd = torch.nn.Parameter(torch.full_like(mean, sd).log())

    def sample(self, n: int) -> tuple[Tensor, Tensor]:
        q = torch.distributions.Normal(self.mean, self.log_sd.exp())
        theta = q.rsample((n,))
        return theta, q.log_prob(theta).sum(-1)


class Problem(NamedTuple):
    """One simulator with its data, for both."""

    target: int  # how many times faster we mean to be
    mean: Tensor  # of the Gaussian, in the parameters of blackbirds
    peer: Callable[[Tensor, Any], Tensor]
    model: Callable[..., Any]  # of pyrobirds
    data: tuple[Tensor, ...]
    alone: Callable[[Tensor], Tensor]  # (10, number of parameters) -> (10,), simulator and loss of pyrobirds


def peer_epoch(problem: Problem) -> Callable[[], Any]:
    family = Gaussian(problem.mean)
    data = [problem.data[0]]
    loss = problem.peer

    def run() -> None:
        family.zero_grad()
        compute_and_differentiate_loss(loss, family, NUM_DRAWS, data)

    return run


def our_epoch(problem: Problem) -> Callable[[], Any]:
    pyro.clear_param_store()
    guide = AutoNormal(problem.model, init_loc_fn=partial(init_to_median, num_samples=1000), init_scale=0.02)
    elbo = GeneralizedELBO(num_particles=NUM_DRAWS)

    def run() -> None:
        guide.zero_grad()
        elbo.loss_and_grads(problem.model, guide, *problem.data)

    return run


def our_loss(problem: Problem) -> Callable[[], Any]:
    family = Gaussian(problem.mean)

    def run() -> None:
        family.zero_grad()
        problem.alone(family.sample(NUM_DRAWS)[0]).mean().backward()

    return run


def parameters(names: tuple[str, ...], mean: Tensor) -> dict[str, Tensor]:
    """One scalar site for each, with a Gaussian prior."""
    prior = dict(zip(names, mean, strict=True))
    return {name: pyro.sample(name, pyro.distributions.Normal(at, 1.0)) for name, at in prior.items()}


def random_walk() -> Problem:
    y = simulators.random_walk(torch.tensor([0.4]), NUM_STEPS + 1)[0]
    peer = peer_losses.SingleOutput_SimulateAndMSELoss(RandomWalk(NUM_STEPS))
    return Problem(
        100,
        torch.zeros(1),
        lambda theta, data: peer(theta, data[0].unsqueeze(-1)),
        partial(models.random_walk, n_timesteps=NUM_STEPS + 1),
        (y,),
        lambda theta: losses.mse(simulators.random_walk(theta[:, 0], NUM_STEPS + 1), y.expand(NUM_DRAWS, -1)),
    )


def sir() -> Problem:
    graph = networkx.watts_strogatz_graph(1000, 10, 0.1, seed=0)
    mean = torch.tensor([-1.5, -1.5, -1.0])  # log10 of the initial fraction, beta, gamma
    prepared = simulators.Graph(graph)
    infected = simulators.sir(mean.unsqueeze(0), prepared, NUM_STEPS + 1)["infected"][0]
    peer = peer_losses.SingleOutput_SimulateAndMSELoss(SIR(graph, NUM_STEPS))
    simulate = simulators.Simulator(
        simulators.sir,
        loss={"infected": losses.mse, "recovered": losses.mse},
        theta_event_dims=1,
        graph=prepared,
        n_timesteps=NUM_STEPS + 1,
    )

    def model(y: Tensor | None = None) -> None:
        theta = pyro.sample("theta", pyro.distributions.Normal(mean, 1.0).to_event(1))
        pyro.sample("infected", simulate(theta)["infected"], obs=y)

    def alone(theta: Tensor) -> Tensor:
        x = simulators.sir(theta, prepared, NUM_STEPS + 1)["infected"]
        return losses.mse(x, infected.expand(NUM_DRAWS, -1))

    return Problem(40, mean, lambda theta, data: peer(theta, data[0]), model, (infected,), alone)


def brock_hommes(compile: bool) -> Problem:
    free = ("g2", "b2", "g3", "b3")
    mean = torch.tensor([0.9, 0.2, 0.9, -0.2])
    fixed = {"beta": 120.0, "sigma": 0.04, "r": 0.01, "g1": 0.0, "b1": 0.0, "g4": 0.99, "b4": 0.0}  # the peer has g < 1
    settings = {"n_timesteps": NUM_STEPS + 1, "compile": compile, **fixed}
    y = simulators.brock_hommes(**dict(zip(free, mean.unsqueeze(1), strict=True)), **settings)[0]
    mmd = losses.MMD()
    simulate = simulators.Simulator(simulators.brock_hommes, loss=mmd, **settings)

    def model(y: Tensor | None = None) -> None:
        pyro.sample("x", simulate(**parameters(free, mean)), obs=y)

    def alone(theta: Tensor) -> Tensor:
        x = simulators.brock_hommes(**dict(zip(free, theta.unbind(1), strict=True)), **settings)
        return mmd(x, y.expand(NUM_DRAWS, -1))

    peer = peer_losses.SingleOutput_SimulateAndMMD(y, BrockHommes(NUM_STEPS))
    logs = torch.tensor([fixed["beta"], fixed["sigma"], fixed["r"]]).log()

    def in_order(theta: Tensor) -> Tensor:
        g2, b2, g3, b3 = theta
        zero = torch.zeros(())
        g4 = torch.tensor(fixed["g4"])
        return torch.stack([logs[0], zero, g2, g3, g4, zero, b2, b3, zero, logs[1], logs[2]])

    return Problem(300 if compile else 80, mean, lambda theta, data: peer(in_order(theta), data[0]), model, (y,), alone)


def rama_cont() -> Problem:
    names = ("nu_loc", "nu_scale", "sigma", "eta")
    mean = torch.tensor([-1.0, 0.5, 0.3, 1.0])
    settings = {"n_timesteps": NUM_STEPS + 1, "n_agents": 1000, "s": 0.1}
    y = simulators.rama_cont(*mean.unsqueeze(1), **settings)[0]
    simulate = simulators.Simulator(simulators.rama_cont, loss=losses.mse, **settings)

    def model(y: Tensor | None = None) -> None:
        pyro.sample("x", simulate(**parameters(names, mean)), obs=y)

    def alone(theta: Tensor) -> Tensor:
        return losses.mse(simulators.rama_cont(*theta.unbind(1), **settings), y.expand(NUM_DRAWS, -1))

    peer = peer_losses.SingleOutput_SimulateAndMSELoss(RamaCont(1000, NUM_STEPS, s=0.1, sigmoid_k=5.0))
    return Problem(35, mean, lambda theta, data: peer(theta, data[0]), model, (y,), alone)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "random walk, MSE": random_walk,
    "SIR, 1,000 agents, MSE": sir,
    "Brock-Hommes, 4 parameters, MMD": partial(brock_hommes, compile=False),
    "... compiled": partial(brock_hommes, compile=True),
    "Cont, 1,000 agents, MSE": rama_cont,
}


def timed(run: Callable[[], Any], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each is timed")
    parser.add_argument("--only", default="", help="problems whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    print(f"{NUM_DRAWS} draws, {NUM_STEPS} steps, one thread; medians of {arguments.rounds} alternating rounds")
    print(f"{'problem':<34}{'blackbirds':>14}{'objective':>12}{'ratio':>8}{'loss alone':>12}{'ratio':>8}{'target':>8}")
    for name, make in PROBLEMS.items():
        if arguments.only not in name:
            continue
        problem = make()
        runs = [peer_epoch(problem), our_epoch(problem), our_loss(problem)]
        for run in runs[1:] * 5:
            run()
        rows = [[timed(runs[0]), timed(runs[1], 20), timed(runs[2], 20)] for _ in range(arguments.rounds)]
        peer, ours, alone = map(statistics.median, zip(*rows, strict=True))
        ratio, ratio_alone = (statistics.median(row[0] / row[i] for row in rows) for i in (1, 2))
        print(f"{name:<34}{1e3 * peer:>11.0f} ms{1e3 * ours:>9.2f} ms{ratio:>8.0f}", end="")
        print(f"{1e3 * alone:>9.2f} ms{ratio_alone:>8.0f}{problem.target:>8}")


if __name__ == "__main__":
    main()
