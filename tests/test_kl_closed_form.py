"""KL(analytic=True): the expectation never changes, closed forms have no variance, and the rest is Monte Carlo."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import autoguide
from sampling_checks import (
    ALLOWED,
    assert_exact,
    assert_unbiased,
    assert_varies,
    randomise,
    repeat,
    standard_errors_away,
)
from torch import Tensor
from torch.distributions import constraints

from pyrobirds import GeneralizedELBO
from pyrobirds.divergences import KL

pytestmark = pytest.mark.usefixtures("double_precision")


# ---- Gaussian priors and what each Gaussian guide makes of them -----------------------------------------------------


def gaussian_kl(mean: Tensor, covariance: Tensor, prior_mean: Tensor, prior_covariance: Tensor) -> Tensor:
    precision = torch.linalg.inv(prior_covariance)
    shift = mean - prior_mean
    log_ratio = torch.logdet(prior_covariance) - torch.logdet(covariance)
    return 0.5 * (torch.trace(precision @ covariance) + shift @ precision @ shift - len(mean) + log_ratio)


def random_covariance(n: int, seed: int) -> Tensor:
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / n + 0.5 * torch.eye(n)


@dataclass(frozen=True)
class Prior:
    """A model without data, and the moments of its latents, flattened in the order of the model."""

    model: Callable[[], object]
    mean: Callable[[], Tensor]
    covariance: Callable[[], Tensor]


def scalar() -> None:
    pyro.sample("theta", dist.Normal(0.5, 2.0))


def vector() -> None:
    pyro.sample("theta", dist.Normal(torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.0, 2.0, 0.5])).to_event(1))


def plated() -> None:
    pyro.sample("mu", dist.Normal(-0.5, 0.7))
    with pyro.plate("outer", 2, dim=-2):
        pyro.sample("u", dist.Normal(0.2, 1.3))
        with pyro.plate("inner", 3, dim=-1):
            pyro.sample("v", dist.Normal(torch.tensor([0.0, 1.0, 2.0]), 0.8))


def joint() -> None:
    pyro.sample("theta", dist.MultivariateNormal(torch.tensor([0.5, -1.0, 2.0]), random_covariance(3, 1)))


def low_rank() -> None:
    factor = torch.tensor([[1.0], [-0.5], [0.7]])
    pyro.sample(
        "theta",
        dist.LowRankMultivariateNormal(torch.tensor([0.5, -1.0, 2.0]), factor, torch.tensor([0.3, 0.6, 1.0])),
    )


def blocks() -> None:
    pyro.sample("matrix", dist.Normal(torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])).to_event(2))
    pyro.sample("vector", dist.MultivariateNormal(torch.ones(2), random_covariance(2, 2)))
    with pyro.plate("rows", 2):
        pyro.sample("pairs", dist.MultivariateNormal(torch.zeros(2), random_covariance(2, 3)))


def hierarchy() -> None:
    mu = pyro.sample("mu", dist.Normal(0.3, 1.5))
    with pyro.plate("units", 3):
        pyro.sample("theta", dist.Normal(mu, 0.8))


def plated_moments() -> tuple[Tensor, Tensor]:
    mean = torch.cat([torch.tensor([-0.5, 0.2, 0.2]), torch.tensor([0.0, 1.0, 2.0]).repeat(2)])
    variance = torch.cat([torch.tensor([0.7]), torch.full((2,), 1.3), torch.full((6,), 0.8)]) ** 2
    return mean, torch.diag(variance)


def blocks_moments() -> tuple[Tensor, Tensor]:
    pair = random_covariance(2, 3)
    blocks = [torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0])), random_covariance(2, 2), pair, pair]
    return torch.cat([torch.zeros(4), torch.ones(2), torch.zeros(4)]), torch.block_diag(*blocks)


def hierarchy_moments() -> tuple[Tensor, Tensor]:
    covariance = torch.full((4, 4), 1.5**2)
    covariance[1:, 1:] += 0.8**2 * torch.eye(3)
    return torch.full((4,), 0.3), covariance


def three() -> Tensor:
    return torch.tensor([0.5, -1.0, 2.0])


PRIORS: dict[str, Prior] = {
    "Normal": Prior(scalar, lambda: torch.tensor([0.5]), lambda: torch.tensor([[4.0]])),
    "Normal.to_event": Prior(vector, three, lambda: torch.diag(torch.tensor([1.0, 4.0, 0.25]))),
    "nested plates": Prior(plated, lambda: plated_moments()[0], lambda: plated_moments()[1]),
    "MultivariateNormal": Prior(joint, three, lambda: random_covariance(3, 1)),
    "LowRankMultivariateNormal": Prior(
        low_rank,
        three,
        lambda: (
            torch.outer(torch.tensor([1.0, -0.5, 0.7]), torch.tensor([1.0, -0.5, 0.7]))
            + torch.diag(torch.tensor([0.3, 0.6, 1.0]))
        ),
    ),
    "blocks": Prior(blocks, lambda: blocks_moments()[0], lambda: blocks_moments()[1]),
    "hierarchy": Prior(hierarchy, lambda: hierarchy_moments()[0], lambda: hierarchy_moments()[1]),
}
INDEPENDENT = [name for name in PRIORS if name != "hierarchy"]


def normal_moments(guide: autoguide.AutoNormal) -> tuple[Tensor, Tensor]:
    moments = [guide._get_loc_and_scale(name) for name in guide.prototype_trace.stochastic_nodes]
    loc, scale = (torch.cat([moment.flatten() for moment in of_sites]) for of_sites in zip(*moments, strict=True))
    return loc, torch.diag(scale**2)


def diagonal_moments(guide: autoguide.AutoDiagonalNormal) -> tuple[Tensor, Tensor]:
    return guide.loc, torch.diag(guide.scale**2)


def multivariate_moments(guide: autoguide.AutoMultivariateNormal) -> tuple[Tensor, Tensor]:
    root = guide.scale[:, None] * guide.scale_tril
    return guide.loc, root @ root.T


def low_rank_moments(guide: autoguide.AutoLowRankMultivariateNormal) -> tuple[Tensor, Tensor]:
    factor = guide.scale[:, None] * guide.cov_factor
    return guide.loc, factor @ factor.T + torch.diag(guide.scale**2)


def structured_moments(guide: autoguide.AutoStructured) -> tuple[Tensor, Tensor]:
    # value of a site = loc + root of its own times noise + weights times the centred values of the sites upstream
    rows: dict[str, dict[str, Tensor]] = {}
    sizes = {name: getattr(guide.locs, name).numel() for name, _ in guide._sorted_sites}
    for name, _ in guide._sorted_sites:
        own = (getattr(guide.scale_trils, name).T * getattr(guide.scales, name)).T
        row = {other: torch.zeros(sizes[name], size) for other, size in sizes.items()} | {name: own}
        for upstream in guide.dependencies.get(name, {}):
            weight = getattr(getattr(guide.deps, name), upstream).weight
            row = {other: block + weight @ rows[upstream][other] for other, block in row.items()}
        rows[name] = row
    order = [name for name in guide.prototype_trace.nodes if name in sizes]
    root = torch.cat([torch.cat([rows[name][other] for other in order], 1) for name in order])
    return torch.cat([getattr(guide.locs, name) for name in order]), root @ root.T


def wide(guide: Callable) -> Callable:
    return partial(guide, init_scale=0.8)


GUIDES: dict[str, tuple[Callable, Callable[..., tuple[Tensor, Tensor]]]] = {
    "AutoNormal": (wide(autoguide.AutoNormal), normal_moments),
    "AutoDiagonalNormal": (wide(autoguide.AutoDiagonalNormal), diagonal_moments),
    "AutoMultivariateNormal": (wide(autoguide.AutoMultivariateNormal), multivariate_moments),
    "AutoLowRankMultivariateNormal": (wide(autoguide.AutoLowRankMultivariateNormal), low_rank_moments),
    "AutoStructured": (wide(autoguide.AutoStructured), structured_moments),
}
JOINT = ["AutoDiagonalNormal", "AutoMultivariateNormal", "AutoLowRankMultivariateNormal"]


def ready(make_guide: Callable, model: Callable, *args: object) -> Callable:
    guide = make_guide(model)
    guide(*args)
    randomise()
    return guide


def gaussian_case(prior: str, guide: str) -> tuple[Callable, Callable, Tensor]:
    make, moments = GUIDES[guide]
    made = ready(make, PRIORS[prior].model)
    return PRIORS[prior].model, made, gaussian_kl(*moments(made), PRIORS[prior].mean(), PRIORS[prior].covariance())


@pytest.mark.parametrize(("num_particles", "vectorized"), [(1, True), (3, True), (2, False)])
@pytest.mark.parametrize("guide", ["AutoNormal", *JOINT])
@pytest.mark.parametrize("prior", INDEPENDENT)
def test_gaussian_guides_over_gaussian_priors_are_exact(prior, guide, num_particles, vectorized):
    model, made, expected = gaussian_case(prior, guide)
    elbo = GeneralizedELBO(num_particles=num_particles, vectorize_particles=vectorized)
    sample = repeat(elbo, model, made, repetitions=4)
    assert_exact(sample, expected)
    torch.testing.assert_close(sample.divergences, sample.totals)


@pytest.mark.parametrize("guide", ["AutoNormal", *JOINT])
@pytest.mark.parametrize("prior", INDEPENDENT)
def test_without_the_closed_form_the_same_guides_are_monte_carlo_of_the_same_expectation(prior, guide):
    model, made, expected = gaussian_case(prior, guide)
    sample = repeat(GeneralizedELBO(divergence=KL(analytic=False), num_particles=100), model, made)
    assert_varies(sample)
    assert_unbiased(sample, expected)


@pytest.mark.parametrize("guide", JOINT)
def test_a_joint_guide_over_a_hierarchy_is_monte_carlo(guide):
    model, made, expected = gaussian_case("hierarchy", guide)
    sample = repeat(GeneralizedELBO(num_particles=100), model, made)
    assert_varies(sample)
    assert_unbiased(sample, expected)


@pytest.mark.parametrize("guide", ["AutoMultivariateNormal", "AutoLowRankMultivariateNormal"])
def test_the_naive_closed_form_of_a_hierarchy_would_be_found_wrong(guide):
    # Site by site, with theta's prior centred at the mu that was drawn, the covariance of mu and theta is lost.
    model, made, expected = gaussian_case("hierarchy", guide)
    covariance = GUIDES[guide][1](made)[1]
    naive = expected + covariance[0, 1:].sum() / 0.8**2
    sample = repeat(GeneralizedELBO(num_particles=100), model, made)
    assert standard_errors_away(sample.totals, naive.detach()) > 2 * ALLOWED


@pytest.mark.parametrize("prior", ["Normal.to_event", "MultivariateNormal", "hierarchy", "nested plates"])
def test_a_structured_guide_is_monte_carlo(prior):
    model, made, expected = gaussian_case(prior, "AutoStructured")
    sample = repeat(GeneralizedELBO(num_particles=100), model, made)
    assert_varies(sample)
    assert_unbiased(sample, expected)


def test_a_mean_field_guide_over_a_hierarchy_is_exact_given_what_was_drawn_before():
    drawn: list[Tensor] = []

    def watched() -> None:
        mu = pyro.sample("mu", dist.Normal(0.3, 1.5))
        drawn.append(mu.detach())
        with pyro.plate("units", 3):
            pyro.sample("theta", dist.Normal(mu, 0.8))

    guide = ready(autoguide.AutoNormal, watched)
    elbo = GeneralizedELBO(num_particles=5, max_plate_nesting=1)
    elbo.loss(watched, guide)  # the first evaluation may run the model more than once; the others do not
    for seed in range(4):
        sample = repeat(elbo, watched, guide, repetitions=1, first_seed=seed)
        (mu_loc, mu_scale), (loc, scale) = (guide._get_loc_and_scale(name) for name in ("mu", "theta"))
        noise = (drawn[-1] - mu_loc.detach()) / mu_scale.detach()
        mu = mu_loc + mu_scale * noise
        of_mu = torch.distributions.kl_divergence(dist.Normal(mu_loc, mu_scale), dist.Normal(0.3, 1.5))
        of_theta = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(mu, 0.8))
        assert of_theta.shape == (5, 3)
        assert_exact(sample, of_mu + of_theta.mean(0).sum())


def test_a_mean_field_guide_over_a_hierarchy_has_the_same_expectation():
    model, made, expected = gaussian_case("hierarchy", "AutoNormal")
    closed = repeat(GeneralizedELBO(num_particles=20), model, made)
    drawn = repeat(GeneralizedELBO(num_particles=20, divergence=KL(analytic=False)), model, made)
    assert_unbiased(closed, expected)
    assert closed.divergences.var() < drawn.divergences.var()


@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("slope", [0.0, 0.9])
def test_a_prior_that_depends_on_a_latent_drawn_later(slope, analytic):
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.2, 1.0))
        pyro.sample("b", dist.Normal(a, 0.7))

    def guide() -> None:
        b = pyro.sample("b", dist.Normal(pyro.param("b_at", torch.tensor(0.4)), positive("b_scale", 0.8)))
        loc = pyro.param("a_at", torch.tensor(-0.3)) + pyro.param("slope", torch.tensor(slope)) * b
        pyro.sample("a", dist.Normal(loc, positive("a_scale", 0.5)))

    guide()
    b_at, b_scale, a_at, a_scale, weight = (
        pyro.param(name) for name in ("b_at", "b_scale", "a_at", "a_scale", "slope")
    )
    mean = torch.stack([a_at + weight * b_at, b_at])
    root = torch.stack([torch.stack([a_scale, weight * b_scale]), torch.stack([0 * b_scale, b_scale])])
    prior = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 0.7**2]])
    expected = gaussian_kl(mean, root @ root.T, torch.tensor([0.2, 0.2]), prior)
    sample = repeat(GeneralizedELBO(num_particles=100, divergence=KL(analytic=analytic)), model, guide)
    assert_varies(sample)
    assert_unbiased(sample, expected)
    if slope:
        # Scoring b as if a stood still would lose their covariance: this test would see it.
        naive = expected + weight * b_scale**2 / 0.7**2
        assert standard_errors_away(sample.totals, naive.detach()) > 2 * ALLOWED


# ---- supports that a transform reaches ------------------------------------------------------------------------------


def with_constrained_sites() -> None:
    pyro.sample("loc", dist.Normal(0.5, 2.0))
    pyro.sample("scale", dist.LogNormal(0.3, 0.8))
    pyro.sample("rate", dist.Gamma(2.5, 1.7))


def constrained_kl(loc: Tensor, scale: Tensor) -> Tensor:
    """KL of independent normals over (loc, log scale, log rate) from the prior above, written out."""
    entropy = (0.5 * math.log(2 * math.pi * math.e) + scale.log()).sum()
    m, s = loc, scale
    of_loc = -0.5 * math.log(2 * math.pi) - math.log(2.0) - ((m[0] - 0.5) ** 2 + s[0] ** 2) / 8
    of_scale = -0.5 * math.log(2 * math.pi) - math.log(0.8) - ((m[1] - 0.3) ** 2 + s[1] ** 2) / (2 * 0.64)
    of_rate = 2.5 * math.log(1.7) - math.lgamma(2.5) + 2.5 * m[2] - 1.7 * (m[2] + s[2] ** 2 / 2).exp()
    return -entropy - of_loc - of_scale - of_rate


@pytest.mark.parametrize("guide", ["AutoNormal", "AutoDiagonalNormal"])
def test_constrained_supports_are_monte_carlo(guide):
    made = ready(GUIDES[guide][0], with_constrained_sites)
    loc, covariance = GUIDES[guide][1](made)
    expected = constrained_kl(loc, covariance.diagonal().sqrt())
    sample = repeat(GeneralizedELBO(num_particles=100), with_constrained_sites, made)
    assert_varies(sample)
    assert_unbiased(sample, expected)
    # AutoNormal's own latent for `loc` keeps its closed form next to the others; a joint latent has none at all.
    of_loc = {name: gradient for name, gradient in sample.gradients.items() if name.endswith(("s.loc", "l.loc"))}
    assert of_loc
    for name, gradient in of_loc.items():
        assert (gradient == gradient[0]).all() == (guide == "AutoNormal"), name


# ---- subsampling, scale and mask ------------------------------------------------------------------------------------


def test_a_subsampled_plate_is_exact_given_the_subsample():
    chosen: list[Tensor] = []

    def model() -> None:
        pyro.sample("mu", dist.Normal(0.5, 2.0))
        with pyro.plate("units", 6, subsample_size=2) as index:
            chosen.append(index)
            pyro.sample("theta", dist.Normal(0.1, 1.5))

    guide = ready(autoguide.AutoNormal, model)
    randomise()
    elbo = GeneralizedELBO(num_particles=3, max_plate_nesting=1)
    elbo.loss(model, guide)  # the first evaluation may run the model more than once; the others do not
    (mu_loc, mu_scale), (loc, scale) = (guide._get_loc_and_scale(name) for name in ("mu", "theta"))
    assert loc.shape == (6,)
    of_mu = torch.distributions.kl_divergence(dist.Normal(mu_loc, mu_scale), dist.Normal(0.5, 2.0))
    of_theta = torch.distributions.kl_divergence(dist.Normal(loc, scale), dist.Normal(0.1, 1.5))
    seen = set()
    for seed in range(5):
        sample = repeat(elbo, model, guide, repetitions=1, first_seed=seed)
        assert_exact(sample, of_mu + 3 * of_theta[chosen[-1]].sum())
        seen.add(tuple(sorted(chosen[-1].tolist())))
    assert len(seen) > 1
    assert_unbiased(repeat(elbo, model, guide, repetitions=400), of_mu + of_theta.sum())


_KEPT = torch.tensor([True, False, True])


def scaled_model() -> None:
    with poutine.scale(scale=0.3):
        pyro.sample("a", dist.Normal(0.5, 2.0))
    with pyro.plate("units", 3), poutine.mask(mask=_KEPT):
        pyro.sample("b", dist.Normal(0.1, 1.5))


def scaled_guide() -> None:
    with poutine.scale(scale=0.3):
        pyro.sample("a", dist.Normal(pyro.param("a_at", torch.tensor(0.4)), positive("a_scale", 0.7)))
    with pyro.plate("units", 3), poutine.mask(mask=_KEPT):
        pyro.sample("b", dist.Normal(pyro.param("b_at", torch.tensor([0.4, 0.2, -1.0])), positive("b_scale", 0.9)))


def test_scale_and_mask_weigh_the_closed_form():
    scaled_guide()
    of_a = torch.distributions.kl_divergence(
        dist.Normal(pyro.param("a_at"), pyro.param("a_scale")), dist.Normal(0.5, 2.0)
    )
    of_b = torch.distributions.kl_divergence(
        dist.Normal(pyro.param("b_at"), pyro.param("b_scale")), dist.Normal(0.1, 1.5)
    )
    expected = 0.3 * of_a + of_b[_KEPT].sum()
    assert_exact(repeat(GeneralizedELBO(num_particles=3), scaled_model, scaled_guide, repetitions=4), expected)


@pytest.mark.parametrize("guide", ["AutoNormal", *JOINT])
def test_a_scale_in_the_model_alone_weighs_the_prior_alone(guide):
    # An autoguide knows nothing of poutine handlers in the model: its entropy counts in full, as with Trace_ELBO.
    make, moments = GUIDES[guide]
    made = ready(make, scaled_model)
    mean, covariance = moments(made)
    normal = dist.MultivariateNormal(mean, covariance)
    log_prior = dist.Normal(torch.tensor([0.5, 0.1, 0.1, 0.1]), torch.tensor([2.0, 1.5, 1.5, 1.5])).log_prob(mean)
    log_prior = log_prior - 0.5 * covariance.diagonal() / torch.tensor([4.0, 2.25, 2.25, 2.25])
    expected = -normal.entropy() - 0.3 * log_prior[0] - log_prior[1:][_KEPT].sum()
    assert_exact(repeat(GeneralizedELBO(num_particles=3), scaled_model, made, repetitions=4), expected)
    drawn = repeat(GeneralizedELBO(num_particles=100, divergence=KL(analytic=False)), scaled_model, made)
    assert_unbiased(drawn, expected)


def test_a_prior_that_is_masked_away_leaves_the_entropy():
    def model() -> None:
        with poutine.mask(mask=False):
            pyro.sample("theta", dist.Normal(0.5, 2.0))

    made = ready(autoguide.AutoNormal, model)
    _, scale = made._get_loc_and_scale("theta")
    expected = -0.5 * math.log(2 * math.pi * math.e) - scale.log()
    assert_exact(repeat(GeneralizedELBO(num_particles=3), model, made, repetitions=3), expected)


def test_a_joint_latent_in_a_subsampled_plate():
    def model() -> None:
        pyro.sample("mu", dist.Normal(0.5, 2.0))
        with pyro.plate("units", 6, subsample_size=2):
            pyro.sample("theta", dist.Normal(0.1, 1.5))

    made = ready(autoguide.AutoMultivariateNormal, model)
    mean, covariance = multivariate_moments(made)
    log_prior = dist.Normal(torch.tensor([0.5, 0.1, 0.1]), torch.tensor([2.0, 1.5, 1.5])).log_prob(mean)
    log_prior = log_prior - 0.5 * covariance.diagonal() / torch.tensor([4.0, 2.25, 2.25])
    expected = -dist.MultivariateNormal(mean, covariance).entropy() - log_prior[0] - 3 * log_prior[1:].sum()
    assert_exact(repeat(GeneralizedELBO(num_particles=3), model, made, repetitions=4), expected)


# ---- what must not be mistaken for a closed form --------------------------------------------------------------------


def test_a_latent_whose_entry_is_used_several_times():
    # theta is one number three times over: its entries are not independent, whatever the latent's shape says.
    covariance = random_covariance(3, 1)

    def model() -> None:
        pyro.sample("theta", dist.MultivariateNormal(torch.zeros(3), covariance))

    def guide() -> None:
        q = dist.Normal(pyro.param("at", torch.tensor([0.4])), positive("width", 0.8)).to_event(1)
        u = pyro.sample("u", q, infer={"is_auxiliary": True})
        pyro.sample("theta", dist.Delta(u.expand((*u.shape[:-1], 3)), event_dim=1))

    guide()
    at, width = pyro.param("at"), pyro.param("width")
    prior = dist.MultivariateNormal(torch.zeros(3), covariance)
    quadratic = torch.linalg.inv(covariance).sum() * width**2
    expected = -dist.Normal(at, width).entropy().sum() - prior.log_prob(at.expand(3)) + 0.5 * quadratic
    assert_unbiased(repeat(GeneralizedELBO(num_particles=100), model, guide), expected)


def test_a_scaled_latent_whose_jacobian_is_left_out():
    # Without its log-density the Delta's own is wrong as a model, but what the ELBO estimates must not change with it.
    def model() -> None:
        pyro.sample("theta", dist.Normal(0.5, 2.0))

    def guide() -> None:
        u = pyro.sample("u", dist.Normal(pyro.param("at", torch.tensor(0.4)), 0.7), infer={"is_auxiliary": True})
        pyro.sample("theta", dist.Delta(3 * u))

    guide()
    at = pyro.param("at")
    expected = -dist.Normal(at, 0.7).entropy() - dist.Normal(0.5, 2.0).log_prob(3 * at) + 0.5 * (3 * 0.7 / 2.0) ** 2
    assert_unbiased(repeat(GeneralizedELBO(num_particles=100), model, guide), expected)


def test_a_delta_with_a_density_of_its_own():
    def model() -> None:
        pyro.sample("theta", dist.Normal(0.5, 2.0))

    def guide() -> None:
        at = pyro.param("at", torch.tensor(0.4))
        u = pyro.sample("u", dist.Normal(at, 0.7), infer={"is_auxiliary": True})
        pyro.sample("theta", dist.Delta(u, log_density=-(u**2)))

    guide()
    at = pyro.param("at")
    kl = torch.distributions.kl_divergence(dist.Normal(at, 0.7), dist.Normal(0.5, 2.0))
    assert_unbiased(repeat(GeneralizedELBO(num_particles=100), model, guide), kl - at**2 - 0.7**2)


class Identity(torch.autograd.Function):
    """An operation that torch's overrides do not see through."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


WAYS_OUT_OF_TORCH: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.item(),
    "float": lambda x: float(x.detach()),
    "tolist": lambda x: x.tolist(),
    "NumPy": lambda x: torch.from_numpy(np.array(x.detach().numpy() + 0.0)),
    "asarray": lambda x: float(np.asarray(x.detach())),
    "data": lambda x: x.data,
    "new tensor": lambda x: torch.tensor([x.detach(), x.detach()])[0],
    "format": lambda x: float(f"{x.detach():.17g}"),
    "custom function": Identity.apply,
    "vmap": lambda x: torch.vmap(lambda each: each * 1.0)(x.reshape(1))[0],
    "in place": lambda x: torch.zeros(()).copy_(x),
    "filled": lambda x: torch.zeros(2).fill_(x)[0],
    "indexed": lambda x: put(torch.zeros(2), x)[0],
}


def put(buffer: Tensor, x: Tensor) -> Tensor:
    buffer[0] = x
    return buffer


@pytest.mark.parametrize("way", WAYS_OUT_OF_TORCH)
def test_a_dependence_that_leaves_torch(way):
    # c's prior depends on a, drawn before it, and by a way that hides it on b, drawn after c and with its help.
    def model() -> None:
        a = pyro.sample("a", dist.Normal(0.2, 1.0))
        b = pyro.sample("b", dist.Normal(-0.1, 1.0))
        pyro.sample("c", dist.Normal(a + WAYS_OUT_OF_TORCH[way](b), 0.7))

    def guide() -> None:
        a = pyro.sample("a", dist.Normal(pyro.param("a_at", torch.tensor(0.4)), 0.8))
        c = pyro.sample("c", dist.Normal(pyro.param("c_at", torch.tensor(-0.3)), 0.9))
        pyro.sample("b", dist.Normal(pyro.param("b_at", torch.tensor(0.5)) + 0.8 * c + 0.0 * a, 0.6))

    guide()
    a_at, b_at, c_at = (pyro.param(name) for name in ("a_at", "b_at", "c_at"))
    mean = torch.stack([a_at, c_at, b_at + 0.8 * c_at])
    root = torch.tensor([[0.8, 0.0, 0.0], [0.0, 0.9, 0.0], [0.0, 0.8 * 0.9, 0.6]])
    make = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.7, 1.0], [0.0, 0.0, 1.0]])  # of (a, noise of c, b)
    expected = gaussian_kl(mean, root @ root.T, torch.tensor([0.2, 0.1, -0.1]), make @ make.T).detach()
    # Values only: most of these ways cut the gradient, for every ELBO.
    elbo = GeneralizedELBO(num_particles=10, vectorize_particles=False)
    sample = repeat(elbo, model, guide, repetitions=40)
    assert standard_errors_away(sample.totals, expected) < ALLOWED
    naive = expected + 0.8 * 0.9**2 / 0.7**2
    assert standard_errors_away(sample.totals, naive) > ALLOWED


# ---- hand-written guides of the prior's family ----------------------------------------------------------------------


def positive(name: str, *at: float) -> Tensor:
    start = torch.tensor(at[0] if len(at) == 1 else at)
    return pyro.param(name, start, constraint=constraints.positive)


def fraction(name: str, *at: float) -> Tensor:
    return pyro.param(name, torch.tensor(at), constraint=constraints.unit_interval)


def simplices(name: str, *at: tuple[float, ...]) -> Tensor:
    return pyro.param(name, torch.tensor(at), constraint=constraints.simplex)


# Each in a plate of two, the prior shared. The guide's distribution is made anew in every run, from parameters.
FAMILIES: dict[str, tuple[Callable, Callable]] = {
    "Normal": (
        lambda: dist.Normal(pyro.param("loc", torch.tensor([0.3, -0.2])), positive("scale", 0.4, 1.3)),
        lambda: dist.Normal(0.5, 0.8),
    ),
    "Normal with score function": (
        lambda: dist.Normal(pyro.param("loc", torch.tensor([0.3, -0.2])), positive("scale", 0.4, 1.3)).has_rsample_(
            False
        ),
        lambda: dist.Normal(0.5, 0.8),
    ),
    "Normal with a learned prior": (
        lambda: dist.Normal(pyro.param("loc", torch.tensor([0.3, -0.2])), positive("scale", 0.4, 1.3)),
        lambda: dist.Normal(pyro.param("prior_loc", torch.tensor(0.5)), positive("prior_scale", 0.8)),
    ),
    "LogNormal": (
        lambda: dist.LogNormal(pyro.param("loc", torch.tensor([0.3, -0.2])), positive("scale", 0.4, 1.3)),
        lambda: dist.LogNormal(0.5, 0.8),
    ),
    "Gamma": (
        lambda: dist.Gamma(positive("shape", 2.0, 1.4), positive("rate", 1.0, 0.7)),
        lambda: dist.Gamma(1.5, 0.8),
    ),
    "Exponential under Gamma": (
        lambda: dist.Gamma(positive("shape", 2.0, 1.4), positive("rate", 1.0, 0.7)),
        lambda: dist.Exponential(0.8),
    ),
    "Beta": (lambda: dist.Beta(positive("up", 2.0, 1.4), positive("down", 1.0, 3.0)), lambda: dist.Beta(1.5, 0.8)),
    "Dirichlet": (
        lambda: dist.Dirichlet(
            pyro.param("counts", torch.tensor([[2.0, 1.0, 3.0], [0.8, 1.5, 1.0]]), constraint=constraints.positive)
        ),
        lambda: dist.Dirichlet(torch.tensor([1.0, 2.0, 1.5])),
    ),
    "Bernoulli": (lambda: dist.Bernoulli(fraction("probs", 0.4, 0.9)), lambda: dist.Bernoulli(0.3)),
    "Categorical": (
        lambda: dist.Categorical(simplices("probs", (0.2, 0.3, 0.5), (0.6, 0.3, 0.1))),
        lambda: dist.Categorical(torch.tensor([0.5, 0.25, 0.25])),
    ),
    "MultivariateNormal": (
        lambda: dist.MultivariateNormal(pyro.param("loc", torch.tensor([[0.3, -0.2], [1.0, 2.0]])), spd("root")),
        lambda: dist.MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
    ),
}


def spd(name: str) -> Tensor:
    root = pyro.param(name, torch.tensor([[1.0, 0.3], [-0.2, 0.8]]))
    return root @ root.T + 0.1 * torch.eye(2)


def in_a_plate(make: Callable) -> Callable:
    def program() -> None:
        with pyro.plate("units", 2):
            pyro.sample("z", make())

    return program


@pytest.mark.parametrize(("num_particles", "vectorized"), [(1, True), (3, True), (2, False)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_a_closed_form_are_exact(family, num_particles, vectorized):
    q, p = FAMILIES[family]
    in_a_plate(q)()
    in_a_plate(p)()
    expected = torch.distributions.kl_divergence(q(), p()).sum()
    elbo = GeneralizedELBO(num_particles=num_particles, vectorize_particles=vectorized)
    assert_exact(repeat(elbo, in_a_plate(p), in_a_plate(q), repetitions=4), expected)


WITHOUT_CLOSED_FORM: dict[str, tuple[Callable, Callable, Callable]] = {
    "Poisson": (
        lambda: dist.Poisson(positive("rate", 2.0, 1.4)),
        lambda: dist.Poisson(1.5),
        lambda q, p: torch.distributions.kl_divergence(q, p).sum(),
    ),
    "LogNormal under Gamma": (
        lambda: dist.LogNormal(pyro.param("loc", torch.tensor([0.3, -0.2])), positive("scale", 0.4, 0.7)),
        lambda: dist.Gamma(2.5, 1.7),
        lambda q, p: (
            -q.entropy() - 2.5 * math.log(1.7) + math.lgamma(2.5) - 1.5 * q.loc + 1.7 * (q.loc + q.scale**2 / 2).exp()
        ).sum(),
    ),
    "Normal with a Laplace prior": (
        lambda: dist.Normal(pyro.param("loc", torch.tensor([0.3, -0.2])), positive("scale", 0.4, 0.7)),
        lambda: dist.Laplace(0.0, 1.2),
        lambda q, p: (-q.entropy() + math.log(2.4) + folded_mean(q) / 1.2).sum(),
    ),
}


def folded_mean(q: dist.Normal) -> Tensor:
    z = q.loc / q.scale
    return q.scale * math.sqrt(2 / math.pi) * (-0.5 * z**2).exp() + q.loc * torch.erf(z / math.sqrt(2))


@pytest.mark.parametrize("family", WITHOUT_CLOSED_FORM)
def test_other_families_keep_their_expectation(family):
    q, p, kl = WITHOUT_CLOSED_FORM[family]
    in_a_plate(q)()
    expected = kl(q(), p())
    assert_unbiased(repeat(GeneralizedELBO(num_particles=200), in_a_plate(p), in_a_plate(q)), expected)


def test_a_point_mass_has_the_prior_as_its_divergence():
    def guide() -> None:
        with pyro.plate("units", 2):
            pyro.sample("z", dist.Delta(pyro.param("at", torch.tensor([0.3, -0.2]))))

    guide()
    expected = -dist.Normal(0.5, 0.8).log_prob(pyro.param("at")).sum()
    assert_exact(
        repeat(GeneralizedELBO(num_particles=3), in_a_plate(lambda: dist.Normal(0.5, 0.8)), guide, repetitions=3),
        expected,
    )
