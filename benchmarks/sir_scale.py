"""What a gradient of the SIR epidemic costs in time and memory, by agents, particles and time steps.

Small-world graphs of degree 10. Each case runs in processes of its own: one for the times, one for the memory, in which
freed blocks go back to the system at once, so that the peak counts only what is in use.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

CASES = [
    (1_000, 1, 100),
    (1_000, 10, 100),
    (1_000, 100, 100),
    (10_000, 1, 100),
    (10_000, 10, 100),
    (10_000, 100, 10),
    (100_000, 1, 100),
    (100_000, 10, 100),
    (100_000, 100, 10),
    (1_000_000, 1, 10),
    (1_000_000, 10, 10),
]
DEGREE = 10


def measure(n_agents: int, n_particles: int, n_timesteps: int, num_threads: int, memory: bool) -> dict[str, float]:
    """Seconds forward and backward, medians, or the bytes that one forward and backward pass takes at most."""
    import torch

    from pyrobirds.simulators import Graph, sir

    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    # As Watts and Strogatz have it: each edge of a ring is rewired with probability 0.1.
    source = torch.arange(n_agents).repeat_interleave(DEGREE // 2)
    target = (source + torch.arange(1, DEGREE // 2 + 1).repeat(n_agents)) % n_agents
    target = torch.where(torch.rand(len(source)) < 0.1, torch.randint(n_agents, source.shape), target)
    apart = source != target
    edges = torch.stack([source, target])[:, apart]
    graph = Graph(torch.cat([edges, edges.flip(0)], 1), n_agents)
    theta = torch.tensor([-2.0, -1.0, -1.0]).repeat(n_particles, 1).requires_grad_()
    del source, target, apart, edges

    def passes(n_timesteps: int) -> tuple[float, float]:
        start = time.perf_counter()
        counts = sir(theta, graph, n_timesteps)
        between = time.perf_counter()
        (counts["infected"].mean() + counts["recovered"].mean()).backward()
        return between - start, time.perf_counter() - between

    passes(3)
    if memory:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak begins anew
        before = resident("VmRSS")
        passes(n_timesteps)
        return {"bytes": resident("VmHWM") - before}
    n_rounds = 5 if n_agents * n_particles * n_timesteps <= 10**7 else 1
    forward, backward = zip(*(passes(n_timesteps) for _ in range(n_rounds)), strict=True)
    return {"forward": statistics.median(forward), "backward": statistics.median(backward)}


def resident(field: str) -> int:
    """Bytes of this process in main memory, now (VmRSS) or at most so far (VmHWM). Linux only."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return 1024 * int(line.split()[1])


def in_process(case: list[int], num_threads: int, memory: bool) -> dict[str, float]:
    command = [sys.executable, __file__, "--threads", str(num_threads), "--case", json.dumps(case)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    if memory:
        command.append("--memory")
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--case", type=json.loads, help="agents, particles and time steps of the only case, measured here"
    )
    parser.add_argument("--memory", action="store_true", help="with --case: the memory in place of the times")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(*arguments.case, arguments.threads, arguments.memory)))
        return
    print(f"{arguments.threads} threads, float32; by agent, step and particle: nanoseconds, and bytes at the peak")
    print(f"{'agents':>9}{'particles':>11}{'steps':>7}{'forward ns':>12}{'backward ns':>13}{'seconds':>9}{'bytes':>8}")
    for n_agents, n_particles, n_timesteps in CASES:
        case = [n_agents, n_particles, n_timesteps]
        size = n_agents * n_particles * n_timesteps
        times = in_process(case, arguments.threads, memory=False)
        peak = in_process(case, arguments.threads, memory=True)["bytes"]
        seconds = times["forward"] + times["backward"]
        forward, backward = 1e9 * times["forward"] / size, 1e9 * times["backward"] / size
        print(
            f"{n_agents:>9,}{n_particles:>11}{n_timesteps:>7}{forward:>12.1f}{backward:>13.1f}"
            f"{seconds:>9.3f}{peak / size:>8.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
