"""Small models that cover what Pyro's ELBOs must cope with, hand-written guides for each, and every autoguide.

Every model and guide takes the data as its one argument. Guides are made by factories, so that each test starts afresh.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import iterated, spline_autoregressive
from pyro.infer import autoguide
from torch import Tensor

Guide = Callable[[Tensor], object]
GuideFactory = Callable[[Callable[[Tensor], object]], Guide]


@dataclass(frozen=True)
class Problem:
    """A model, its data, its plate nesting, and its hand-written guides by name."""

    model: Callable[[Tensor], object]
    data: Callable[[], Tensor]
    max_plate_nesting: int
    guides: dict[str, Guide]
    discrete: list[str] = field(default_factory=list)


def location(name: str, *shape: int, event_dim: int | None = 0, at: float = 0.1) -> Tensor:
    # event_dim=0 lets an enclosing subsampled plate select the rows of a full-size parameter.
    return pyro.param(name, lambda: torch.full(shape, at), event_dim=event_dim)


def positive(name: str, *shape: int, at: float = 0.6, event_dim: int | None = 0) -> Tensor:
    return pyro.param(
        name, lambda: torch.full(shape, at), constraint=constraints.softplus_positive, event_dim=event_dim
    )


def probability(name: str, *shape: int, at: float = 0.4) -> Tensor:
    return pyro.param(name, lambda: torch.full(shape, at), constraint=constraints.unit_interval, event_dim=0)


def diagonal_normal(loc: Tensor, scale: Tensor) -> dist.MultivariateNormal:
    # Normal(...).to_event(1) would lose has_rsample_(False) when it is expanded.
    return dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))


def simplex(name: str, *shape: int) -> Tensor:
    return pyro.param(name, lambda: torch.ones(shape) / shape[-1], constraint=constraints.simplex, event_dim=1)


# ---- one latent -----------------------------------------------------------------------------------------------------


def one_latent(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.3, 1.2))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, 0.7), obs=y)


def one_latent_guide(reparameterised: bool) -> Guide:
    def guide(y: Tensor) -> None:
        q = dist.Normal(location("loc"), positive("scale"))
        pyro.sample("theta", q.has_rsample_(reparameterised))

    return guide


def one_latent_auxiliary(y: Tensor) -> None:
    u = pyro.sample("u", dist.Normal(location("loc"), positive("scale")), infer={"is_auxiliary": True})
    pyro.sample("theta", dist.Normal(u * location("slope", at=0.8), positive("width")))


def one_latent_through_delta(y: Tensor) -> None:
    u = pyro.sample("u", dist.Normal(location("loc"), 1.0), infer={"is_auxiliary": True})
    scale = positive("scale")
    pyro.sample("theta", dist.Delta(u * scale, log_density=-scale.log()))


# ---- several latents with constrained supports ----------------------------------------------------------------------


def constrained_latents(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    share = pyro.sample("share", dist.Beta(2.0, 3.0))
    mix = pyro.sample("mix", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    centre = loc[..., 0] * mix[..., 0] + loc[..., 1] * mix[..., 1] + share * rate
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(centre, scale), obs=y)


def constrained_guide(reparameterised: bool) -> Guide:
    def guide(y: Tensor) -> None:
        normal = diagonal_normal(location("loc_at", 2), positive("loc_scale", 2))
        pyro.sample("loc", normal.has_rsample_(reparameterised))
        scale = pyro.sample("scale", dist.LogNormal(location("scale_at"), positive("scale_scale")))
        gamma = dist.Gamma(positive("shape", at=2.0), positive("inverse") + scale)
        pyro.sample("rate", gamma.has_rsample_(reparameterised))
        beta = dist.Beta(positive("up", at=1.5), positive("down", at=2.0))
        pyro.sample("share", beta.has_rsample_(reparameterised))
        dirichlet = dist.Dirichlet(positive("counts", 3, at=2.0))
        pyro.sample("mix", dirichlet.has_rsample_(reparameterised))

    return guide


# ---- a hierarchy in nested plates -----------------------------------------------------------------------------------


def nested_plates(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.LogNormal(0.0, 0.3))
    with pyro.plate("groups", 3, dim=-1):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        with pyro.plate("items", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(theta, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def nested_guide(reparameterised: bool) -> Guide:
    def guide(y: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(location("mu_at"), positive("mu_scale")))
        tau = dist.LogNormal(location("tau_at"), positive("tau_scale"))
        pyro.sample("tau", tau.has_rsample_(reparameterised))
        with pyro.plate("groups", 3, dim=-1):
            normal = dist.Normal(location("theta_at", 3) + mu, positive("theta_scale", 3))
            theta = pyro.sample("theta", normal.has_rsample_(reparameterised))
            with pyro.plate("items", 2, dim=-2):
                normal = dist.Normal(location("z_at", 2, 3) + theta, positive("z_scale", 2, 3))
                pyro.sample("z", normal.has_rsample_(reparameterised))

    return guide


def nested_auxiliary(y: Tensor) -> None:
    pyro.sample("mu", dist.Normal(location("mu_at"), positive("mu_scale")))
    pyro.sample("tau", dist.LogNormal(location("tau_at"), positive("tau_scale")))
    with pyro.plate("groups", 3, dim=-1):
        normal = dist.Normal(location("u_at", 3), positive("u_scale", 3))
        u = pyro.sample("u", normal, infer={"is_auxiliary": True})
        theta = pyro.sample("theta", dist.Normal(u, positive("theta_scale", 3)))
        with pyro.plate("items", 2, dim=-2):
            normal = dist.Normal(location("z_at", 2, 3) + theta, positive("z_scale", 2, 3))
            pyro.sample("z", normal.has_rsample_(False))


# ---- subsampled plates ----------------------------------------------------------------------------------------------


def subsampled_plates(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6, subsample_size=3, dim=-2) as rows:
        a = pyro.sample("a", dist.Normal(mu, 1.0))
        with pyro.plate("columns", 4, subsample_size=2, dim=-1) as columns:
            pyro.sample("y", dist.Normal(a, 0.8), obs=y[rows][:, columns])


def subsampled_guide(reparameterised: bool) -> Guide:
    def guide(y: Tensor) -> None:
        normal = dist.Normal(location("mu_at"), positive("mu_scale"))
        mu = pyro.sample("mu", normal.has_rsample_(reparameterised))
        with pyro.plate("rows", 6, subsample_size=3, dim=-2):
            normal = dist.Normal(location("a_at", 6, 1) + mu, positive("a_scale", 6, 1))
            pyro.sample("a", normal.has_rsample_(reparameterised))

    return guide


def subsampled_auxiliary(y: Tensor) -> None:
    pyro.sample("mu", dist.Normal(location("mu_at"), positive("mu_scale")))
    with pyro.plate("rows", 6, subsample_size=3, dim=-2):
        normal = dist.Normal(location("u_at", 6, 1), 1.0)
        u = pyro.sample("u", normal, infer={"is_auxiliary": True})
        pyro.sample("a", dist.Normal(u, positive("a_scale", 6, 1)))


# ---- poutine.scale and poutine.mask ---------------------------------------------------------------------------------

_KEPT = torch.tensor([True, False, True, True])


def scaled_and_masked(y: Tensor) -> None:
    with poutine.scale(scale=0.3):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)), poutine.mask(mask=_KEPT):
        z = pyro.sample("z", dist.Normal(a, 1.0))
        with poutine.scale(scale=torch.tensor([0.5, 1.0, 2.0, 3.0])):
            pyro.sample("y", dist.Normal(z, 0.6), obs=y)


def scaled_guide(reparameterised: bool) -> Guide:
    def guide(y: Tensor) -> None:
        with poutine.scale(scale=0.3):
            normal = dist.Normal(location("a_at"), positive("a_scale"))
            pyro.sample("a", normal.has_rsample_(reparameterised))
        with pyro.plate("data", len(y)), poutine.mask(mask=_KEPT):
            normal = dist.Normal(location("z_at", 4), positive("z_scale", 4))
            pyro.sample("z", normal.has_rsample_(reparameterised))

    return guide


def unscaled_guide(y: Tensor) -> None:
    pyro.sample("a", dist.Normal(location("a_at"), positive("a_scale")))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(location("z_at", 4), positive("z_scale", 4)))


# ---- discrete latents, outside and inside a plate -------------------------------------------------------------------


def discrete_latents(y: Tensor) -> None:
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    loc = pyro.sample("loc", dist.Normal(torch.zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        flip = pyro.sample("flip", dist.Bernoulli(0.3))
        count = pyro.sample("count", dist.Poisson(2.0))
        state = pyro.sample("state", dist.Categorical(torch.tensor([0.6, 0.4])))
        centre = loc + 0.5 * k + flip - 0.3 * count + 0.2 * state
        pyro.sample("y", dist.Normal(centre, 0.9), obs=y)


def finite_latents(y: Tensor) -> None:
    k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    with pyro.plate("data", len(y)):
        flip = pyro.sample("flip", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(0.5 * k + flip, 0.9), obs=y)


def finite_guide(y: Tensor) -> None:
    k = pyro.sample("k", dist.Categorical(simplex("k_probs", 3)))
    with pyro.plate("data", len(y)):
        logits = location("flip_logits", 4, at=-0.3) + 0.2 * k
        pyro.sample("flip", dist.Bernoulli(logits=logits))


def discrete_part(y: Tensor) -> None:
    pyro.sample("k", dist.Categorical(simplex("k_probs", 3)))
    with pyro.plate("data", len(y)):
        flip = pyro.sample("flip", dist.Bernoulli(probability("flip_probs", 4)))
        pyro.sample("count", dist.Poisson(positive("rate", 4, at=1.5) + flip))
        pyro.sample("state", dist.Categorical(simplex("state_probs", 4, 2)))


def discrete_guide(y: Tensor) -> None:
    pyro.sample("loc", dist.Normal(location("loc_at"), positive("loc_scale")))
    discrete_part(y)


def discrete_structured_guide(y: Tensor) -> None:
    discrete_part(y)
    auxiliary = {"is_auxiliary": True}
    u = pyro.sample("u", dist.Normal(location("loc_at"), positive("loc_scale")), infer=auxiliary)
    pyro.sample("loc", dist.Delta(u))


# ---- factors, several observed sites, partly observed data, parameters of the model ---------------------------------


def with_factors(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("attraction", -(theta**2).sum(-1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(theta[..., 0], 1.0))
        pyro.factor("misfit", -((z - y) ** 2) - 0.1 * theta[..., 1] * z)


def factor_guide(reparameterised: bool) -> Guide:
    def guide(y: Tensor) -> None:
        normal = diagonal_normal(location("theta_at", 2), positive("theta_scale", 2))
        theta = pyro.sample("theta", normal.has_rsample_(reparameterised))
        with pyro.plate("data", len(y)):
            normal = dist.Normal(location("z_at", 4) + theta[..., 1], positive("z_scale", 4))
            pyro.sample("z", normal.has_rsample_(reparameterised))

    return guide


def several_observed(y: Tensor) -> None:
    base = pyro.param("base", lambda: torch.tensor(0.2))
    width = pyro.param("width", lambda: torch.tensor(0.9), constraint=constraints.positive)
    theta = pyro.sample("theta", dist.Normal(base, 1.0))
    pyro.sample("total", dist.Normal(4 * theta, 2.0), obs=y.sum())
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, width), obs=y)
        pyro.sample("n", dist.Poisson(theta.exp()), obs=y.abs().round())
        pyro.sample("partly", dist.Normal(theta, 1.0), obs=y, obs_mask=_KEPT)


def several_guide(reparameterised: bool) -> Guide:
    def guide(y: Tensor) -> None:
        normal = dist.Normal(location("loc"), positive("scale"))
        pyro.sample("theta", normal.has_rsample_(reparameterised))
        with pyro.plate("data", len(y)):
            normal = dist.Normal(location("missing_at", 4), positive("missing_scale", 4))
            pyro.sample("partly_unobserved", normal.has_rsample_(reparameterised))

    return guide


# ---- a plate that is a Python loop ----------------------------------------------------------------------------------


def sequential_plate(y: Tensor) -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(y), subsample_size=2):
        z = pyro.sample(f"z_{i}", dist.Normal(mu, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(z, 0.5), obs=y[i])


def sequential_guide(reparameterised: bool) -> Guide:
    def guide(y: Tensor) -> None:
        normal = dist.Normal(location("mu_at"), positive("mu_scale"))
        pyro.sample("mu", normal.has_rsample_(reparameterised))
        at, scale = location("z_at", 4, event_dim=1), positive("z_scale", 4, event_dim=1)
        for i in pyro.plate("data", len(y), subsample_size=2):
            pyro.sample(f"z_{i}", dist.Normal(at[i], scale[i]).has_rsample_(reparameterised))

    return guide


def four_values() -> Tensor:
    return torch.tensor([0.4, -1.1, 1.9, 0.8])


PROBLEMS: dict[str, Problem] = {
    "one latent": Problem(
        one_latent,
        four_values,
        1,
        {
            "reparameterised": one_latent_guide(True),
            "score function": one_latent_guide(False),
            "auxiliary": one_latent_auxiliary,
            "through a delta": one_latent_through_delta,
        },
    ),
    "constrained supports": Problem(
        constrained_latents,
        four_values,
        1,
        {"reparameterised": constrained_guide(True), "score function": constrained_guide(False)},
    ),
    "nested plates": Problem(
        nested_plates,
        lambda: torch.tensor([[0.4, -1.1, 1.9], [0.8, -0.2, 1.3]]),
        2,
        {
            "reparameterised": nested_guide(True),
            "score function": nested_guide(False),
            "auxiliary": nested_auxiliary,
        },
    ),
    "subsampled plates": Problem(
        subsampled_plates,
        lambda: torch.linspace(-2, 2, 24).reshape(6, 4),
        2,
        {
            "reparameterised": subsampled_guide(True),
            "score function": subsampled_guide(False),
            "auxiliary": subsampled_auxiliary,
        },
    ),
    "scale and mask": Problem(
        scaled_and_masked,
        four_values,
        1,
        {
            "reparameterised": scaled_guide(True),
            "score function": scaled_guide(False),
            "unscaled": unscaled_guide,
        },
    ),
    "discrete latents": Problem(
        discrete_latents,
        four_values,
        1,
        {"score function": discrete_guide, "auxiliary": discrete_structured_guide},
        discrete=["k", "flip", "count", "state"],
    ),
    "finite latents": Problem(finite_latents, four_values, 1, {"score function": finite_guide}, discrete=["k", "flip"]),
    "factors": Problem(
        with_factors,
        four_values,
        1,
        {"reparameterised": factor_guide(True), "score function": factor_guide(False)},
    ),
    "several observed": Problem(
        several_observed,
        four_values,
        1,
        {"reparameterised": several_guide(True), "score function": several_guide(False)},
    ),
    "sequential plate": Problem(
        sequential_plate,
        four_values,
        0,
        {"reparameterised": sequential_guide(True), "score function": sequential_guide(False)},
    ),
}


class DiscretePart(autoguide.AutoGuide):
    """A hand-written part of an AutoGuideList, in the form that Pyro asks of parts that need plates."""

    def forward(self, y: Tensor) -> dict[str, Tensor]:
        plates = self._create_plates(y)
        values = {"k": pyro.sample("k", dist.Categorical(simplex("k_probs", 3)))}
        with plates["data"]:
            values["flip"] = pyro.sample("flip", dist.Bernoulli(probability("flip_probs", 4)))
            values["count"] = pyro.sample("count", dist.Poisson(positive("rate", 4, at=1.5) + values["flip"]))
            values["state"] = pyro.sample("state", dist.Categorical(simplex("state_probs", 4, 2)))
        return values


def list_of_normal_and_discrete(model: Callable[[Tensor], object]) -> Guide:
    """AutoNormal for the continuous sites, a hand-written guide without reparameterisation for the discrete ones."""
    discrete = PROBLEMS["discrete latents"].discrete
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoNormal(poutine.block(model, hide=discrete)))
    guide.append(DiscretePart(poutine.block(model, expose=discrete)))
    return guide


def list_of_two_autoguides(model: Callable[[Tensor], object]) -> Guide:
    """AutoDiagonalNormal for the first latent site, AutoDelta for the others."""
    with poutine.block():
        data = next(problem.data() for problem in PROBLEMS.values() if problem.model is model)
        first = next(iter(latent_names(model, data)))
    guide = autoguide.AutoGuideList(model)
    guide.append(autoguide.AutoDiagonalNormal(poutine.block(model, expose=[first])))
    guide.append(autoguide.AutoDelta(poutine.block(model, hide=[first])))
    return guide


def latent_names(model: Callable[[Tensor], object], data: Tensor) -> list[str]:
    trace = poutine.trace(model).get_trace(data)
    return [name for name in trace.stochastic_nodes if not name.startswith(("rows", "columns", "data"))]


AUTOGUIDES: dict[str, GuideFactory] = {
    "AutoDelta": autoguide.AutoDelta,
    "AutoNormal": autoguide.AutoNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoLaplaceApproximation": autoguide.AutoLaplaceApproximation,
    "AutoNormalizingFlow": lambda model: autoguide.AutoNormalizingFlow(
        model, partial(iterated, 2, partial(spline_autoregressive, hidden_dims=[12], count_bins=3))
    ),
    "AutoIAFNormal": lambda model: autoguide.AutoIAFNormal(model, hidden_dim=[12], num_transforms=2),
    "AutoStructured": autoguide.AutoStructured,
    "AutoStructured normal": lambda model: autoguide.AutoStructured(model, conditionals="normal"),
    "AutoStructured delta": lambda model: autoguide.AutoStructured(model, conditionals="delta"),
    "AutoGaussian": autoguide.AutoGaussian,
    "AutoGuideList": list_of_two_autoguides,
    "AutoNormalMessenger": autoguide.AutoNormalMessenger,
    "AutoHierarchicalNormalMessenger": autoguide.AutoHierarchicalNormalMessenger,
    "AutoRegressiveMessenger": autoguide.AutoRegressiveMessenger,
    "AutoDiscreteParallel": autoguide.AutoDiscreteParallel,
}

# ---- every guide with every problem, and what Pyro itself refuses ---------------------------------------------------

PAIRS: dict[tuple[str, str], GuideFactory] = {}
for _name, _problem in PROBLEMS.items():
    for _kind, _guide in _problem.guides.items():
        PAIRS[_name, _kind] = lambda model, guide=_guide: guide
    for _kind, _factory in AUTOGUIDES.items():
        PAIRS[_name, _kind] = _factory
PAIRS["discrete latents", "AutoGuideList of AutoNormal and a hand-written part"] = list_of_normal_and_discrete

CONTINUOUS_ONLY = "autoguides over real vectors refuse discrete sites"
NO_LOOPS = "autoguides refuse plates that are Python loops"
NO_LOOPS_MESSENGER = "guide messengers use a plate's dim, which a Python loop does not have"
DISCRETE_ONLY = "AutoDiscreteParallel refuses continuous sites"


def refusal(problem: str, guide: str) -> tuple[type[Exception], str] | None:
    """The exception that Pyro raises for this pair, and why; None where Pyro can do it."""
    if guide not in AUTOGUIDES:
        return None
    if guide == "AutoDiscreteParallel":
        return None if problem == "finite latents" else (NotImplementedError, DISCRETE_ONLY)
    if PROBLEMS[problem].discrete:
        return ValueError, CONTINUOUS_ONLY
    if problem == "sequential plate":
        return (TypeError, NO_LOOPS_MESSENGER) if "Messenger" in guide else (NotImplementedError, NO_LOOPS)
    return None


REFUSED = {pair: reason for pair in PAIRS if (reason := refusal(*pair)) is not None}
ACCEPTED = [pair for pair in PAIRS if pair not in REFUSED]
