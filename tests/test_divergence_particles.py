"""KL(num_particles=K): the divergence from particles of its own, without scoring the data a second time."""

from collections.abc import Callable
from typing import ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from sampling_checks import ALLOWED, assert_exact, assert_unbiased, randomise, repeat, standard_errors_away
from torch import Tensor
from torch.distributions import constraints

from pyrobirds import GeneralizedELBO
from pyrobirds.divergences import KL

pytestmark = pytest.mark.usefixtures("double_precision")


class Lazy(dist.TorchDistribution):
    """A site whose work is done when it is scored, as a Simulator's is; it keeps a list of the batches it scored."""

    arg_constraints: ClassVar = {"theta": constraints.real}
    support = constraints.real
    scored: ClassVar[list[torch.Size]] = []
    drawn: ClassVar[list[torch.Size]] = []

    def __init__(self, theta: Tensor) -> None:
        self.theta = theta
        super().__init__(theta.shape)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> "Lazy":
        return Lazy(self.theta.expand(batch_shape))

    def log_prob(self, y: Tensor) -> Tensor:
        Lazy.scored.append(self.batch_shape)
        return -((y - self.theta) ** 2) / 2

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        Lazy.drawn.append(self.batch_shape)
        return self.theta.detach().expand(tuple(sample_shape) + tuple(self.batch_shape))


@pytest.fixture(autouse=True)
def empty_counters() -> None:
    Lazy.scored.clear()
    Lazy.drawn.clear()


def model() -> None:
    theta = pyro.sample("theta", dist.Normal(0.5, 1.2))
    pyro.sample("y", Lazy(theta), obs=torch.tensor(0.7))


def plated_model() -> None:
    mu = pyro.sample("mu", dist.Normal(0.5, 1.2))
    with pyro.plate("outer", 2, dim=-2):
        a = pyro.sample("a", dist.Laplace(mu, 1.0))
        with pyro.plate("inner", 3, dim=-1):
            b = pyro.sample("b", dist.Normal(a, 0.7))
            pyro.sample("y", Lazy(b), obs=torch.tensor([[0.7, 0.1, -0.4], [1.2, 0.3, 0.0]]))


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize("method", ["loss", "loss_and_grads", "differentiable_loss"])
def test_the_data_are_scored_once_per_particle_of_the_loss(method, analytic):
    guide = AutoNormal(model)
    guide()
    elbo = GeneralizedELBO(num_particles=3, divergence=KL(analytic=analytic, num_particles=50), max_plate_nesting=0)
    for evaluations in (1, 2):
        getattr(elbo, method)(model, guide)
        assert Lazy.scored == [torch.Size([3])] * evaluations
    assert Lazy.drawn == []


@pytest.mark.parametrize("analytic", [False, True])
def test_a_loop_over_particles_scores_the_data_as_often_as_the_loss_has_particles(analytic):
    guide = AutoNormal(model)
    guide()
    divergence = KL(analytic=analytic, num_particles=9)
    elbo = GeneralizedELBO(num_particles=2, vectorize_particles=False, divergence=divergence)
    elbo.loss_and_grads(model, guide)
    assert Lazy.scored == [torch.Size([])] * 2
    assert Lazy.drawn == []


def test_plates_are_scored_once_too():
    guide = AutoNormal(plated_model)
    guide()
    elbo = GeneralizedELBO(num_particles=3, divergence=KL(num_particles=50), max_plate_nesting=2)
    elbo.loss_and_grads(plated_model, guide)
    assert Lazy.scored == [torch.Size([3, 2, 3])]


@pytest.mark.parametrize("extra", [None, 20])
def test_guessing_the_plate_nesting_scores_the_data_once_more(extra):
    # Pyro itself does that, on the first evaluation only and under validation only, to check shapes.
    guide = AutoNormal(model)
    guide()
    elbo = GeneralizedELBO(num_particles=3, divergence=KL(num_particles=extra))
    for _ in range(3):
        elbo.loss_and_grads(model, guide)
    assert Lazy.scored == [torch.Size([])] + [torch.Size([3])] * 3
    with pyro.validation_enabled(False):
        Lazy.scored.clear()
        elbo = GeneralizedELBO(num_particles=3, divergence=KL(num_particles=extra))
        elbo.loss_and_grads(model, guide)
        assert Lazy.scored == [torch.Size([3])]


@pytest.mark.parametrize("extra", [1, 20])
def test_one_particle_for_the_loss(extra):
    guide = AutoNormal(plated_model)
    guide()
    elbo = GeneralizedELBO(num_particles=1, divergence=KL(num_particles=extra), max_plate_nesting=2)
    elbo.loss_and_grads(plated_model, guide)
    assert Lazy.scored == [torch.Size([2, 3])]


def gaussian_reference(guide: AutoMultivariateNormal) -> tuple[Tensor, Tensor]:
    """Loss and KL of a joint Gaussian over (mu, theta) in the hierarchy below."""
    root = guide.scale[:, None] * guide.scale_tril
    covariance, mean = root @ root.T, guide.loc
    prior = torch.full((4, 4), 1.5**2)
    prior[1:, 1:] += 0.8**2 * torch.eye(3)
    kl = torch.distributions.kl_divergence(
        dist.MultivariateNormal(mean, covariance), dist.MultivariateNormal(torch.full((4,), 0.3), prior)
    )
    loss = 0.5 * ((_Y - mean[1:]) ** 2 + covariance.diagonal()[1:]).sum()
    return loss, kl


_Y = torch.tensor([0.7, -0.4, 1.5])


def hierarchy() -> None:
    mu = pyro.sample("mu", dist.Normal(0.3, 1.5))
    with pyro.plate("units", 3, dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, 0.8))
        pyro.sample("y", Lazy(theta), obs=_Y)


@pytest.mark.parametrize("analytic", [False, True])
@pytest.mark.parametrize(
    ("num_particles", "extra", "vectorized"),
    [(1, 50, True), (20, 50, True), (50, 10, True), (50, 1, True), (2, 5, False)],
)
def test_the_expectation_is_unchanged(num_particles, extra, vectorized, analytic):
    guide = AutoMultivariateNormal(hierarchy, init_scale=0.8)
    guide()
    randomise()
    loss, kl = gaussian_reference(guide)
    elbo = GeneralizedELBO(
        w=2.5,
        num_particles=num_particles,
        vectorize_particles=vectorized,
        divergence=KL(analytic=analytic, num_particles=extra),
    )
    sample = repeat(elbo, hierarchy, guide)
    assert_unbiased(sample, loss + 2.5 * kl)
    assert standard_errors_away(sample.divergences, 2.5 * kl.detach()) < ALLOWED


def variance_of_divergence(extra: int | None, guide: Callable, num_particles: int = 2) -> Tensor:
    elbo = GeneralizedELBO(num_particles=num_particles, divergence=KL(analytic=False, num_particles=extra))
    return repeat(elbo, hierarchy, guide, repetitions=250).divergences.var()


def test_the_variance_of_the_divergence_drops_with_its_particles():
    guide = AutoMultivariateNormal(hierarchy, init_scale=0.8)
    guide()
    randomise()
    few, many = variance_of_divergence(None, guide), variance_of_divergence(32, guide)
    # 2 against 32 particles: 16 times. The ratio of two variances from 250 draws each, close to normal (sums of
    # squares of a few Gaussians, kurtosis below 9), has a relative standard error below sqrt(2 * 8 / 250) = 0.25.
    assert 16 / 2 < few / many < 16 * 2


def test_the_loss_keeps_its_own_particles():
    guide = AutoMultivariateNormal(hierarchy, init_scale=0.8)
    guide()
    randomise()
    losses = []
    for extra in (None, 32):
        elbo = GeneralizedELBO(num_particles=2, divergence=KL(num_particles=extra), max_plate_nesting=1)
        pyro.set_rng_seed(3)
        elbo.loss(hierarchy, guide)
        losses.append(elbo.terms.loss)
    assert losses[0] == losses[1]


def test_closed_forms_stay_exact():
    guide = AutoNormal(model)
    guide()
    randomise()
    loc, scale = guide._get_loc_and_scale("theta")
    expected = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.5, 1.2))

    def prior() -> None:
        pyro.sample("theta", dist.Normal(0.5, 1.2))

    assert_exact(repeat(GeneralizedELBO(divergence=KL(num_particles=7)), prior, guide, repetitions=4), expected)


def test_a_body_that_needs_the_drawn_value_still_runs():
    # Only the score of an observed site is left out: a value drawn in the second pass is there for later sites.
    def chained() -> None:
        theta = pyro.sample("theta", dist.Normal(0.5, 1.2))
        y = pyro.sample("y", Lazy(theta), obs=torch.tensor(0.7))
        pyro.sample("z", dist.Normal(theta + y, 1.0))

    guide = AutoNormal(chained)
    guide()
    elbo = GeneralizedELBO(num_particles=3, divergence=KL(num_particles=50), max_plate_nesting=0)
    assert torch.isfinite(torch.tensor(elbo.loss_and_grads(chained, guide)))
    assert Lazy.scored == [torch.Size([3])]
