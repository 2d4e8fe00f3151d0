"""What a relaxed choice costs, forward and backward, against Gumbel-softmax, torch's and Pyro's relaxed distributions.

All are timed in turn in one process, so that a drift of the machine's speed hits all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import gumbel_softmax

from pyrobirds.simulators.relaxations import bernoulli, categorical

TAU = 0.1
OURS = "ours"


def straight_through(soft: Tensor) -> Tensor:
    return soft.round() + (soft - soft.detach())


def two_classes(n: int) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """By name, the argument and the function that draws n choices from it."""
    tau = torch.tensor(TAU)
    logits, probs, pairs = torch.randn(n), torch.rand(n), torch.randn(n, 2)
    return {
        OURS: (logits, lambda x: bernoulli(logits=x, tau=TAU)),
        "ours, of probs": (probs, lambda p: bernoulli(p, tau=TAU)),
        "torch RelaxedBernoulli, by hand": (
            logits,
            lambda x: straight_through(
                torch.distributions.RelaxedBernoulli(tau, logits=x, validate_args=False).rsample()
            ),
        ),
        "Pyro RelaxedBernoulliStraightThrough": (
            logits,
            lambda x: dist.RelaxedBernoulliStraightThrough(tau, logits=x, validate_args=False).rsample(),
        ),
        "... of probs": (
            probs,
            lambda p: dist.RelaxedBernoulliStraightThrough(tau, probs=p, validate_args=False).rsample(),
        ),
        "gumbel_softmax of two classes": (pairs, lambda x: gumbel_softmax(x, tau=TAU, hard=True)),
    }


def five_classes(n: int) -> dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]]:
    tau, logits = torch.tensor(TAU), torch.randn(n, 5)
    return {
        OURS: (logits, lambda x: categorical(logits=x, tau=TAU)),
        "ours, of probs": (logits.softmax(-1), lambda p: categorical(p, tau=TAU)),
        "Pyro RelaxedOneHotCategoricalStraightThrough": (
            logits,
            lambda x: dist.RelaxedOneHotCategoricalStraightThrough(tau, logits=x, validate_args=False).rsample(),
        ),
        "gumbel_softmax": (logits, lambda x: gumbel_softmax(x, tau=TAU, hard=True)),
    }


def bytes_kept(argument: Tensor, draw: Callable[[Tensor], Tensor]) -> int:
    """For the backward pass, beside the argument itself."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        drawn = draw(argument)
    kept.pop(argument.untyped_storage().data_ptr(), None)
    return sum(kept.values()) if drawn.requires_grad else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="how often each is timed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    print(f"forward and backward, float32, one thread; medians of {arguments.rounds} alternating rounds")
    print(f"{'choice':<21}{'':<46}{'ns a choice':>12}{'ratio':>8}{'no gradient':>13}{'bytes kept':>12}")
    for (problem, make), n in [
        (p, n) for p in (("0 or 1", two_classes), ("5 classes", five_classes)) for n in (10**3, 10**5)
    ]:
        repeats = 2 * 10**5 // n
        ways = {name: (argument.requires_grad_(), draw) for name, (argument, draw) in make(n).items()}
        weights = {name: torch.randn_like(draw(argument)) for name, (argument, draw) in ways.items()}
        both: dict[str, list[float]] = {name: [] for name in ways}
        forward: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds + 1):
            for name, (argument, draw) in ways.items():
                start = time.perf_counter()
                for _ in range(repeats):
                    torch.autograd.grad(draw(argument), argument, weights[name])
                both[name].append((time.perf_counter() - start) / repeats / n)
            for name, (argument, draw) in ways.items():
                start = time.perf_counter()
                with torch.no_grad():
                    for _ in range(repeats):
                        draw(argument)
                forward[name].append((time.perf_counter() - start) / repeats / n)
        for name, (argument, draw) in ways.items():
            # The first round warms up.
            ratio, ratio_forward = (
                statistics.median(a / b for a, b in zip(times[name][1:], times[OURS][1:], strict=True))
                for times in (both, forward)
            )
            print(
                f"{f'{n} of {problem}':<21}{name:<46}{1e9 * statistics.median(both[name][1:]):>12.1f}{ratio:>8.1f}"
                f"{ratio_forward:>13.1f}{bytes_kept(argument, draw) / n:>12.0f}"
            )


if __name__ == "__main__":
    main()
