"""Values and gradients are unbiased where latents are not reparameterised, against sums over their values.

Every problem has a discrete latent on which something else depends: an auxiliary site, a closed form, a later discrete
latent, a whole plate. What depends on it must be part of the score-function gradient's cost, whatever estimates it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from sampling_checks import ALLOWED, assert_unbiased, exact_gradients, repeat, standard_errors_away
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from pyrobirds import GeneralizedELBO
from pyrobirds.divergences import KL

pytestmark = pytest.mark.usefixtures("double_precision")


class Enumerated(NamedTuple):
    """A model with its data, a guide, and the exact loss and divergence by summing over the discrete latents."""

    model: Callable[[], object]
    guide: Callable[[], object]
    exact: Callable[[], tuple[Tensor, Tensor]]


def real(name: str, *at: float) -> Tensor:
    return pyro.param(name, torch.tensor(at if len(at) > 1 else at[0]))


def log_odds(name: str, *at: float) -> dist.Bernoulli:
    return dist.Bernoulli(logits=real(name, *at))


def gaussian_loss(mean: Tensor, scale: Tensor, y: float, noise: float) -> Tensor:
    """Minus the expectation of log N(y; theta, noise) over theta ~ N(mean, scale)."""
    return 0.5 * math.log(2 * math.pi * noise**2) + ((y - mean) ** 2 + scale**2) / (2 * noise**2)


# ---- one flip, and a continuous latent that depends on it -----------------------------------------------------------


def mixture() -> None:
    z = pyro.sample("z", dist.Bernoulli(0.4))
    theta = pyro.sample("theta", dist.Normal(2 * z - 1, 1.0))
    pyro.sample("y", dist.Normal(theta, 0.8), obs=torch.tensor(0.7))


def given_flip(z: Tensor) -> dist.Normal:
    # The width differs, so that the entropy of theta depends on z as much as its mean does.
    scale = (real("log_scale", -0.7) + real("grow", 1.2) * z).exp()
    return dist.Normal(real("at", -0.2) + real("shift", 0.9) * z, scale)


def mixture_directly() -> None:
    z = pyro.sample("z", log_odds("odds", 0.3))
    pyro.sample("theta", given_flip(z))


def mixture_through_an_auxiliary() -> None:
    z = pyro.sample("z", log_odds("odds", 0.3))
    u = pyro.sample("u", given_flip(z), infer={"is_auxiliary": True})
    pyro.sample("theta", dist.Delta(u))


def mixture_through_a_shifted_auxiliary() -> None:
    z = pyro.sample("z", log_odds("odds", 0.3))
    q = given_flip(z)
    u = pyro.sample("u", dist.Normal(q.loc - 1, q.scale), infer={"is_auxiliary": True})
    pyro.sample("theta", dist.Delta(u + 1))


def exact_mixture() -> tuple[Tensor, Tensor]:
    flip = log_odds("odds", 0.3)
    values = torch.tensor([0.0, 1.0])
    given = given_flip(values)
    q = flip.log_prob(values).exp()
    loss = q @ gaussian_loss(given.mean, given.stddev, 0.7, 0.8)
    of_theta = q @ kl_divergence(given, dist.Normal(2 * values - 1, 1.0))
    return loss, of_theta + kl_divergence(flip, dist.Bernoulli(0.4))


# ---- the same in a plate, next to a subsampled one ------------------------------------------------------------------

_Y = torch.tensor([0.7, -0.4, 1.5, 0.1])


def plated_mixture(subsample_size: int | None) -> Callable[[], None]:
    def model() -> None:
        with pyro.plate("units", 4, subsample_size=subsample_size) as units:
            z = pyro.sample("z", dist.Bernoulli(0.4))
            theta = pyro.sample("theta", dist.Normal(2 * z - 1, 1.0))
            pyro.sample("y", dist.Normal(theta, 0.8), obs=_Y[units])

    return model


def plated_mixture_guide(subsample_size: int | None) -> Callable[[], None]:
    def guide() -> None:
        with pyro.plate("units", 4, subsample_size=subsample_size) as units:
            z = pyro.sample("z", dist.Bernoulli(logits=real("odds", 0.3, -0.2, 0.8, 0.0)[units]))
            u = pyro.sample("u", given_flip(z), infer={"is_auxiliary": True})
            pyro.sample("theta", dist.Delta(u))

    return guide


def exact_plated_mixture() -> tuple[Tensor, Tensor]:
    flips = log_odds("odds", 0.3, -0.2, 0.8, 0.0)
    values = torch.tensor([[0.0], [1.0]])
    given = given_flip(values)
    q = flips.log_prob(values).exp()
    loss = (q * gaussian_loss(given.mean, given.stddev, _Y, 0.8)).sum()
    of_theta = (q * kl_divergence(given, dist.Normal(2 * values - 1, 1.0))).sum()
    return loss, of_theta + kl_divergence(flips, dist.Bernoulli(0.4)).sum()


# ---- an auxiliary site that is itself discrete ----------------------------------------------------------------------


def one_normal() -> None:
    theta = pyro.sample("theta", dist.Normal(0.5, 1.0))
    pyro.sample("y", dist.Normal(theta, 0.8), obs=torch.tensor(0.7))


def component_then_theta() -> None:
    k = pyro.sample("k", dist.Categorical(logits=real("odds", 0.3, -0.2, 0.5)), infer={"is_auxiliary": True})
    pyro.sample("theta", dist.Normal(real("at", -0.5, 0.4, 1.1)[k], real("log_scale", -0.5, 0.2, -1.0).exp()[k]))


def exact_component_then_theta() -> tuple[Tensor, Tensor]:
    component = dist.Categorical(logits=real("odds", 0.3, -0.2, 0.5))
    given = dist.Normal(real("at", -0.5, 0.4, 1.1), real("log_scale", -0.5, 0.2, -1.0).exp())
    loss = component.probs @ gaussian_loss(given.mean, given.stddev, 0.7, 0.8)
    return loss, component.probs @ kl_divergence(given, dist.Normal(0.5, 1.0)) - component.entropy()


# ---- two discrete latents, drawn by the guide in the order of the model and against it ------------------------------

_GIVEN = torch.tensor([0.2, 0.7])


def two_flips() -> None:
    a = pyro.sample("a", dist.Bernoulli(0.4))
    b = pyro.sample("b", dist.Bernoulli(_GIVEN[a.long()]))
    pyro.sample("y", dist.Normal(a - 2 * b, 0.8), obs=torch.tensor(0.3))


def in_order() -> None:
    a = pyro.sample("a", log_odds("a_odds", 0.3))
    pyro.sample("b", dist.Bernoulli(logits=real("b_odds", -0.4, 0.8)[a.long()]))


def against_order() -> None:
    b = pyro.sample("b", log_odds("b_odds", 0.3))
    pyro.sample("a", dist.Bernoulli(logits=real("a_odds", -0.4, 0.8)[b.long()]))


def exact_two_flips(first: str) -> Callable[[], tuple[Tensor, Tensor]]:
    def exact() -> tuple[Tensor, Tensor]:
        second = "b" if first == "a" else "a"
        loss = divergence = torch.zeros(())
        for one in (0, 1):
            for two in (0, 1):
                log_q = log_odds(f"{first}_odds", 0.3).log_prob(torch.tensor(float(one))) + dist.Bernoulli(
                    logits=real(f"{second}_odds", -0.4, 0.8)[one]
                ).log_prob(torch.tensor(float(two)))
                a, b = (one, two) if first == "a" else (two, one)
                log_p = math.log((0.6, 0.4)[a]) + torch.log(_GIVEN[a] if b else 1 - _GIVEN[a])
                nll = -dist.Normal(float(a - 2 * b), 0.8).log_prob(torch.tensor(0.3))
                loss = loss + log_q.exp() * nll
                divergence = divergence + log_q.exp() * (log_q - log_p)
        return loss, divergence

    return exact


# ---- a global discrete latent, a plate of discrete and continuous ones below it -------------------------------------

_PRIOR_FLIPS = torch.tensor([0.2, 0.5, 0.7])


def global_and_local() -> None:
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    with pyro.plate("units", 4):
        z = pyro.sample("z", dist.Bernoulli(_PRIOR_FLIPS[k]))
        theta = pyro.sample("theta", dist.Normal(0.5 * k + z, 1.0))
        pyro.sample("y", dist.Normal(theta, 0.8), obs=_Y)


def global_and_local_guide() -> None:
    k = pyro.sample("k", dist.Categorical(logits=real("k_odds", 0.3, -0.2, 0.5)))
    with pyro.plate("units", 4):
        z = pyro.sample("z", dist.Bernoulli(logits=real("z_odds", 0.3, -0.2, 0.8, 0.0) - 0.5 * k))
        pyro.sample("theta", local_given(k, z))


def local_given(k: Tensor, z: Tensor) -> dist.Normal:
    return dist.Normal(real("at", 0.1, 0.4, -0.3, 0.2) + real("by_k", 0.4) * k, (real("by_z", 0.7) * z - 0.5).exp())


def exact_global_and_local() -> tuple[Tensor, Tensor]:
    component = dist.Categorical(logits=real("k_odds", 0.3, -0.2, 0.5))
    loss, divergence = torch.zeros(()), kl_divergence(component, dist.Categorical(torch.tensor([0.5, 0.3, 0.2])))
    z = torch.tensor([[0.0], [1.0]])
    for k in range(3):
        flips = dist.Bernoulli(logits=real("z_odds", 0.3, -0.2, 0.8, 0.0) - 0.5 * k)
        q = component.probs[k] * flips.log_prob(z).exp()
        given = local_given(torch.tensor(float(k)), z)
        loss = loss + (q * gaussian_loss(given.mean, given.stddev, _Y, 0.8)).sum()
        of_theta = (q * kl_divergence(given, dist.Normal(0.5 * k + z, 1.0))).sum()
        divergence = (
            divergence + of_theta + component.probs[k] * kl_divergence(flips, dist.Bernoulli(_PRIOR_FLIPS[k])).sum()
        )
    return loss, divergence


# ---- chains: the last latent depends on the first only through the one between --------------------------------------


def chain() -> None:
    a = pyro.sample("a", dist.Bernoulli(0.4))
    b = pyro.sample("b", dist.Bernoulli(_GIVEN[a.long()]))
    theta = pyro.sample("theta", dist.Normal(2 * b - 1, 1.0))
    pyro.sample("y", dist.Normal(theta, 0.8), obs=torch.tensor(0.7))


def given_link(b: Tensor) -> dist.Normal:
    scale = (real("log_scale", -1.0) + real("grow", 1.5) * b).exp()
    return dist.Normal(real("at", -1.0) + real("shift", 3.5) * b, scale)


def chain_guide() -> None:
    a = pyro.sample("a", log_odds("a_odds", 0.3))
    b = pyro.sample("b", dist.Bernoulli(logits=real("b_odds", -1.0, 1.5)[a.long()]))
    pyro.sample("theta", given_link(b))


def chain_guide_with_an_auxiliary() -> None:
    a = pyro.sample("a", log_odds("a_odds", 0.3))
    b = pyro.sample("b", dist.Bernoulli(logits=real("b_odds", -1.0, 1.5)[a.long()]))
    q = given_link(b)
    u = pyro.sample("u", dist.Normal(q.loc - 1, q.scale), infer={"is_auxiliary": True})
    pyro.sample("theta", dist.Delta(u + 1))


def exact_chain() -> tuple[Tensor, Tensor]:
    values = torch.tensor([0.0, 1.0])
    flip, then = log_odds("a_odds", 0.3), dist.Bernoulli(logits=real("b_odds", -1.0, 1.5))
    given = given_link(values)
    q_a = flip.log_prob(values).exp()
    q_b = q_a @ then.log_prob(values[:, None]).exp().T
    loss = q_b @ gaussian_loss(given.mean, given.stddev, 0.7, 0.8)
    of_theta = q_b @ kl_divergence(given, dist.Normal(2 * values - 1, 1.0))
    of_b = q_a @ kl_divergence(then, dist.Bernoulli(_GIVEN))
    return loss, of_theta + of_b + kl_divergence(flip, dist.Bernoulli(0.4))


def chain_through_a_gaussian() -> None:
    a = pyro.sample("a", dist.Bernoulli(0.4))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    theta = pyro.sample("theta", dist.Normal(b, 0.9))
    pyro.sample("y", dist.Normal(theta, 0.8), obs=torch.tensor(0.7))


def chain_through_a_gaussian_guide() -> None:
    a = pyro.sample("a", log_odds("a_odds", 0.3))
    b = pyro.sample("b", given_flip(a))
    pyro.sample("theta", dist.Normal(real("slope", -0.8) * b, real("log_width", -0.6).exp()))


def exact_chain_through_a_gaussian() -> tuple[Tensor, Tensor]:
    values = torch.tensor([0.0, 1.0])
    flip, given = log_odds("a_odds", 0.3), given_flip(values)
    q = flip.log_prob(values).exp()
    slope, width = real("slope", -0.8), real("log_width", -0.6).exp()
    variance = (slope * given.stddev) ** 2 + width**2
    loss = q @ gaussian_loss(slope * given.mean, variance.sqrt(), 0.7, 0.8)
    # theta - b = (slope - 1) b + width * noise
    square = ((slope - 1) * given.mean) ** 2 + ((slope - 1) * given.stddev) ** 2 + width**2
    of_theta = q @ (0.5 * square / 0.81) + math.log(0.9) - width.log() - 0.5
    of_b = q @ kl_divergence(given, dist.Normal(values, 1.0))
    return loss, of_theta + of_b + kl_divergence(flip, dist.Bernoulli(0.4))


# ---- a prior that Python chooses by the value of a latent -----------------------------------------------------------


def branching() -> None:
    z = pyro.sample("z", dist.Bernoulli(0.4))
    theta = pyro.sample("theta", dist.Normal(1.0, 1.0) if z.item() else dist.Normal(-1.0, 1.0))
    pyro.sample("y", dist.Normal(theta, 0.8), obs=torch.tensor(0.7))


PROBLEMS: dict[str, Enumerated] = {
    "flip, theta": Enumerated(mixture, mixture_directly, exact_mixture),
    "flip, auxiliary, theta": Enumerated(mixture, mixture_through_an_auxiliary, exact_mixture),
    "flip, auxiliary, shifted theta": Enumerated(mixture, mixture_through_a_shifted_auxiliary, exact_mixture),
    "plate of flip, auxiliary, theta": Enumerated(
        plated_mixture(None), plated_mixture_guide(None), exact_plated_mixture
    ),
    "subsampled plate": Enumerated(plated_mixture(2), plated_mixture_guide(2), exact_plated_mixture),
    "discrete auxiliary": Enumerated(one_normal, component_then_theta, exact_component_then_theta),
    "two flips": Enumerated(two_flips, in_order, exact_two_flips("a")),
    "two flips against the model's order": Enumerated(two_flips, against_order, exact_two_flips("b")),
    "chain": Enumerated(chain, chain_guide, exact_chain),
    "chain with an auxiliary": Enumerated(chain, chain_guide_with_an_auxiliary, exact_chain),
    "chain through a Gaussian": Enumerated(
        chain_through_a_gaussian, chain_through_a_gaussian_guide, exact_chain_through_a_gaussian
    ),
    "global and local": Enumerated(global_and_local, global_and_local_guide, exact_global_and_local),
}
DIVERGENCES = {
    "Monte Carlo": KL(analytic=False),
    "closed forms": KL(),
    "Monte Carlo, particles of its own": KL(analytic=False, num_particles=90),
    "closed forms, particles of its own": KL(num_particles=90),
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_unbiased(problem, divergence):
    model, guide, exact = PROBLEMS[problem]
    guide()
    loss, kl = exact()
    elbo = GeneralizedELBO(w=1.7, divergence=DIVERGENCES[divergence], num_particles=60, max_plate_nesting=1)
    sample = repeat(elbo, model, guide, repetitions=120)
    assert_unbiased(sample, loss + 1.7 * kl)
    assert standard_errors_away(sample.divergences, 1.7 * kl.detach()) < ALLOWED


@pytest.mark.parametrize("divergence", [KL(), KL(num_particles=3), KL(analytic=False, num_particles=3)], ids=repr)
@pytest.mark.parametrize(
    "problem", ["flip, auxiliary, theta", "global and local", "two flips against the model's order", "chain"]
)
def test_unbiased_in_a_loop_over_particles(problem, divergence):
    model, guide, exact = PROBLEMS[problem]
    guide()
    loss, kl = exact()
    elbo = GeneralizedELBO(w=1.7, divergence=divergence, num_particles=2, vectorize_particles=False)
    assert_unbiased(repeat(elbo, model, guide, repetitions=150), loss + 1.7 * kl)


@pytest.mark.parametrize("analysis_seed", range(4))
def test_a_prior_that_python_chooses(analysis_seed):
    # The choice leaves no trace in tensors. What the ELBO finds out about it must not hang on the draws it looks at.
    def mean_field() -> None:
        pyro.sample("z", log_odds("odds", 0.3))
        pyro.sample("theta", dist.Normal(real("at", 0.8), real("log_scale", -0.7).exp()))

    mean_field()
    values, flip = torch.tensor([0.0, 1.0]), log_odds("odds", 0.3)
    q = dist.Normal(real("at", 0.8), real("log_scale", -0.7).exp())
    of_theta = flip.log_prob(values).exp() @ kl_divergence(q, dist.Normal(2 * values - 1, 1.0))
    exact = gaussian_loss(q.mean, q.stddev, 0.7, 0.8) + of_theta + kl_divergence(flip, dist.Bernoulli(0.4))
    pyro.set_rng_seed(analysis_seed)
    elbo = GeneralizedELBO(num_particles=8, vectorize_particles=False)
    elbo.loss(branching, mean_field)
    assert_unbiased(repeat(elbo, branching, mean_field, repetitions=50), exact)


@pytest.mark.parametrize("problem", ["flip, auxiliary, theta", "plate of flip, auxiliary, theta", "discrete auxiliary"])
def test_what_trace_elbo_leaves_out_would_be_found(problem):
    # Trace_ELBO's cost in a score-function gradient has no term for auxiliary sites: its gradient of the odds is off.
    model, guide, exact = PROBLEMS[problem]
    guide()
    loss, kl = exact()
    gradient = exact_gradients(loss + kl)["odds"]
    keywords = {"num_particles": 200, "vectorize_particles": True, "max_plate_nesting": 1}
    theirs = repeat(Trace_ELBO(**keywords), model, guide)
    assert standard_errors_away(theirs.gradients["odds"], gradient) > 2 * ALLOWED
    ours = repeat(GeneralizedELBO(divergence=KL(analytic=False), **keywords), model, guide)
    assert standard_errors_away(ours.gradients["odds"], gradient) < ALLOWED


def test_an_autoguide_next_to_a_flip():
    flips = poutine.block(mixture, hide=["z"])
    automatic = AutoNormal(flips, init_scale=0.7)

    def guide() -> None:
        pyro.sample("z", log_odds("odds", 0.3))
        automatic()

    guide()
    values, flip = torch.tensor([0.0, 1.0]), log_odds("odds", 0.3)
    loc, scale = automatic._get_loc_and_scale("theta")
    of_theta = flip.log_prob(values).exp() @ kl_divergence(dist.Normal(loc, scale), dist.Normal(2 * values - 1, 1.0))
    exact = gaussian_loss(loc, scale, 0.7, 0.8) + of_theta + kl_divergence(flip, dist.Bernoulli(0.4))
    assert_unbiased(repeat(GeneralizedELBO(num_particles=40), mixture, guide, repetitions=200), exact)


def test_parameters_of_the_guide_are_all_reached():
    for name, (_, guide, exact) in PROBLEMS.items():
        pyro.clear_param_store()
        guide()
        gradients = exact_gradients(sum(exact()))
        assert all((gradient != 0).all() for gradient in gradients.values()), name
        assert constraints.real.check(torch.cat([gradient.flatten() for gradient in gradients.values()])).all()
