"""The simulator of independent normal values, and its model."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive
from pyro.infer.autoguide import AutoNormal
from pyro.optim import ClippedAdam
from scipy import stats

from pyrobirds import GeneralizedELBO, Simulator, losses, models
from pyrobirds.simulators import normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_normal_and_independent(dtype: torch.dtype) -> None:
    """By a Kolmogorov-Smirnov test that fails once in 10^6, and correlations within 5 standard errors."""
    mu, sigma = torch.tensor([[2.0, -100.0]], dtype=dtype), torch.tensor([[0.5, 30.0]], dtype=dtype)
    n = 50_000
    x = normal(mu, sigma, n)
    assert x.shape == (1, 2, n)
    assert x.dtype == dtype
    z = (x - mu.unsqueeze(-1)) / sigma.unsqueeze(-1)
    assert stats.kstest(z.flatten().double().numpy(), "norm").pvalue > 1e-6
    assert ((z[..., 1:] * z[..., :-1]).mean(-1).abs() < 5 / math.sqrt(n)).all()
    assert abs(float((z[:, 0] * z[:, 1]).mean())) < 5 / math.sqrt(n)


@pytest.mark.usefixtures("double_precision")
def test_gradient_is_that_of_the_path() -> None:
    mu, sigma = torch.randn(4, requires_grad=True), torch.rand(4, requires_grad=True)
    weights = torch.randn(4, 9)
    x = normal(mu, sigma, 9)
    by_mu, by_sigma = torch.autograd.grad((weights * x).sum(), (mu, sigma))
    noise = (x.detach() - mu.detach().unsqueeze(-1)) / sigma.detach().unsqueeze(-1)
    assert torch.allclose(by_mu, weights.sum(-1))
    assert torch.allclose(by_sigma, (weights * noise).sum(-1))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_all_tangents_in_one_pass() -> None:
    mu, sigma, tangents = torch.zeros(3), torch.ones(3), torch.eye(2)

    def tangent_of(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.func.jvp(lambda m, s: normal(m, s, 5), (mu, sigma), (t[0].expand(3), t[1].expand(3)))

    values, derivatives = torch.vmap(tangent_of, randomness="same")(tangents)
    assert values[0].equal(values[1])
    assert derivatives[0].equal(torch.ones(3, 5))
    assert torch.allclose(derivatives[1], values[1])


def test_a_sigma_that_is_not_above_zero_is_a_failed_run() -> None:
    mu = torch.zeros(4, requires_grad=True)
    sigma = torch.tensor([1.0, 0.0, -1.0, math.nan], requires_grad=True)
    x = normal(mu, sigma, 6)
    assert x.isnan().all(-1).tolist() == [False, True, True, True]
    score = Simulator(normal, losses.mse, n_timesteps=6)(mu, sigma).log_prob(torch.zeros(6))
    assert score.isnan().tolist() == [False, True, True, True]
    score.nansum().backward()
    for parameter in (mu, sigma):
        assert parameter.grad is not None
        assert (parameter.grad != 0).tolist() == [True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_nan_in_the_far_tails_of_the_prior(dtype: torch.dtype) -> None:
    """100,000 draws from priors five times as wide; gradients too."""
    mu = (5 * torch.randn(100_000, dtype=dtype)).requires_grad_()
    sigma = torch.exp(5 * torch.randn(100_000, dtype=dtype)).requires_grad_()
    assert float(sigma.detach().max()) > 1e8
    x = normal(mu, sigma, 20)
    assert x.isfinite().all()
    loss = losses.mse(x, torch.zeros_like(x))
    assert loss.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.sum(), (mu, sigma)))


@pytest.mark.parametrize(
    ("shapes", "n_timesteps", "error", "match"),
    [
        (
            ((2,), (3,)),
            5,
            ValueError,
            r"normal: mu has shape \(2,\) and sigma has shape \(3,\); both must be \(\*batch,\)",
        ),
        (((2,), ()), 5, ValueError, r"sigma has shape \(\); both must be \(\*batch,\): expand them yourself"),
        (((2,), (2,)), 0, ValueError, "n_timesteps must be at least 1, got 0"),
        (((2,), (2,)), 2.5, TypeError, "n_timesteps must be a whole number"),
    ],
)
def test_bad_arguments(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], n_timesteps: int, error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        normal(torch.zeros(shapes[0]), torch.ones(shapes[1]), n_timesteps)


def test_parameters_may_be_numbers() -> None:
    both = [normal(2, 0.5, 4), normal(torch.tensor(2.0), torch.tensor(0.5), 4)]
    one = torch.full((3,), 2.0, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    several = [normal(*one, 4), normal(2.0, one[1], 4), normal(one[0], 0.5, 4)]
    assert [x.shape for x in both + several] == [(4,)] * 2 + [(3, 4)] * 3
    assert {x.dtype for x in several} == {torch.float64}
    for call in (lambda: normal(2, 0.5, 4), lambda: normal(2.0, one[1], 4), lambda: normal(one[0], 0.5, 4)):
        torch.manual_seed(1)
        x = call()
        torch.manual_seed(1)
        expected = normal(*one, 4) if x.dtype == torch.float64 else normal(torch.tensor(2.0), torch.tensor(0.5), 4)
        assert torch.equal(x, expected)
    assert normal(0.0, -1.0, 3).isnan().all()


@pytest.mark.parametrize(
    ("mu", "sigma", "error", "match"),
    [
        ("a", 1.0, TypeError, "mu must be a number, got 'a'"),
        (0.0, math.inf, ValueError, "sigma must be a finite number, got inf"),
        (torch.zeros(2), [1.0, 1.0], TypeError, r"sigma must be a number, got \[1.0, 1.0\]"),
        (
            torch.zeros(2).half(),
            1.0,
            TypeError,
            "mu must be of float32 or float64, got torch.float16: use mu",
        ),
        (
            torch.zeros(2),
            torch.ones(2).bfloat16(),
            TypeError,
            "sigma must be of float32 or float64, got torch.bf",
        ),
    ],
)
def test_bad_parameters(mu: Any, sigma: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        normal(mu, sigma, 5)


def test_sites_of_the_model() -> None:
    trace = poutine.trace(models.normal).get_trace(n_timesteps=7)
    assert [site for site in trace.stochastic_nodes if site != "_INPUT"] == ["mu", "sigma", "x"]
    assert isinstance(trace.nodes["mu"]["fn"], dist.Normal)
    assert isinstance(trace.nodes["sigma"]["fn"], dist.LogNormal)
    assert trace.nodes["x"]["value"].shape == (7,)
    assert trace.nodes["x"]["infer"]["event_dims"] == ["time"]


def test_prior_predictive_of_the_model() -> None:
    """Var x = Var mu + E sigma^2 = 1 + e^2; the logarithm of the scale is standard normal, as mu is."""
    draws = Predictive(models.normal, num_samples=20_000, parallel=True)(n_timesteps=2)
    assert draws["x"].shape == (20_000, 2)
    assert stats.kstest(draws["mu"].flatten().numpy(), "norm").pvalue > 1e-6
    assert stats.kstest(draws["sigma"].log().flatten().numpy(), "norm").pvalue > 1e-6
    z = (draws["x"] - draws["mu"].reshape(-1, 1)) / draws["sigma"].reshape(-1, 1)
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-6


def test_the_default_loss_finds_mean_and_standard_deviation() -> None:
    """Within 5 standard errors of those of the sample, about 0.1 and 5%; the mean squared error finds a sigma near 0.

    (For 100 normal values the MMD's estimates scatter around the sample's by about half as much as these do.)
    """
    y = 0.5 + 2 * torch.randn(100)
    ends = {}
    for name, loss, w in (("default", {}, 1e-3), ("mse", {"loss": losses.mse}, 1e-2)):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = AutoNormal(models.normal, init_scale=0.1)
        svi = SVI(models.normal, guide, ClippedAdam({"lr": 0.05, "lrd": 0.05 ** (1 / 300)}), GeneralizedELBO(w=w))
        for _ in range(300):
            svi.step(y, **loss)
        ends[name] = guide.median()
    assert abs(float(ends["default"]["mu"] - y.mean())) < 0.5
    assert abs(float(ends["default"]["sigma"] / y.std()) - 1) < 0.25
    assert float(ends["mse"]["sigma"]) < 0.5
