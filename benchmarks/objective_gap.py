"""How far above the exact optimum a fit ends, for the same number of simulations.

The tutorial's problem: its random walk, w = 100, AutoNormal, Adam at 0.05. The objective of a Gaussian is known there
by quadrature, and so is the best Gaussian. A gap is relative: objective / optimum - 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam

from pyrobirds import GeneralizedELBO, fit, models

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from exact_walk import TUTORIAL_WALK, best_gaussian, objective

W = 100
BUDGETS = ((100, 10), (1000, 10), (100, 100))  # steps, simulations in each
STATES = ("averaged", "best", "last")


def gaps(seed: int, num_steps: int, num_particles: int, optimum: float) -> dict[str, float]:
    """The gap of each state that one fit leaves."""
    pyro.clear_param_store()
    guide = AutoNormal(models.random_walk)
    svi = SVI(models.random_walk, guide, Adam({"lr": 0.05}), GeneralizedELBO(w=W, num_particles=num_particles))
    y = torch.as_tensor(TUTORIAL_WALK, dtype=torch.float32)
    result = fit(svi, y, num_steps=num_steps, seed=seed, progress=False)
    found = {}
    for state in STATES:
        result.load(state)
        at = objective(guide.locs.theta.item(), guide.scales.theta.item(), TUTORIAL_WALK, W)
        found[state] = at.total / optimum - 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=40, help="how many fits of each budget")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    optimum = best_gaussian(TUTORIAL_WALK, W).terms.total
    print(f"gap above the exact optimum {optimum:.2f}, over {arguments.seeds} seeds")
    print(f"{'steps x simulations':<22}{'state':<12}{'median':>10}{'worst':>10}{'above 1 %':>12}")
    for num_steps, num_particles in BUDGETS:
        found = [gaps(seed, num_steps, num_particles, optimum) for seed in range(arguments.seeds)]
        for state in STATES:
            values = [one[state] for one in found]
            above = sum(value > 0.01 for value in values)
            budget = f"{num_steps} x {num_particles}"
            print(
                f"{budget:<22}{state:<12}{statistics.median(values):>10.3%}{max(values):>10.2%}{above:>12}", flush=True
            )


if __name__ == "__main__":
    main()
