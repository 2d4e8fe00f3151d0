"""What a step of GeneralizedELBO costs, against Pyro's Trace_ELBO on the same vectorised model.

Both are stepped in turn in one process, so that a drift of the machine's speed hits both alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam

from pyrobirds import GeneralizedELBO, models
from pyrobirds.divergences import KL

NUM_PARTICLES = 10


def hierarchical(y: torch.Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0))
    with pyro.plate("group", 8, dim=-2):
        theta = pyro.sample("theta", dist.Normal(mu, sigma))
        with pyro.plate("unit", 20, dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def svi(model: Callable[..., Any], guide: type, loss: Any, y: torch.Tensor) -> SVI:
    pyro.clear_param_store()
    made = SVI(model, guide(model), Adam({"lr": 0.01}), loss=loss)
    for _ in range(20):
        made.step(y)
    return made


def time_steps(made: SVI, y: torch.Tensor, num_steps: int) -> float:
    start = time.perf_counter()
    for _ in range(num_steps):
        made.step(y)
    return (time.perf_counter() - start) / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="how often each is timed")
    parser.add_argument("--steps", type=int, default=50, help="steps each time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)

    objectives = {
        "Trace_ELBO": lambda: Trace_ELBO(num_particles=NUM_PARTICLES, vectorize_particles=True),
        "GeneralizedELBO": lambda: GeneralizedELBO(num_particles=NUM_PARTICLES),
        "GeneralizedELBO, KL(analytic=False)": lambda: GeneralizedELBO(
            num_particles=NUM_PARTICLES, divergence=KL(analytic=False)
        ),
    }
    problems = {
        "random walk, AutoNormal": (models.random_walk, AutoNormal, models.random_walk()),
        "hierarchical, AutoNormal": (hierarchical, AutoNormal, torch.randn(8, 20)),
        "hierarchical, AutoMultivariateNormal": (hierarchical, AutoMultivariateNormal, torch.randn(8, 20)),
    }
    print(
        f"{NUM_PARTICLES} particles, one thread, Pyro's validation on; medians of {arguments.rounds} alternating rounds"
    )
    print(f"{'model and guide':<40}{'objective':<40}{'ms a step':>10}{'ratio':>8}")
    for problem, (model, guide, y) in problems.items():
        steps = {name: svi(model, guide, objective(), y) for name, objective in objectives.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(arguments.rounds):
            for name, made in steps.items():
                times[name].append(time_steps(made, y, arguments.steps))
        for name, measured in times.items():
            ratio = statistics.median(a / b for a, b in zip(measured, times["Trace_ELBO"], strict=True))
            print(f"{problem:<40}{name:<40}{1e3 * statistics.median(measured):>10.3f}{ratio:>8.2f}")


if __name__ == "__main__":
    main()
