"""What each loss costs, forward and backward, as a multiple of the mean squared error of one run.

All are timed in turn in one process, so that a drift of the machine's speed hits all alike.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pyrobirds import losses

Loss = Callable[[Tensor, Tensor], Tensor]

NUM_DRAWS, NUM_TIMESTEPS, NUM_REPLICATES = 10, 100, 10
BASE = "mse"
NOT_LOSSES = {"SeriesMoments"}  # public, but an argument of losses

# A public loss goes into one of the two; main() refuses to run without it.
ONE_RUN: dict[str, Loss] = {
    BASE: losses.mse,
    "mse, weights": functools.partial(losses.mse, weights=torch.ones(NUM_TIMESTEPS)),
    "mae": losses.mae,
    "log_mse": losses.log_mse,
    "Sum of mse and mae": losses.Sum([losses.mse, losses.mae]),
    "Moments, one run": losses.Moments(),
    "MMD": losses.MMD(),
    "SlicedWasserstein": losses.SlicedWasserstein(),
    "SlicedWasserstein, 2 lags": losses.SlicedWasserstein(lags=(1, 2)),
}
OF_REPLICATES: dict[str, Loss] = {
    "DebiasedMSE": losses.DebiasedMSE(),
    "Moments": losses.Moments(),
    "CRPS": losses.CRPS(),
    "EnergyScore": losses.EnergyScore(),
    "KernelScore": losses.KernelScore(),
    "SyntheticLikelihood, diagonal": losses.SyntheticLikelihood(covariance="diagonal"),
    "SyntheticLikelihood, full, of 6 moments": losses.SyntheticLikelihood(losses.SeriesMoments(lags=(1,))),
    "BetaSyntheticLikelihood": losses.BetaSyntheticLikelihood(1.5),
    "GammaSyntheticLikelihood": losses.GammaSyntheticLikelihood(1.5),
}


def time_steps(loss: Loss, x: Tensor, y: Tensor, num_steps: int) -> float:
    start = time.perf_counter()
    for _ in range(num_steps):
        x.grad = None
        loss(x, y).sum().backward()
    return (time.perf_counter() - start) / num_steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="how often each is timed")
    parser.add_argument("--steps", type=int, default=20, help="evaluations each time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    named = {name.split(",")[0].split()[0] for name in ONE_RUN | OF_REPLICATES}
    if lacking := set(losses.__all__) - NOT_LOSSES - named:
        raise SystemExit(f"no example of {sorted(lacking)}: add one to ONE_RUN or OF_REPLICATES")

    y = torch.randn(NUM_TIMESTEPS).expand(NUM_DRAWS, NUM_TIMESTEPS)  # as a Simulator passes it
    one_run = torch.randn(NUM_DRAWS, NUM_TIMESTEPS, requires_grad=True)
    replicates = torch.randn(NUM_DRAWS, NUM_REPLICATES, NUM_TIMESTEPS, requires_grad=True)
    cases = {name: (loss, one_run) for name, loss in ONE_RUN.items()}
    cases |= {name: (loss, replicates) for name, loss in OF_REPLICATES.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for loss, x in cases.values():
        time_steps(loss, x, y, 3)
    for _ in range(arguments.rounds):
        for name, (loss, x) in cases.items():
            times[name].append(time_steps(loss, x, y, arguments.steps))

    print(
        f"{NUM_DRAWS} draws of {NUM_TIMESTEPS} time steps, {NUM_REPLICATES} replicates where the loss takes them, one "
        f"thread; medians of {arguments.rounds} alternating rounds of {arguments.steps}"
    )
    print(f"{'loss':<42}{'replicates':>10}{'ms':>8}{'times ' + BASE:>12}")
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, times[BASE], strict=True))
        m = NUM_REPLICATES if name in OF_REPLICATES else 1
        print(f"{name:<42}{m:>10}{statistics.median(own) * 1e3:>8.3f}{ratio:>12.1f}")


if __name__ == "__main__":
    main()
