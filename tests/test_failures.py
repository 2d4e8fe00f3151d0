"""What GeneralizedELBO makes of runs that failed: against sums by hand and against quadrature."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoStructured
from pyro.infer.autoguide.effect import AutoNormalMessenger
from pyro.optim import Adam
from sampling_checks import parameters
from scipy.optimize import minimize
from torch import Tensor

from pyrobirds import GeneralizedELBO, Simulator, fit, losses
from pyrobirds.divergences import KL

Y, W, PENALTY = 0.7, 0.5, 12.0
pytestmark = pytest.mark.usefixtures("double_precision")


class Cliff:
    """A deterministic simulator, x = theta at two times, that fails for theta > 0; it keeps the parameters it saw."""

    def __init__(self, failure: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        self.seen: list[Tensor] = []
        self.failure = failure or (lambda x, failed: torch.where(failed, math.nan, x))

    def __call__(self, theta: Tensor) -> Tensor:
        self.seen.append(theta.detach())
        return self.failure(theta.unsqueeze(-1).expand(-1, 2), (theta > 0).unsqueeze(-1))


def model_of(simulate: Simulator) -> Callable[..., Any]:
    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", simulate(theta), obs=y)

    return model


def guide(y: Tensor) -> None:
    loc = pyro.param("loc", torch.tensor(0.3))
    log_sd = pyro.param("log_sd", torch.tensor(-0.4))
    pyro.sample("theta", dist.Normal(loc, log_sd.exp()))


def series(*y: float) -> Tensor:
    return torch.tensor(y).unsqueeze(-1).expand(-1, 2)


ONE = torch.full((2,), Y)


def gradients() -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in parameters().items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that runs failed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".* runs at site .* failed")
        yield


# ---- drop: averages over survivors, by hand -------------------------------------------------------------------------


@pytest.mark.parametrize("vectorized", [True, False])
def test_drop_averages_over_the_survivors(vectorized: bool) -> None:
    cliff = Cliff()
    elbo = GeneralizedELBO(0.0, num_particles=8, vectorize_particles=vectorized)
    with quiet():
        elbo.loss_and_grads(model_of(Simulator(cliff, loss=losses.mse)), guide, ONE)
    theta = torch.cat(cliff.seen)[-8:]
    alive = theta[theta <= 0]
    assert 0 < len(alive) < 8
    terms = elbo.terms
    assert terms.num_failed == 8 - len(alive)
    torch.testing.assert_close(terms.loss, (alive - Y).square().mean())
    noise = (alive - 0.3) / math.exp(-0.4)
    found = gradients()
    torch.testing.assert_close(found["loc"], (2 * (alive - Y)).mean())
    torch.testing.assert_close(found["log_sd"], (2 * (alive - Y) * noise * math.exp(-0.4)).mean())


@pytest.mark.parametrize("vectorized", [True, False])
def test_each_series_averages_over_its_own_survivors(vectorized: bool) -> None:
    cliff = Cliff()
    simulate = Simulator(cliff, loss=losses.mse)
    offset = torch.tensor([-0.5, 0.0, 0.5])

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("series", 3):
            pyro.sample("x", simulate(theta + offset), obs=y)

    elbo = GeneralizedELBO(0.0, num_particles=9, vectorize_particles=vectorized, max_plate_nesting=1)
    with quiet():
        elbo.loss_and_grads(model, guide, series(Y, -0.2, 0.1))
    theta = torch.cat([seen.reshape(-1, 3) for seen in cliff.seen])[-9:]
    loss, slope = 0.0, 0.0
    for column, y in zip(theta.T, (Y, -0.2, 0.1), strict=True):
        alive = column[column <= 0]
        assert len(alive)
        loss += (alive - y).square().mean()
        slope += (2 * (alive - y)).mean()
    assert elbo.terms.num_failed == (theta > 0).sum() > 0
    torch.testing.assert_close(elbo.terms.loss, loss)
    torch.testing.assert_close(gradients()["loc"], slope)


def test_a_series_without_survivors_is_left_out_and_after_ten_times_an_error() -> None:
    simulate = Simulator(Cliff(), loss=losses.mse)
    offset = torch.tensor([-50.0, 50.0])

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("series", 2):
            pyro.sample("x", simulate(theta + offset), obs=y)

    elbo = GeneralizedELBO(0.0, num_particles=4, max_plate_nesting=1)
    y = series(0.0, 0.0)
    with pytest.warns(UserWarning, match=r"4 of 8 runs at site 'x' failed \(50%\)"):
        elbo.loss_and_grads(model, guide, y)
    assert elbo.terms.loss.isfinite()
    for _ in range(8):
        elbo.loss_and_grads(model, guide, y)
    with pytest.raises(RuntimeError, match=r"all runs of the element \(1,\) of its plates failed in 10 evaluations"):
        elbo.loss_and_grads(model, guide, y)


def test_what_is_masked_out_does_not_count() -> None:
    simulate = Simulator(Cliff(), loss=losses.mse)

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("series", 2), pyro.poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("x", simulate(theta + torch.tensor([-50.0, 50.0])), obs=y)

    elbo = GeneralizedELBO(0.0, num_particles=4, max_plate_nesting=1, on_failure="raise")
    elbo.loss_and_grads(model, guide, series(0.0, 0.0))
    assert elbo.terms.num_failed == 0


def test_without_failures_nothing_changes() -> None:
    def run(cliff: Callable[[Tensor], Tensor], **options: Any) -> tuple[Tensor, dict[str, Tensor]]:
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        elbo = GeneralizedELBO(W, max_plate_nesting=0, **options)
        elbo.loss_and_grads(model_of(Simulator(cliff, loss=losses.mse)), guide, ONE)
        assert elbo.terms.num_failed == 0
        return elbo.terms.total, gradients()

    total, found = run(lambda theta: theta.unsqueeze(-1).expand(-1, 2))
    by_pyro = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=0)
    for other, other_found in (
        run(lambda theta: theta.unsqueeze(-1).expand(-1, 2), on_failure="raise"),
        run(lambda theta: theta.unsqueeze(-1).expand(-1, 2), max_failed=0.0),
    ):
        assert torch.equal(total, other)
        assert all(torch.equal(found[name], other_found[name]) for name in found)
    assert by_pyro.max_plate_nesting == 1


# ---- penalize: the penalised objective, by quadrature ---------------------------------------------------------------


def penalised(loc: Any, log_sd: Any, w: float = W) -> Tensor:
    """The objective of Normal(loc, exp(log_sd)), differentiable: the trapezoidal rule on either side of the cliff."""
    loc, log_sd = torch.as_tensor(loc), torch.as_tensor(log_sd)
    q, prior = torch.distributions.Normal(loc, log_sd.exp()), torch.distributions.Normal(0.0, 1.0)
    theta = torch.linspace(-12.0, 0.0, 20_001)
    loss = torch.trapezoid((theta - Y).square() * q.log_prob(theta).exp(), theta)
    failing = 1 - q.cdf(torch.tensor(0.0))
    return loss + PENALTY * failing + w * torch.distributions.kl_divergence(q, prior)


def standardised(estimates: Tensor, exact: Tensor) -> float:
    error = estimates.std(0) / math.sqrt(len(estimates))
    return float(((estimates.mean(0) - exact) / error).abs().max())


@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("divergence", [KL(), KL(analytic=False)])
def test_penalised_values_and_gradients_are_those_of_the_penalised_objective(vectorized: bool, divergence: KL) -> None:
    at = torch.tensor([0.3, -0.4], requires_grad=True)
    value = penalised(*at)
    (exact,) = torch.autograd.grad(value, at)
    model = model_of(Simulator(Cliff(), loss=losses.mse))
    n, times = (500, 100) if vectorized else (5, 400)
    options: dict[str, Any] = {"num_particles": n, "vectorize_particles": vectorized, "divergence": divergence}
    elbo = GeneralizedELBO(W, on_failure="penalize", penalty=PENALTY, max_failed=1.0, **options)
    values, estimates = [], []
    with quiet():
        for _ in range(times):
            elbo.loss_and_grads(model, guide, ONE)
            values.append(elbo.terms.total)
            found = gradients()
            estimates.append(torch.stack([found["loc"], found["log_sd"]]))
            for parameter in parameters().values():
                parameter.grad = None
    # Three normal statistics beyond 5 standard errors: a chance of 2e-6 in each of four tests.
    assert standardised(torch.stack(values), value.detach()) < 5
    assert standardised(torch.stack(estimates), exact) < 5


def test_the_penalised_gradient_with_plates_and_other_sites_and_parameters_of_the_model() -> None:
    """Two series with a level of their own each, an ordinary likelihood, and a bias that the model learns."""
    simulate = Simulator(Cliff(), loss=losses.mse)
    y = series(Y, -0.2)

    def model(y: Tensor) -> None:
        bias = pyro.param("bias", torch.tensor(-0.1))
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        pyro.sample("plain", dist.Normal(top, 1.0), obs=torch.tensor(0.4))
        with pyro.plate("series", 2):
            theta = pyro.sample("theta", dist.Normal(top, 1.0))
            pyro.sample("x", simulate(theta + bias), obs=y)

    def own_guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-0.3, 0.2]))
        pyro.sample("top", dist.Normal(pyro.param("top_loc", torch.tensor(0.1)), 0.5))
        with pyro.plate("series", 2):
            pyro.sample("theta", dist.Normal(loc, 0.6))

    # The exact objective: each series by the trapezoidal rule, the rest in closed form.
    bias = torch.tensor(-0.1, requires_grad=True)
    loc = torch.tensor([-0.3, 0.2], requires_grad=True)
    top = torch.tensor(0.1, requires_grad=True)
    total = 0.5 * ((top - 0.4) ** 2 + 0.25)  # minus the expected log-density of "plain", without its constant
    total = total + W * 0.5 * (top**2 + 0.25) + W * 0.5 * ((loc - top) ** 2 + 0.25 + 0.36).sum()
    for centre, observed in zip(loc, (Y, -0.2), strict=True):
        q = torch.distributions.Normal(centre + bias, 0.6)
        x = torch.linspace(-10.0, 0.0, 20_001)
        # The learnt bias moves the draws, and not the density under q: its derivative sees the survivors alone.
        total = total + PENALTY * (1 - torch.distributions.Normal(centre + bias.detach(), 0.6).cdf(torch.tensor(0.0)))
        density = torch.distributions.Normal(centre + bias.detach(), 0.6).log_prob(x).exp()
        total = total + torch.trapezoid((x + (bias - bias.detach()) - observed).square() * density, x)
        del q
    exact = dict(zip(("bias", "loc", "top_loc"), torch.autograd.grad(total, [bias, loc, top]), strict=True))

    assert_gradients(model, own_guide, exact, y, max_plate_nesting=1)


def trapezoid(f: Callable[[Tensor], Tensor], loc: Tensor, sd: float) -> Tensor:
    """The expectation of f under Normal(loc, sd), with a grid point at f's jump in 0."""
    x = torch.linspace(-8.0, 8.0, 32_001)
    halves = [(x <= 0, -1e-12), (x >= 0, 1e-12)]
    values = [torch.trapezoid(f(x[half] + nudge) * _density(x[half], loc, sd), x[half]) for half, nudge in halves]
    return values[0] + values[1]


def _density(x: Tensor, loc: Tensor, sd: float) -> Tensor:
    return torch.distributions.Normal(loc, sd).log_prob(x).exp()


def assert_gradients(model: Any, own_guide: Any, exact: dict[str, Tensor], y: Tensor = ONE, **options: Any) -> None:
    """The penalised gradient is on average the exact one: within 5 standard errors."""
    elbo = GeneralizedELBO(W, num_particles=300, on_failure="penalize", penalty=PENALTY, **options)
    estimates: dict[str, list[Tensor]] = {name: [] for name in exact}
    with quiet():
        for _ in range(100):
            elbo.loss_and_grads(model, own_guide, y)
            for name, gradient in gradients().items():
                estimates[name].append(gradient)
            for parameter in parameters().values():
                parameter.grad = None
    for name, expected in exact.items():
        assert standardised(torch.stack(estimates[name]), expected) < 5, name


def penalised_loss(x: Tensor) -> Tensor:
    return torch.where(x > 0, PENALTY, (x - Y).square())


@pytest.mark.parametrize("how", ["subsampled", "scaled guide", "masked by the draw"])
def test_scales_and_masks_weigh_costs_and_not_scores(how: str) -> None:
    simulate = Simulator(Cliff(), loss=losses.mse)

    def model(y: Tensor) -> None:
        if how == "subsampled":
            with pyro.plate("series", 4, subsample_size=2):
                theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
                pyro.sample("x", simulate(theta), obs=y)
            return
        with pyro.poutine.scale(scale=0.3):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        mask = theta <= 0.5 if how == "masked by the draw" else torch.ones_like(theta).bool()
        with pyro.poutine.mask(mask=mask):
            pyro.sample("x", simulate(theta), obs=y)

    def own_guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-0.3, 0.2, 0.1, -0.5]) if how == "subsampled" else torch.tensor(-0.2))
        if how == "subsampled":
            with pyro.plate("series", 4, subsample_size=2) as index:
                pyro.sample("theta", dist.Normal(loc[index], 0.6))
        else:
            with pyro.poutine.scale(scale=0.3):
                pyro.sample("theta", dist.Normal(loc, 0.6))

    def f(x: Tensor) -> Tensor:
        return torch.where(x <= 0.5, penalised_loss(x), 0.0) if how == "masked by the draw" else penalised_loss(x)

    loc = torch.tensor([-0.3, 0.2, 0.1, -0.5] if how == "subsampled" else [-0.2], requires_grad=True)
    scale = 1.0 if how == "subsampled" else 0.3
    total = sum(trapezoid(f, one, 0.6) + scale * W * 0.5 * one**2 for one in loc)
    (exact,) = torch.autograd.grad(total, loc)
    assert_gradients(model, own_guide, {"loc": exact if how == "subsampled" else exact[0]})


@pytest.mark.parametrize("fails", [True, False])
def test_a_discrete_latent_that_hangs_on_a_penalised_one(fails: bool) -> None:
    """Nothing is counted twice: the discrete latent's score runs through the other one as well."""
    simulate = Simulator(Cliff() if fails else lambda theta: theta.unsqueeze(-1).expand(-1, 2), loss=losses.mse)

    def model(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        d = pyro.sample("d", dist.Bernoulli(0.5))
        pyro.sample("x", simulate(a + d - 0.5), obs=y)

    def own_guide(y: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(pyro.param("loc", torch.tensor(-0.2)), 0.6))
        pyro.sample("d", dist.Bernoulli(logits=2 * a + pyro.param("logit", torch.tensor(0.3))))

    loc, logit = torch.tensor(-0.2, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    a = torch.linspace(-6.0, 6.0, 48_001)
    p = (2 * a + logit).sigmoid()
    loss = penalised_loss if fails else lambda x: (x - Y).square()
    entropy = p * p.log() + (1 - p) * (1 - p).log() + math.log(2.0)
    inner = p * loss(a + 0.5) + (1 - p) * loss(a - 0.5) + W * entropy
    total = torch.trapezoid(inner * _density(a, loc, 0.6), a) + W * 0.5 * loc**2
    exact = dict(zip(("loc", "logit"), torch.autograd.grad(total, [loc, logit]), strict=True))
    assert_gradients(model, own_guide, exact)


def test_masked_latents_have_their_score() -> None:
    """A mask leaves the latent out of the divergence; the loss hangs on it all the same."""
    simulate = Simulator(Cliff(), loss=losses.mse)
    mask = torch.tensor([True, False])

    def model(y: Tensor) -> None:
        with pyro.plate("series", 2):
            with pyro.poutine.mask(mask=mask):
                theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("x", simulate(theta), obs=y)

    def own_guide(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-0.3, 0.2]))
        with pyro.plate("series", 2), pyro.poutine.mask(mask=mask):
            pyro.sample("theta", dist.Normal(loc, 0.6))

    loc = torch.tensor([-0.3, 0.2], requires_grad=True)
    total = sum(trapezoid(penalised_loss, one, 0.6) for one in loc) + W * 0.5 * loc[0] ** 2
    (exact,) = torch.autograd.grad(total, loc)
    assert_gradients(model, own_guide, {"loc": exact})


def test_a_site_that_is_masked_out_has_no_loss() -> None:
    simulate = Simulator(Cliff(), loss=losses.mse)

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("series", 2), pyro.poutine.mask(mask=torch.tensor([False, False])):
            pyro.sample("x", simulate(theta.unsqueeze(-1).expand(*theta.shape, 2)[..., :]), obs=y)

    elbo = GeneralizedELBO(W, num_particles=1, vectorize_particles=False)
    elbo.loss_and_grads(model, guide, series(0.0, 0.0))
    assert elbo.terms.loss == 0
    assert elbo.terms.num_failed == 0


def test_a_guide_with_random_numbers_outside_of_its_sites_cannot_penalise() -> None:
    def dropping(y: Tensor) -> None:
        loc = torch.nn.functional.dropout(pyro.param("loc", torch.ones(9))).sum()
        pyro.sample("theta", dist.Normal(loc, 0.7))

    elbo = GeneralizedELBO(W, on_failure="penalize", penalty=1.0, vectorize_particles=False)
    with pytest.raises(ValueError, match=r"another density of 'theta' when it is run again at the same draws"):
        elbo.loss_and_grads(model_of(Simulator(Cliff(), loss=losses.mse)), dropping, ONE)


def test_a_mask_that_leaves_the_failing_draws_out_leaves_no_nan() -> None:
    simulate = Simulator(Cliff(), loss=losses.mse)

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.poutine.mask(mask=theta <= 0):
            pyro.sample("x", simulate(theta), obs=y)

    for options in ({}, {"on_failure": "penalize", "penalty": 3.0}):
        elbo = GeneralizedELBO(W, **options)  # type: ignore[arg-type]
        elbo.loss_and_grads(model, guide, ONE)
        assert elbo.terms.num_failed == 0
        assert all(gradient.isfinite() for gradient in gradients().values())


def test_dropped_elements_without_survivors_do_not_make_failing_pay() -> None:
    """A plate of switches: up fails, down has loss 1. Whatever fails, the loss is 40 and its gradient zero."""

    def simulate(theta: Tensor) -> Tensor:
        return torch.where(theta > 0, math.nan, theta).unsqueeze(-1)

    site = Simulator(simulate, loss=losses.mse)

    def model(y: Tensor) -> None:
        with pyro.plate("switches", 40):
            up = pyro.sample("up", dist.Bernoulli(0.5))
            pyro.sample("x", site(2 * up - 1 + 0 * up), obs=y)

    def switches(y: Tensor) -> None:
        logit = pyro.param("logit", torch.tensor(0.0))
        with pyro.plate("switches", 40):
            pyro.sample("up", dist.Bernoulli(logits=logit).expand([40]))

    for num_particles in (1, 2):
        estimates = []
        with quiet():
            for _ in range(300):
                elbo = GeneralizedELBO(0.0, num_particles=num_particles, max_plate_nesting=1)  # that counts no streak
                elbo.loss_and_grads(model, switches, torch.zeros(1))
                assert elbo.terms.loss == pytest.approx(40.0)
                estimates.append(gradients()["logit"])
                parameters()["logit"].grad = None
        assert abs(torch.stack(estimates).mean()) < 5 * torch.stack(estimates).std() / math.sqrt(300) + 1e-9


def best_penalised(w: float = W) -> NDArray[np.float64]:
    best = minimize(lambda at: float(penalised(*at, w)), [-1.0, -0.5], method="Nelder-Mead", options={"xatol": 1e-8})
    return best.x


def failing(loc: float, log_sd: float) -> float:
    return 1 - float(torch.distributions.Normal(loc, math.exp(log_sd)).cdf(torch.tensor(0.0)))


@pytest.mark.parametrize("batched", [True, False])
def test_penalize_finds_the_minimum_of_the_penalised_objective(batched: bool) -> None:
    cliff = Cliff()
    simulate = Simulator(cliff if batched else lambda theta: cliff(theta.unsqueeze(0))[0], losses.mse, batched=batched)
    elbo = GeneralizedELBO(W, num_particles=50, on_failure="penalize", penalty=PENALTY, max_failed=1.0)
    with quiet():
        fit(SVI(model_of(simulate), guide, Adam({"lr": 0.02}), elbo), ONE, num_steps=1000, progress=False)
    at = {name: parameter.item() for name, parameter in parameters().items()}
    best = best_penalised()
    assert failing(0.3, -0.4) > 0.6
    assert failing(*best) < 0.1
    # The objective is flat where it is least, so that the probability is known less well than the objective.
    assert failing(at["loc"], at["log_sd"]) == pytest.approx(failing(*best), rel=0.5)
    assert float(penalised(at["loc"], at["log_sd"])) < 1.005 * float(penalised(*best))


def test_drop_exerts_no_pull_away_from_where_runs_fail() -> None:
    elbo = GeneralizedELBO(4.0, num_particles=50)
    svi = SVI(model_of(Simulator(Cliff(), loss=losses.mse)), guide, Adam({"lr": 0.02}), elbo)
    with quiet():
        fit(svi, ONE, num_steps=400, progress=False)
    at = {name: parameter.item() for name, parameter in parameters().items()}
    assert failing(at["loc"], at["log_sd"]) > 0.6
    assert failing(*best_penalised(4.0)) < 0.3
    assert float(penalised(at["loc"], at["log_sd"], 4.0)) > 1.3 * float(penalised(*best_penalised(4.0), 4.0))


def test_drop_may_lead_to_where_all_runs_fail_and_says_so() -> None:
    svi = SVI(model_of(Simulator(Cliff(), loss=losses.mse)), guide, Adam({"lr": 0.02}), GeneralizedELBO(W))
    with quiet(), pytest.raises(RuntimeError, match="nothing to average over"):
        fit(svi, ONE, num_steps=1000, progress=False)


def test_one_particle_has_no_baseline() -> None:
    at = torch.tensor([0.3, -0.4], requires_grad=True)
    (exact,) = torch.autograd.grad(penalised(*at), at)
    elbo = GeneralizedELBO(W, num_particles=1, on_failure="penalize", penalty=PENALTY, max_failed=1.0)
    model = model_of(Simulator(Cliff(), loss=losses.mse))
    estimates = []
    with quiet():
        for _ in range(3000):
            elbo.loss_and_grads(model, guide, ONE)
            found = gradients()
            estimates.append(torch.stack([found["loc"], found["log_sd"]]))
            for parameter in parameters().values():
                parameter.grad = None
    assert standardised(torch.stack(estimates), exact) < 5


@pytest.mark.parametrize("policy", ["drop", "penalize"])
def test_discrete_latents_get_their_score_once(policy: str) -> None:
    """A switch between a theta that fails and one that does not, both by enumeration."""
    simulate = Simulator(Cliff(), loss=losses.mse)

    def model(y: Tensor) -> None:
        up = pyro.sample("up", dist.Bernoulli(0.5))
        pyro.sample("x", simulate(2 * up - 1.0), obs=y)

    def switch(y: Tensor) -> None:
        pyro.sample("up", dist.Bernoulli(logits=pyro.param("logit", torch.tensor(0.4))))

    logit = torch.tensor(0.4, requires_grad=True)
    p = logit.sigmoid()
    q, prior = torch.distributions.Bernoulli(p), torch.distributions.Bernoulli(0.5)
    down = (-1 - Y) ** 2
    expected = p * PENALTY + (1 - p) * down if policy == "penalize" else torch.tensor(down)  # survivors all alike
    total = expected + W * torch.distributions.kl_divergence(q, prior)
    (exact,) = torch.autograd.grad(total, logit)
    penalty = PENALTY if policy == "penalize" else None
    elbo = GeneralizedELBO(W, num_particles=50, on_failure=policy, penalty=penalty, max_plate_nesting=0)  # type: ignore
    estimates, values = [], []
    with quiet():
        for _ in range(200):
            elbo.loss_and_grads(model, switch, ONE)
            values.append(elbo.terms.total)
            estimates.append(gradients()["logit"])
            parameters()["logit"].grad = None
    if policy == "penalize":
        assert standardised(torch.stack(values), total.detach()) < 5
        assert standardised(torch.stack(estimates), exact) < 5
    else:
        torch.testing.assert_close(torch.stack(values).mean(), total.detach())
        # All survivors have the same loss, which is what the failed ones count as: no noise is left but the baseline's.
        assert standardised(torch.stack(estimates), exact) < 5


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (AutoDelta, r"moves its draw of 'theta' by its parameters after drawing it"),
        (AutoStructured, r"moves its draw of 'theta'"),
        (AutoNormalMessenger, r"a AutoNormalMessenger has no log-density at fixed draws"),
    ],
)
def test_guides_without_a_density_at_fixed_draws_cannot_penalise(make: Any, match: str) -> None:
    model = model_of(Simulator(Cliff(), loss=losses.mse))
    made = make(model, conditionals={"theta": "normal"}, dependencies={}) if make is AutoStructured else make(model)
    made(ONE)
    elbo = GeneralizedELBO(W, on_failure="penalize", penalty=1.0)
    with pytest.raises(ValueError, match=match):
        elbo.loss_and_grads(model, made, ONE)


def test_autoguides_penalise() -> None:
    model = model_of(Simulator(Cliff(), loss=losses.mse))
    for make in (AutoNormal, AutoMultivariateNormal):
        pyro.clear_param_store()
        made = make(model, init_scale=1.0)
        elbo = GeneralizedELBO(W, num_particles=50, on_failure="penalize", penalty=PENALTY)
        with quiet():
            fit(SVI(model, made, Adam({"lr": 0.02}), elbo), ONE, num_steps=1000, progress=False)
        with torch.no_grad():
            draws = torch.stack([made(ONE)["theta"] for _ in range(2000)])
        share, expected = float((draws > 0).double().mean()), failing(*best_penalised())
        assert abs(share - expected) < 5 * math.sqrt(expected / 2000) + 0.01


# ---- what the user is told ------------------------------------------------------------------------------------------


FAILURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "NaN": lambda x, failed: torch.where(failed, math.nan, x),
    "infinity": lambda x, failed: torch.where(failed, -math.inf, x),
    "poison": lambda x, failed: x * torch.where(failed, math.nan, 1.0) + (-x).sqrt().nan_to_num(0.0) * 0,
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_runs_do_not_poison_the_gradient(failure: str) -> None:
    elbo = GeneralizedELBO(W, max_plate_nesting=0)
    model = model_of(Simulator(Cliff(FAILURES[failure]), loss=losses.mse))
    with quiet():
        elbo.loss_and_grads(model, guide, ONE)
    assert 0 < elbo.terms.num_failed < 10
    assert all(gradient.isfinite() and gradient != 0 for gradient in gradients().values())


def test_a_warning_once_with_the_share_and_some_parameters() -> None:
    elbo = GeneralizedELBO(W)
    model = model_of(Simulator(Cliff(), loss=losses.mse))
    with pytest.warns(UserWarning, match=r"failed") as caught:
        elbo.loss_and_grads(model, guide, ONE)
    for _ in range(5):
        elbo.loss_and_grads(model, guide, ONE)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert caught[0].filename == __file__
    assert "of 10 runs at site 'x' failed (" in text
    assert "for example at theta = " in text
    shown = [float(number) for number in text.split("theta = ")[1].split(". They")[0].split(", ")]
    assert shown
    assert all(number > 0 for number in shown)
    assert "dropped: the loss is averaged over the others" in text


def test_raise() -> None:
    elbo = GeneralizedELBO(W, on_failure="raise")
    svi = SVI(model_of(Simulator(Cliff(), loss=losses.mse)), guide, Adam({"lr": 0.1}), elbo)
    with pytest.raises(RuntimeError, match=r"of 10 runs at site 'x' failed .* pass on_failure='drop' or 'penalize'"):
        svi.step(ONE)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in parameters().values())
    assert parameters()["loc"].item() == 0.3


def all_fail(theta: Tensor) -> Tensor:
    return theta.unsqueeze(-1).expand(-1, 2) * math.nan


def test_all_failed_is_an_error_that_leaves_no_gradient() -> None:
    elbo = GeneralizedELBO(W)
    svi = SVI(model_of(Simulator(all_fail, loss=losses.mse)), guide, Adam({"lr": 0.1}), elbo)
    with pytest.raises(RuntimeError, match=r"10 of 10 runs at site 'x' failed \(100%\).*nothing to average over"):
        svi.step(ONE)
    assert all(not parameter.grad.any() for parameter in parameters().values() if parameter.grad is not None)
    with pytest.raises(RuntimeError, match="nothing to average over"):
        svi.evaluate_loss(ONE)


def test_all_failed_without_a_look_at_it_is_nan() -> None:
    elbo = GeneralizedELBO(W, max_plate_nesting=0)
    with pyro.validation_enabled(False):
        total = elbo.differentiable_loss(model_of(Simulator(all_fail, loss=losses.mse)), guide, ONE)
    assert total.isnan()
    assert elbo.terms.num_failed == 10
    total.backward()
    assert all(gradient.isfinite() for gradient in gradients().values())  # the divergence's


@pytest.mark.parametrize(
    ("policy", "match"), [("drop", "nothing to average over"), ("raise", "pass on_failure='drop'")]
)
def test_the_torch_module_says_so_too(policy: Any, match: str) -> None:
    model = model_of(Simulator(all_fail, loss=losses.mse))
    objective = GeneralizedELBO(W, on_failure=policy)(model, AutoNormal(model))
    with pytest.raises(RuntimeError, match=match):
        objective(ONE)


def test_the_limit() -> None:
    elbo = GeneralizedELBO(W, num_particles=100, max_failed=0.3)
    model = model_of(Simulator(Cliff(), loss=losses.mse))
    with quiet():
        for _ in range(9):
            elbo.loss_and_grads(model, guide, ONE)
        with pytest.raises(RuntimeError, match=r"the share was above max_failed=30% in 10 evaluations in a row"):
            elbo.loss_and_grads(model, guide, ONE)


def test_failures_in_backward_do_not_hide_those_in_forward() -> None:
    def both(theta: Tensor) -> Tensor:
        fails = torch.arange(len(theta)) > 1
        x = torch.where(fails, math.nan, (theta - theta.detach() * (torch.arange(len(theta)) == 0)).abs().sqrt())
        return x.unsqueeze(-1).expand(-1, 2)

    elbo = GeneralizedELBO(W, num_particles=40, max_plate_nesting=0)
    model = model_of(Simulator(both, loss=losses.mse))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(9):
            elbo.loss_and_grads(model, guide, ONE)
            assert elbo.terms.num_failed == 39  # 38, and the gradient of one
        with pytest.raises(RuntimeError, match=r"above max_failed=90% in 10 evaluations in a row"):
            elbo.loss_and_grads(model, guide, ONE)


def test_plates_whose_size_is_drawn_can_be_run_one_after_another() -> None:
    simulate = Simulator(lambda theta: theta.unsqueeze(-1).expand(-1, 2), loss=losses.mse)

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        size = 1 + int(theta > 0)
        with pyro.plate("some", size):
            pyro.sample("x", simulate(theta.expand(size)), obs=y)

    elbo = GeneralizedELBO(W, num_particles=8, vectorize_particles=False)
    elbo.loss_and_grads(model, guide, ONE)
    assert elbo.terms.total.isfinite()


def test_the_exception_is_named_at_every_fit() -> None:
    message = "first"

    def breaks(theta: Tensor) -> Tensor:
        if message:
            raise ArithmeticError(message)
        return theta.unsqueeze(-1).expand(-1, 2)

    simulate = Simulator(breaks, loss=losses.mse)
    message = ""
    GeneralizedELBO(W).loss_and_grads(model_of(simulate), guide, ONE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for message in ("first", "second"):
            with pytest.raises(RuntimeError, match=rf"10 of 10 runs .* with 'ArithmeticError: {message}': there is"):
                GeneralizedELBO(W).loss_and_grads(model_of(simulate), guide, ONE)


@pytest.mark.parametrize("policy", ["drop", "penalize"])
def test_failures_in_plates_whose_size_is_drawn(policy: Any) -> None:
    """Of all elements of all particles those that did not fail are averaged over."""
    seen: list[Tensor] = []

    def fails_alone(theta: Tensor) -> Tensor:
        seen.append(theta.detach())
        return (theta if len(theta) > 1 else theta * math.nan).unsqueeze(-1).expand(-1, 2)

    simulate = Simulator(fails_alone, loss=losses.mse)

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        size = 1 + int(theta > 0)
        with pyro.plate("some", size):
            pyro.sample("x", simulate(theta.expand(size)), obs=y)

    penalty = 3.0 if policy == "penalize" else None
    elbo = GeneralizedELBO(0.0, num_particles=8, vectorize_particles=False, on_failure=policy, penalty=penalty)
    with quiet():
        elbo.loss_and_grads(model, guide, ONE)
    runs = seen[-8:]
    alone = sum(len(theta) == 1 for theta in runs)
    assert 0 < alone < 8
    assert elbo.terms.num_failed == alone
    survivors = torch.cat([(theta - Y).square() for theta in runs if len(theta) > 1])
    number = sum(map(len, runs))
    expected = survivors.mean() * number / 8 if penalty is None else (survivors.sum() + alone * penalty) / 8
    torch.testing.assert_close(elbo.terms.loss, expected)


def test_the_limit_is_for_evaluations_in_a_row() -> None:
    fails = iter([True] * 9 + [False] + [True] * 9)

    def sometimes(theta: Tensor) -> Tensor:
        x = theta.unsqueeze(-1).expand(-1, 2)
        return torch.cat([x[:1], x[1:] * math.nan]) if next(fails) else x

    elbo = GeneralizedELBO(W, max_failed=0.5, max_plate_nesting=0)
    model = model_of(Simulator(sometimes, loss=losses.mse))
    with quiet():
        for _ in range(19):
            elbo.loss_and_grads(model, guide, ONE)


def test_penalised_runs_may_all_fail_for_a_while() -> None:
    elbo = GeneralizedELBO(W, on_failure="penalize", penalty=3.0, max_plate_nesting=0)
    model = model_of(Simulator(all_fail, loss=losses.mse))
    with pytest.warns(UserWarning, match=r"They have the loss `penalty`"):
        elbo.loss_and_grads(model, guide, ONE)
    assert elbo.terms.loss == 3.0
    for _ in range(8):
        elbo.loss_and_grads(model, guide, ONE)
    with pytest.raises(RuntimeError, match=r"above max_failed=90% in 10 evaluations in a row"):
        elbo.loss_and_grads(model, guide, ONE)


class NanBackward(torch.autograd.Function):
    """The identity, with a gradient that is NaN for theta > 0."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(theta)
        return theta.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (theta,) = ctx.saved_tensors
        return torch.where(theta > 0, math.nan, gradient)


@pytest.mark.parametrize("batched", [True, False])
def test_gradients_that_fail_are_dropped_counted_and_told_of(batched: bool) -> None:
    def simulate(theta: Tensor) -> Tensor:
        x = NanBackward.apply(theta)
        return x.unsqueeze(-1).expand(*x.shape, 2)

    warnings.filterwarnings("ignore", "simulate runs in a Python loop")
    elbo = GeneralizedELBO(W, max_plate_nesting=0)
    model = model_of(Simulator(simulate, loss=losses.mse, batched=batched))
    with pytest.warns(UserWarning, match=r"the gradient of \d of 10 runs at site 'x' is not finite .* count as zero"):
        elbo.loss_and_grads(model, guide, ONE)
    assert 0 < elbo.terms.num_failed < 10
    assert all(gradient.isfinite() for gradient in gradients().values())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (
            {"on_failure": "ignore"},
            ValueError,
            r"on_failure must be one of .*'drop', 'penalize', 'raise'.*, got 'ignore'",
        ),
        ({"on_failure": "penalize"}, ValueError, r"penalty, the loss of a failed run, goes with on_failure='penalize'"),
        ({"penalty": 3.0}, ValueError, r"got penalty=3.0 and on_failure='drop'"),
        ({"on_failure": "penalize", "penalty": math.inf}, ValueError, r"penalty must be a finite number"),
        ({"on_failure": "penalize", "penalty": "3"}, TypeError, r"penalty must be a number"),
        ({"max_failed": 1.5}, ValueError, r"max_failed must be a finite number between 0 and 1"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        GeneralizedELBO(**arguments)
