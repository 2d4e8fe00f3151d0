"""SVI with GeneralizedELBO(w), and Trace_ELBO on tempered(model, w), reach posteriors that are known in closed form.

Under the divergence KL the optimum is prior * likelihood^(1/w). With Gaussian priors, likelihoods and a full Gaussian
guide it is in the guide's family, so that the guide can be compared with it parameter by parameter.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import ELBO, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import Tensor

from pyrobirds import GeneralizedELBO, tempered
from pyrobirds.divergences import KL

pytestmark = pytest.mark.usefixtures("double_precision")


class Conjugate(NamedTuple):
    """A Gaussian model with data, its guide, and the natural parameters of prior and likelihood over the latents."""

    model: Callable[[Tensor], object]
    y: Callable[[], Tensor]
    guide: Callable[[Callable], Callable]
    natural: Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]  # precision, shift of prior; of likelihood


def normal_normal(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.5, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, 1.5), obs=y)


def normal_natural(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    precision = torch.tensor([[1 / 2.0**2]])
    of_data = torch.tensor([[len(y) / 1.5**2]])
    return precision, torch.tensor([0.5 / 2.0**2]), of_data, y.sum()[None] / 1.5**2


def covariates() -> Tensor:
    x = torch.linspace(-1, 1, 12)
    return torch.stack([torch.ones(12), 1.5 * x, 2 * x**2 - 0.5], dim=1)


def regression(y: Tensor) -> None:
    beta = pyro.sample("beta", dist.Normal(torch.zeros(3), torch.tensor([2.0, 1.0, 0.5])).to_event(1))
    mean = (beta * covariates()).sum(-1)  # particles, if any, are left of a dimension of 1 that the data take
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 0.8), obs=y)


def regression_natural(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = covariates()
    return torch.diag(torch.tensor([0.25, 1.0, 4.0])), torch.zeros(3), x.T @ x / 0.8**2, x.T @ y / 0.8**2


def hierarchy(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.3, 1.5))
    with pyro.plate("units", 3, dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 0.8))
        with pyro.plate("repeats", 5, dim=-2):
            pyro.sample("y", dist.Normal(theta, 1.2), obs=y)


def hierarchy_natural(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    covariance = torch.full((4, 4), 1.5**2)
    covariance[1:, 1:] += 0.8**2 * torch.eye(3)
    precision = torch.linalg.inv(covariance)
    of_data = torch.diag(torch.tensor([0.0, 1.0, 1.0, 1.0])) * 5 / 1.2**2
    return precision, precision @ torch.full((4,), 0.3), of_data, torch.cat([torch.zeros(1), y.sum(0) / 1.2**2])


PROBLEMS: dict[str, Conjugate] = {
    "Normal-Normal": Conjugate(
        normal_normal, lambda: torch.tensor([1.4, 0.2, 2.9, 1.1, 0.6]), AutoNormal, normal_natural
    ),
    "regression": Conjugate(
        regression,
        lambda: covariates() @ torch.tensor([0.5, -1.0, 0.7]) + 0.8 * torch.sin(7 * torch.arange(12.0)),
        AutoMultivariateNormal,
        regression_natural,
    ),
    "hierarchy": Conjugate(
        hierarchy,
        lambda: torch.tensor([1.0, -0.5, 2.0]) + 1.2 * torch.sin(7 * torch.arange(15.0)).reshape(5, 3),
        AutoMultivariateNormal,
        hierarchy_natural,
    ),
}


def tempered_posterior(problem: Conjugate, w: float) -> tuple[Tensor, Tensor]:
    """Mean and covariance of prior * likelihood^(1/w), normalised."""
    precision, shift, of_data, shift_of_data = problem.natural(problem.y())
    posterior = precision + of_data / w
    mean = torch.linalg.solve(posterior, shift + shift_of_data / w)
    return mean, torch.linalg.inv(posterior)


def moments(guide: Callable) -> tuple[Tensor, Tensor]:
    if isinstance(guide, AutoNormal):
        loc, scale = guide._get_loc_and_scale("theta")
        return loc.detach().reshape(1), (scale.detach() ** 2).reshape(1, 1)
    root = (guide.scale[:, None] * guide.scale_tril).detach()
    return guide.loc.detach(), root @ root.T


def kl_between(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    return torch.distributions.kl_divergence(
        dist.MultivariateNormal(mean, covariance), dist.MultivariateNormal(other_mean, other_covariance)
    ).item()


def train(model: Callable, guide: Callable, elbo: ELBO, y: Tensor, steps: int) -> None:
    """SVI by Adam, with a rate that falls a hundredfold in the second half, so that the last iterate is an average."""
    adam = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1, "betas": (0.9, 0.99)}}
    optim = pyro.optim.ExponentialLR(adam | {"gamma": 0.01 ** (2 / steps)})
    svi = SVI(model, guide, optim, elbo)
    for step in range(steps):
        svi.step(y)
        if step > steps // 2:
            optim.step()


WEIGHTS = [0.25, 1.0, 8.0]


@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("route", ["GeneralizedELBO", "GeneralizedELBO without closed forms", "tempered"])
def test_the_tempered_posterior_is_reached(route, problem, w):
    problem = PROBLEMS[problem]
    y = problem.y()
    keywords = {"num_particles": 400, "vectorize_particles": True}
    model, elbo = {
        "GeneralizedELBO": lambda: (problem.model, GeneralizedELBO(w, **keywords)),
        "GeneralizedELBO without closed forms": lambda: (
            problem.model,
            GeneralizedELBO(w, divergence=KL(analytic=False), **keywords),
        ),
        "tempered": lambda: (tempered(problem.model, w), Trace_ELBO(**keywords)),
    }[route]()
    guide = problem.guide(model)
    train(model, guide, elbo, y, steps=400)
    mean, covariance = tempered_posterior(problem, w)
    got = moments(guide)
    # The falling rate averages over about the last 100 steps: 40,000 draws. An estimate of d parameters from n draws
    # has KL = d / 2n, here at most 14 / 80,000 = 2e-4; the tolerance is five times that.
    assert kl_between(*got, mean, covariance) < 1e-3
    # Under a weight that is wrong by half, KL would be ten to a hundred times the tolerance.
    for other in (w / 1.5, w * 1.5):
        other_mean, other_covariance = tempered_posterior(problem, other)
        assert kl_between(*got, other_mean, other_covariance) > 8e-3


@pytest.mark.parametrize("w", WEIGHTS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_objective_at_the_posterior_is_minus_w_log_evidence(problem, w):
    problem = PROBLEMS[problem]
    y = problem.y()
    mean, covariance = tempered_posterior(problem, w)
    root = torch.linalg.cholesky(covariance)
    guide = AutoMultivariateNormal(problem.model)
    guide(y)
    guide.loc = torch.nn.Parameter(mean)
    guide.scale = root.diagonal()
    guide.scale_tril = root / root.diagonal()[:, None]

    # -w log of the integral of prior * likelihood^(1/w), from any one point: log joint - log posterior is constant.
    at = mean + torch.linspace(-1, 1, len(mean))
    trace = poutine.trace(poutine.condition(tempered(problem.model, w), unpacked(guide, at))).get_trace(y)
    evidence = trace.log_prob_sum() - dist.MultivariateNormal(mean, covariance).log_prob(at)

    # There log q = log posterior, so without closed forms every particle gives the objective without error.
    elbo = GeneralizedELBO(w, num_particles=20, divergence=KL(analytic=False))
    assert elbo.loss(problem.model, guide, y) == pytest.approx(-w * evidence.item(), rel=1e-9)
    # Closed forms take that coupling apart, and leave the loss's own noise.
    elbo = GeneralizedELBO(w, num_particles=200)
    totals = torch.tensor([elbo.loss(problem.model, guide, y) for _ in range(50)])
    assert abs(totals.mean() + w * evidence) < 5 * totals.std() / 50**0.5 + 1e-9


def unpacked(guide: AutoMultivariateNormal, latent: Tensor) -> dict[str, Tensor]:
    return {site["name"]: value for site, value in guide._unpack_latent(latent)}


# ---- tempered -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("w", [0.25, 1, 8.0])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_tempered_log_joint_is_prior_plus_likelihood_over_w(problem, w):
    problem = PROBLEMS[problem]
    y = problem.y()
    plain = poutine.trace(problem.model).get_trace(y)
    cooled = poutine.trace(poutine.replay(tempered(problem.model, w), trace=plain)).get_trace(y)
    plain.compute_log_prob()
    cooled.compute_log_prob()
    for name in plain.stochastic_nodes:
        assert torch.equal(cooled.nodes[name]["log_prob"], plain.nodes[name]["log_prob"]), name
    assert plain.observation_nodes == cooled.observation_nodes == ["y"]
    torch.testing.assert_close(cooled.nodes["y"]["log_prob"], plain.nodes["y"]["log_prob"] / w, rtol=1e-14, atol=0)
    prior = sum(plain.nodes[name]["log_prob_sum"] for name in plain.stochastic_nodes)
    torch.testing.assert_close(cooled.log_prob_sum(), prior + plain.nodes["y"]["log_prob_sum"] / w)


def test_every_kind_of_observed_site_is_tempered_and_nothing_else():
    def mixed(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.deterministic("twice", 2 * theta)
        pyro.factor("f", -theta)
        with pyro.plate("data", 4, subsample_size=2) as rows, poutine.scale(scale=3.0):
            pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y[rows])

    y = torch.arange(4.0)
    plain = poutine.trace(mixed).get_trace(y)
    cooled = poutine.trace(poutine.replay(tempered(mixed, 5.0), trace=plain)).get_trace(y)
    plain.compute_log_prob()
    cooled.compute_log_prob()
    for name, divisor in {"theta": 1, "z": 1, "f": 5, "y": 5, "twice": 5}.items():
        expected = plain.nodes[name]["log_prob"] / divisor
        torch.testing.assert_close(cooled.nodes[name]["log_prob"], expected, rtol=1e-14, atol=0)
    assert plain.nodes["y"]["scale"] == 6.0
    assert cooled.nodes["y"]["scale"] == pytest.approx(6.0 / 5.0)


def test_a_conditioned_model_is_tempered():
    def prior() -> None:
        theta = pyro.sample("theta", dist.Normal(0.5, 2.0))
        pyro.sample("y", dist.Normal(theta, 1.5))

    data = {"y": torch.tensor(1.3)}
    trace = poutine.trace(tempered(poutine.condition(prior, data), 4.0)).get_trace()
    expected = dist.Normal(trace.nodes["theta"]["value"], 1.5).log_prob(data["y"]) / 4
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], expected)
    torch.testing.assert_close(
        trace.nodes["theta"]["log_prob"], dist.Normal(0.5, 2.0).log_prob(trace.nodes["theta"]["value"])
    )


def test_tempering_twice_multiplies():
    def model() -> None:
        pyro.sample("y", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))

    trace = poutine.trace(tempered(tempered(model, 2.0), 3.0)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), dist.Normal(0.0, 1.0).log_prob(torch.tensor(1.0)) / 6)


def test_arguments_and_results_pass_through():
    def model(a: float, *, b: float) -> float:
        return a + b

    assert tempered(model, 2.0)(1.0, b=0.5) == 1.5


@pytest.mark.parametrize(
    ("w", "error", "message"),
    [
        (0, ValueError, r"w must be a finite number above 0, got 0"),
        (-1.0, ValueError, r"w must be .*got -1\.0"),
        (math.nan, ValueError, r"w must be .*got nan"),
        (math.inf, ValueError, r"w must be .*got inf"),
        ("2", TypeError, r"w must be a number.*got '2'"),
        (True, TypeError, r"w must be a number.*got True"),
        (lambda step: 1.0, TypeError, r"w must be a number"),
    ],
)
def test_wrong_weights_of_tempered(w, error, message):
    with pytest.raises(error, match=message):
        tempered(normal_normal, w)
