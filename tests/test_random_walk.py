"""The random walk."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pyrobirds.simulators import random_walk


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


@pytest.mark.parametrize(
    ("theta", "match"),
    [
        (0.3, "theta must be a tensor of float32 or float64, got a float: pass a tensor"),
        (torch.zeros(2, dtype=torch.bfloat16), r"got torch.bfloat16: use theta.float\(\)"),
    ],
)
def test_theta_is_a_tensor_of_floats(theta: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        random_walk(theta, 5)


def test_any_leading_batch() -> None:
    theta = torch.tensor([[-40.0, 0.0, 40.0]] * 2)
    x = random_walk(theta, 4)
    assert x.shape == (2, 3, 4)
    assert x[:, [0, 2], -1].tolist() == [[-3.0, 3.0]] * 2


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("tau", [0.1, 2.0])
def test_gradient_of_a_walk_is_that_of_its_relaxed_steps(tau: float) -> None:
    """By hand, from the same uniform numbers."""
    theta = torch.randn(5, requires_grad=True)
    weights = torch.randn(5, 8)
    torch.manual_seed(3)
    (gradient,) = torch.autograd.grad((weights * random_walk(theta, 8, tau=tau)).sum(), theta)
    torch.manual_seed(3)
    soft = torch.sigmoid((theta.unsqueeze(-1) + torch.logit(torch.rand(5, 7))) / tau)
    slope = 2 * soft * (1 - soft) / tau
    expected = (weights[:, 1:] * slope.cumsum(-1)).sum(-1)
    assert torch.allclose(gradient, expected, rtol=1e-10)
