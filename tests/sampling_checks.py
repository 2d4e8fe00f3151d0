"""Repeated evaluations of an ELBO, and whether their mean is an exact value within its standard error."""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor

from pyrobirds import GeneralizedELBO

# Standard errors allowed between a mean and what it should be. With the hundred or so repetitions used here a Student-t
# variable exceeds it once in 300,000 times, and seeds are fixed.
ALLOWED = 5.0


class Sample(NamedTuple):
    """Totals and divergences, shape (repetitions,), and gradients by parameter, shape (repetitions, *parameter)."""

    totals: Tensor
    divergences: Tensor
    gradients: dict[str, Tensor]


def parameters() -> dict[str, Tensor]:
    """The unconstrained parameters in Pyro's store, by name."""
    return dict(sorted(pyro.get_param_store().named_parameters()))


def randomise(amount: float = 0.4) -> None:
    """Move every parameter in Pyro's store away from where it started."""
    with torch.no_grad():
        for parameter in parameters().values():
            parameter.add_(amount * torch.randn_like(parameter))


def repeat(
    elbo: ELBO, model: Callable, guide: Callable, *args: object, repetitions: int = 100, first_seed: int = 0
) -> Sample:
    """Evaluate value and gradient under as many seeds."""
    totals, divergences = [], []
    gradients: dict[str, list[Tensor]] = {name: [] for name in parameters()}
    for seed in range(first_seed, first_seed + repetitions):
        pyro.set_rng_seed(seed)
        for parameter in parameters().values():
            parameter.grad = None
        totals.append(elbo.loss_and_grads(model, guide, *args))
        divergences.append(elbo.terms.divergence if isinstance(elbo, GeneralizedELBO) else torch.tensor(math.nan))
        for name, parameter in parameters().items():
            gradients[name].append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone())
    return Sample(
        torch.tensor(totals), torch.stack(divergences), {name: torch.stack(g) for name, g in gradients.items()}
    )


def exact_gradients(value: Tensor) -> dict[str, Tensor]:
    """The gradient of a scalar with respect to every parameter in Pyro's store."""
    gradients = torch.autograd.grad(value, list(parameters().values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for (name, parameter), gradient in zip(parameters().items(), gradients, strict=True)
    }


def standard_errors_away(sample: Tensor, expected: Tensor) -> float:
    """The largest distance, over elements, between the mean of a sample and what is expected, in standard errors."""
    distance = (sample.mean(0) - expected).abs()
    standard_error = sample.std(0) / math.sqrt(len(sample))
    # An element without variance has to agree to rounding error.
    rounding = 1e-9 * (1 + expected.abs())
    return ((distance - rounding).clamp(min=0) / (standard_error + 1e-300)).max().item()


def assert_unbiased(sample: Sample, total: Tensor) -> None:
    """The sample's mean value and gradients are those of the exact `total`."""
    away = {"value": standard_errors_away(sample.totals, total.detach())}
    for name, gradient in exact_gradients(total).items():
        away[name] = standard_errors_away(sample.gradients[name], gradient)
    assert max(away.values()) < ALLOWED, away


def assert_exact(sample: Sample, total: Tensor) -> None:
    """Every repetition has the same value and gradients, to the last bit, and they are those of the exact `total`."""
    assert (sample.totals == sample.totals[0]).all()
    torch.testing.assert_close(sample.totals[0], total.detach(), rtol=1e-9, atol=1e-11)
    for name, gradient in exact_gradients(total).items():
        assert (sample.gradients[name] == sample.gradients[name][0]).all(), name
        torch.testing.assert_close(
            sample.gradients[name][0], gradient, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


def assert_varies(sample: Sample) -> None:
    """No two repetitions have the same divergence, as Monte Carlo over a continuous latent gives."""
    assert sample.divergences.unique().numel() == len(sample.divergences)
