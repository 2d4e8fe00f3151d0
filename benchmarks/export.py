"""What it costs to make draws of a fitted guide and their predictions, against Pyro's own Predictive.

All are timed in turn in one process, so that a drift of the machine's speed hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pyro
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import AutoNormal

from pyrobirds import models, to_inference_data

NUM_SAMPLES = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="how often each is timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)

    model = models.random_walk
    y = model()
    guide = AutoNormal(model)
    guide(y)

    def predictive(parallel: bool) -> Callable[[], object]:
        return lambda: Predictive(model, guide=guide, num_samples=NUM_SAMPLES, parallel=parallel)()

    def export(**options: object) -> Callable[[], object]:
        return lambda: to_inference_data(model, guide, y, num_samples=NUM_SAMPLES, **options)

    predicted = ["posterior", "posterior_predictive"]
    ways = {
        "Predictive(parallel=True)": predictive(True),
        "Predictive(parallel=False), its default": predictive(False),
        "to_inference_data, the same two groups": export(groups=predicted),
        "... with batch_size=1000": export(groups=predicted, batch_size=1000),
        "to_inference_data, all groups": export(),
        "sample_stats with num_repeats=100": export(groups=["sample_stats"], num_repeats=100),
        "... with batch_size=1000 ": export(groups=["sample_stats"], num_repeats=100, batch_size=1000),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in ways.values():
        run()
    for _ in range(arguments.rounds):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    print(f"random walk, {NUM_SAMPLES} draws, one thread; medians of {arguments.rounds} alternating rounds")
    print(f"{'':<42}{'ms':>10}{'ratio to the first':>20}")
    first = next(iter(times.values()))
    for name, measured in times.items():
        ratio = statistics.median(a / b for a, b in zip(measured, first, strict=True))
        print(f"{name:<42}{1e3 * statistics.median(measured):>10.1f}{ratio:>20.1f}")


if __name__ == "__main__":
    main()
