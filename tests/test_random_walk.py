"""The random walk and the relaxation below it."""

from __future__ import annotations

import math

import pytest
import torch

from pyrobirds.simulators import random_walk, relaxations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_law_the_walk_of_the_closed_form(dtype: torch.dtype) -> None:
    """Means t(2p-1), variances 4tp(1-p), covariance of times s < t that of s: by 5 standard errors."""
    n, T = 40_000, 30
    theta = torch.full((n,), -0.7, dtype=dtype)
    x = random_walk(theta, T)
    assert x.dtype == dtype
    p, t = torch.sigmoid(theta[0]), torch.arange(T, dtype=dtype)
    variance = 4 * t * p * (1 - p)
    assert ((x.mean(0) - t * (2 * p - 1)).abs() <= 5 * (variance / n).sqrt() + 1e-5).all()
    # A walk is near normal at large t; its fourth central moment is below 3 variance^2 + variance.
    standard_error = ((2 * variance**2 + 4 * variance) / n).sqrt()
    assert ((x.var(0) - variance).abs() <= 5 * standard_error + 1e-5).all()
    covariance = torch.cov(x[:, [10, 25]].T)[0, 1]
    assert abs(float(covariance - variance[10])) < 5 * math.sqrt(float(variance[10] * variance[25]) * 2 / n)


def test_steps_are_one_and_start_at_zero() -> None:
    x = random_walk(torch.randn(50), 40)
    assert (x[:, 0] == 0).all()
    assert (x.diff().abs() == 1).all()
    assert random_walk(torch.zeros(3), 1).tolist() == [[0.0]] * 3


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"n_timesteps": 0}, ValueError, "n_timesteps must be at least 1, got 0"),
        ({"n_timesteps": 2.5}, TypeError, "n_timesteps must be a whole number"),
        ({"n_timesteps": 5, "tau": 0.0}, ValueError, "tau must be a finite number above 0, got 0.0"),
        ({"n_timesteps": 5, "tau": "hot"}, TypeError, "tau must be a number above 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        random_walk(torch.zeros(2), **arguments)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_gradient_of_a_choice_is_that_of_the_relaxed_one(tau: float) -> None:
    """d/dlogits sigmoid((logits + noise) / tau), by hand from the same uniform numbers."""
    logits = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(5)
    draws = relaxations.bernoulli(logits, tau)
    (gradient,) = torch.autograd.grad(draws.sum(), logits)
    torch.manual_seed(5)
    soft = torch.sigmoid((logits + torch.logit(torch.rand(1000, dtype=torch.float64))) / tau)
    assert torch.allclose(gradient, soft * (1 - soft) / tau, rtol=1e-9, atol=1e-12)
    assert torch.equal(draws.detach(), (soft > 0.5).double())


def test_choices_at_the_ends_have_finite_gradients() -> None:
    logits = torch.tensor([-1e4, -100.0, 100.0, 1e4], requires_grad=True)
    draws = relaxations.bernoulli(logits.repeat(1000), tau=0.1)
    assert draws.reshape(1000, 4).mean(0).tolist() == [0, 0, 1, 1]
    assert torch.autograd.grad(draws.sum(), logits)[0].isfinite().all()


def test_choices_have_their_probabilities() -> None:
    n = 100_000
    p = torch.tensor([0.01, 0.3, 0.5, 0.9])
    share = relaxations.bernoulli(torch.logit(p).expand(n, 4), tau=0.5).mean(0)
    assert ((share - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_temperature_of_a_choice_is_checked() -> None:
    with pytest.raises(ValueError, match="tau must be a finite number above 0, got 0"):
        relaxations.bernoulli(torch.zeros(2), tau=0)
