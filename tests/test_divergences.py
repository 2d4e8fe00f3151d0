"""Divergences by themselves: the interface that they share."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pyrobirds.divergences import KL, Divergence

PAIRS = {
    "Normal": (dist.Normal(torch.tensor([1.0, -0.5]), torch.tensor([0.5, 2.0])), dist.Normal(torch.zeros(2), 1.5)),
    "MultivariateNormal": (
        dist.MultivariateNormal(torch.tensor([1.0, 0.0]), torch.tensor([[1.0, 0.6], [0.6, 2.0]])),
        dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, -0.3], [-0.3, 1.0]])),
    ),
    "Gamma": (dist.Gamma(2.0, 3.0), dist.Gamma(1.5, 1.0)),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_exact_and_estimated_kl(pair: str) -> None:
    q, p = PAIRS[pair]
    expected = kl_divergence(q, p)
    torch.testing.assert_close(KL().exact(q, p), expected)
    n = 20_000
    z = q.sample((n,))
    log_q, log_p = (d.log_prob(z).reshape(n, -1).sum(1) for d in (q, p))
    standard_error = (log_q - log_p).std() / n**0.5
    assert abs(KL().estimate(log_q, log_p) - expected.sum()) < 5 * standard_error


def test_no_closed_form_is_none_and_no_guess() -> None:
    assert KL().exact(dist.Normal(0.0, 1.0), dist.Laplace(0.0, 1.0)) is None
    assert KL().exact(dist.StudentT(3.0), dist.Normal(0.0, 1.0)) is None


def test_a_divergence_of_ones_own_needs_one_method() -> None:
    class Absolute(Divergence):
        def estimate(self, log_q: Tensor, log_p: Tensor) -> Tensor:
            return (log_q - log_p).abs().mean()

    assert Absolute().estimate(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])) == 1.5
    assert Absolute().exact(dist.Normal(0.0, 1.0), dist.Normal(0.0, 1.0)) is None
    with pytest.raises(TypeError, match="abstract"):
        Divergence()


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"analytic": 1}, TypeError, "analytic must be True or False, got 1"),
        ({"num_particles": 0}, ValueError, "num_particles must be at least 1, got 0"),
        ({"num_particles": 2.5}, TypeError, "num_particles must be a whole number of at least 1, got 2.5"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        KL(**arguments)
