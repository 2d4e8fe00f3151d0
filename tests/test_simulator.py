"""What a site with a Simulator does in Pyro."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam, ClippedAdam
from simulators_for_tests import Counted, drift, fixed_at, model_of
from torch import Tensor

from pyrobirds import GeneralizedELBO, Simulator, losses, models, tempered
from pyrobirds.divergences import KL

T = 5
Y = torch.tensor([0.5, -0.2, 1.0, 0.3, 0.1])


def simulator(**options: object) -> Simulator:
    return Simulator(drift, loss=losses.mse, n_timesteps=T, **options)


def test_scoring_is_minus_the_loss_of_a_fresh_run() -> None:
    theta = torch.linspace(-1, 1, 6)
    pyro.set_rng_seed(3)
    scored = simulator()(theta).log_prob(Y)
    pyro.set_rng_seed(3)
    by_hand = -losses.mse(drift(theta, T), Y.expand(6, T))
    assert torch.equal(scored, by_hand)


def test_the_function_sees_one_batch_dimension_whatever_the_plates() -> None:
    seen = {}

    def watched(theta: Tensor, scale: Tensor) -> Tensor:
        seen.update(theta=theta.shape, scale=scale.shape)
        return theta.unsqueeze(-1) * scale + torch.zeros(len(theta), T)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        seen.update(x=x.shape, y=y.shape)
        return losses.mse(x, y)

    site = Simulator(watched, loss, theta_event_dims=(0, 1))(torch.zeros(4, 1), torch.ones(2, T)).expand([3, 4, 2])
    assert site.log_prob(torch.zeros(4, 2, T)).shape == (3, 4, 2)
    assert seen == {"theta": (24,), "scale": (24, T), "x": (24, T), "y": (24, T)}
    assert site.sample().shape == (3, 4, 2, T)
    assert site.sample((7,)).shape == (7, 3, 4, 2, T)


def test_each_series_is_compared_with_its_own_data() -> None:
    """Series of different means: a transposed batch would show."""
    y = torch.arange(6.0).reshape(3, 2, 1).expand(3, 2, T)
    fixed = Simulator(lambda theta: theta.unsqueeze(-1).expand(-1, T), losses.mse)
    theta = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(fixed(theta).log_prob(y), torch.zeros(3, 2))
    assert torch.equal(fixed(theta.T).log_prob(y[:, :1].expand(3, 3, T)[:2]), -((theta.T - y[:2, :1, 0]) ** 2))


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("shared", [True, False], ids=["shared theta", "own theta"])
def test_plates_of_series(vectorize: bool, shared: bool) -> None:
    """E[loss] of independent series with unit noise around theta is (theta - y)^2 + 1, to be met within 5 errors."""
    y = torch.tensor([-1.0, 0.0, 2.0]).unsqueeze(-1).expand(3, T)
    theta_of = {True: torch.tensor(0.5), False: torch.tensor([0.5, 1.0, -1.0])}[shared]

    def model(y: Tensor) -> None:
        if shared:
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("series", 3):
            if not shared:
                theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("x", walk(theta), obs=y)

    def guide(y: Tensor) -> None:
        with contextlib.nullcontext() if shared else pyro.plate("series", 3):
            pyro.sample("theta", dist.Delta(theta_of))

    walk = simulator()
    num_particles = 4000 if vectorize else 500
    elbo = GeneralizedELBO(w=0, num_particles=num_particles, vectorize_particles=vectorize)
    got = elbo.loss(model, guide, y)
    exact = float(((theta_of - y[:, 0]) ** 2 + 1).sum())
    # Var of the mean of T squares of N(delta, 1) is (2 + 4 delta^2) / T; series and particles are independent.
    variance = float(((2 + 4 * (theta_of - y[:, 0]) ** 2) / T).sum()) / num_particles
    assert abs(got - exact) < 5 * math.sqrt(variance)


def test_series_that_share_theta_have_noise_of_their_own() -> None:
    with pyro.plate("series", 3):
        x = pyro.sample("x", simulator()(torch.tensor(0.0)))
    assert x.shape == (3, T)
    assert not torch.equal(x[0], x[1])


def test_subsampled_plate_scales_up() -> None:
    fixed = Simulator(lambda theta: theta.unsqueeze(-1).expand(-1, T), losses.mse)
    y = torch.ones(8, 1).expand(8, T)

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("series", 8, subsample_size=2) as index:
            pyro.sample("x", fixed(theta), obs=y[index])

    assert GeneralizedELBO(w=0, num_particles=3).loss(model, fixed_at(torch.tensor(0.0)), y) == pytest.approx(8.0)


@pytest.mark.parametrize("n", [3, 10])
def test_vector_parameter_also_as_long_as_the_particles(n: int) -> None:
    weights = torch.linspace(-1, 1, n)

    def line(theta: Tensor) -> Tensor:
        assert theta.shape[1:] == (n,)
        return (theta * weights).sum(-1, keepdim=True).expand(-1, T)

    model = model_of(Simulator(line, losses.mse, theta_event_dims=1), shape=(n,))
    guide = AutoNormal(model)
    svi = SVI(model, guide, ClippedAdam({"lr": 0.05, "lrd": 0.99}), GeneralizedELBO(w=0.01, num_particles=10))
    for _ in range(600):
        svi.step(torch.full((T,), 2.0))
    # The posterior mean of theta . weights: 2 |weights|^2 / (|weights|^2 + w / 2).
    exact = 2 / (1 + 0.005 / float(weights.square().sum()))
    assert float((guide.median()["theta"] * weights).sum()) == pytest.approx(exact, abs=0.01)


def test_event_dims_of_parameters_by_name_and_by_order() -> None:
    def fn(a: Tensor, b: Tensor, n: int) -> Tensor:
        return a.unsqueeze(-1) + b.sum(-1, keepdim=True) + torch.zeros(len(a), n)

    by_name = Simulator(fn, losses.mse, theta_event_dims={"b": 1}, n=T)
    by_order = Simulator(fn, losses.mse, theta_event_dims=(0, 1), n=T)
    a, b = torch.zeros(4), torch.zeros(4, 2)
    for site in (by_name(a, b), by_name(b=b, a=a), by_order(a, b), by_order(b=b, a=a)):
        assert site.batch_shape == (4,)
        assert site.sample().shape == (4, T)


def test_numbers_are_parameters_and_clashing_settings_go_through_partial() -> None:
    def fn(theta: Tensor, seed: int) -> Tensor:
        return theta.unsqueeze(-1).expand(-1, seed)

    assert Simulator(functools.partial(fn, seed=T), losses.mse)(0.25).sample().tolist() == [0.25] * T


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive(parallel: bool) -> None:
    def model(y: Tensor | None = None) -> None:
        theta = pyro.sample("theta", dist.Normal(100.0, 1.0))
        with pyro.plate("series", 3):
            pyro.sample("x", simulator()(theta), obs=y)

    guide = AutoNormal(model)
    guide(torch.zeros(3, T))
    draws = Predictive(model, guide=guide, num_samples=20, parallel=parallel)()
    assert draws["x"].reshape(20, 3, T).shape == draws["x"].squeeze().shape
    off = draws["x"].reshape(20, -1).mean(1) - draws["theta"].reshape(20)
    assert off.abs().max() < 5 / math.sqrt(3 * T)  # each draw is simulated at its own theta


def test_handlers() -> None:
    model = model_of(simulator())
    trace = poutine.trace(model).get_trace()
    assert trace.nodes["x"]["value"].shape == (T,)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    assert torch.equal(replayed.nodes["x"]["value"], trace.nodes["x"]["value"])
    conditioned = poutine.condition(model, {"x": Y, "theta": torch.tensor(0.5)})
    assert poutine.trace(conditioned).get_trace().nodes["x"]["is_observed"]

    def score(handler: object) -> float:
        pyro.set_rng_seed(1)
        site = poutine.trace(handler).get_trace()
        site.compute_log_prob()
        return float(site.nodes["x"]["log_prob_sum"])

    plain = score(conditioned)
    assert plain < 0
    assert score(poutine.scale(conditioned, 3.0)) == pytest.approx(3 * plain)
    assert score(poutine.mask(conditioned, torch.tensor(False))) == 0


def test_masked_series_do_not_count() -> None:
    fixed = Simulator(lambda theta: theta.unsqueeze(-1).expand(-1, T), losses.mse)
    mask = torch.tensor([True, False, True])

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("series", 3), poutine.mask(mask=mask):
            pyro.sample("x", fixed(theta), obs=torch.ones(3, T))

    assert GeneralizedELBO(w=0).loss(model, fixed_at(torch.tensor(0.0))) == pytest.approx(2.0)


def test_pyros_own_elbo_gives_the_same_objective_at_w_one() -> None:
    model = model_of(simulator())
    guide = AutoNormal(model)
    guide(Y)
    values = []
    options: dict[str, Any] = {"num_particles": 5, "max_plate_nesting": 0}  # to guess it, Pyro's would simulate once
    for elbo in (Trace_ELBO(vectorize_particles=True, **options), GeneralizedELBO(**options)):
        pyro.set_rng_seed(0)
        values.append(elbo.loss(model, guide, Y))
    # The default KL is exact: the loss is the same, the divergence the same in expectation only.
    theirs, ours = values
    assert theirs != ours
    pyro.set_rng_seed(0)
    same = GeneralizedELBO(divergence=KL(analytic=False), **options)
    assert same.loss(model, guide, Y) == pytest.approx(theirs, rel=1e-6)


def test_nuts_on_the_tempered_model_with_frozen_noise() -> None:
    """Frozen noise e makes the posterior Gaussian: precision 1 + 2 / w, mean 2 mean(y - e) / w / precision."""
    w = 2.0
    frozen = simulator(seed=11)
    model = tempered(model_of(frozen), w)
    noise = -frozen(torch.tensor(0.0)).log_prob(torch.zeros(T))  # mean of e^2: just to have run it
    assert noise > 0
    pyro.set_rng_seed(11)
    e = drift(torch.zeros(1), T)[0]
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=400, warmup_steps=100, disable_progbar=True)
    mcmc.run(Y)
    draws = mcmc.get_samples()["theta"]
    precision = 1 + 2 / w
    mean = 2 * float((Y - e).mean()) / w / precision
    ess = float(mcmc.diagnostics()["theta"]["n_eff"])
    assert abs(float(draws.mean()) - mean) < 5 / math.sqrt(precision * ess)
    # The variance of a sample variance is 2 sd^4 / n.
    assert abs(float(draws.var()) * precision - 1) < 5 * math.sqrt(2 / ess)


def test_seed_freezes_scores_and_leaves_draws_and_generators_alone() -> None:
    site = simulator(seed=4)(torch.zeros(3))
    before = pyro.util.get_rng_state()["torch"]
    first = site.log_prob(Y)
    assert torch.equal(pyro.util.get_rng_state()["torch"], before)
    assert torch.equal(first, site.log_prob(Y))
    assert len(set(first.tolist())) == 3  # noise of its own at each place
    assert not torch.equal(site.sample(), site.sample())


def outputs_model(y: dict[str, Tensor] | None = None, run_of: Simulator | None = None, n: int = 3) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("series", n):
        run = run_of(theta)
        for name in ("up", "down"):
            pyro.sample(name, run[name], obs=None if y is None else y[name])


def mirrored(theta: Tensor, n_timesteps: int = 5) -> dict[str, Tensor]:
    x = drift(theta, n_timesteps)
    return {"up": x, "down": -x}


def test_outputs_share_one_run() -> None:
    counted = Counted(mirrored)
    simulator = Simulator(counted, {"up": losses.mse, "down": losses.mse})
    model = functools.partial(outputs_model, run_of=simulator)
    with pyro.poutine.trace() as trace:
        model()
    assert torch.equal(trace.trace.nodes["up"]["value"], -trace.trace.nodes["down"]["value"])
    assert counted.calls == 1
    for parallel in (True, False):
        draws = Predictive(model, num_samples=6, parallel=parallel)()
        assert torch.equal(draws["up"], -draws["down"])
    counted.calls = 0
    y = {"up": torch.zeros(3, T), "down": torch.zeros(3, T)}
    guide = AutoNormal(model)
    elbo = GeneralizedELBO(max_plate_nesting=1)
    elbo.loss_and_grads(model, guide, y)
    assert (counted.calls, counted.batch) == (1, 30)


def test_an_output_asked_for_twice_is_simulated_twice() -> None:
    counted = Counted(mirrored)
    run = Simulator(counted, {"up": losses.mse, "down": losses.mse})(torch.zeros(2))
    assert [*run] == ["up", "down"]
    first = run["up"].sample()
    assert torch.equal(run["down"].sample(), -first)
    assert counted.calls == 1
    assert not torch.equal(run["up"].sample(), first)
    assert counted.calls == 2


def test_a_run_drawn_without_gradients_is_not_scored_with_them() -> None:
    theta = torch.zeros(2, requires_grad=True)
    run = Simulator(mirrored, {"up": losses.mse, "down": losses.mse})(theta)
    run["up"].sample()
    score = run["down"].log_prob(torch.ones(T))
    assert torch.autograd.grad(score.sum(), theta)[0].abs().min() > 0


def test_nothing_runs_before_a_site_is_drawn_or_scored() -> None:
    counted = Counted(drift)
    model = model_of(Simulator(counted, losses.mse))
    guide = AutoMultivariateNormal(model)
    guide(Y)  # sets the guide up
    Simulator(counted, losses.mse)(torch.zeros(3)).expand([2, 3])
    assert counted.calls == 0
    Predictive(guide, num_samples=3, parallel=True)(Y)
    assert counted.calls == 0


def test_the_number_of_simulations() -> None:
    counted = Counted(drift)
    model = model_of(Simulator(counted, losses.mse))

    def calls_of(action: object, *args: object) -> int:
        counted.calls = 0
        action(*args)
        return counted.calls

    svi = SVI(model, AutoNormal(model), Adam({"lr": 0.01}), GeneralizedELBO(num_particles=7))
    assert calls_of(svi.step, Y) == 1  # to guess the nesting of plates takes none
    assert counted.batch == 7
    assert [calls_of(svi.step, Y) for _ in range(3)] == [1, 1, 1]
    assert calls_of(svi.evaluate_loss, Y) == 1
    pyro.clear_param_store()
    given = SVI(model, AutoNormal(model), Adam({"lr": 0.01}), GeneralizedELBO(num_particles=7, max_plate_nesting=0))
    assert calls_of(given.step, Y) == 1
    pyro.clear_param_store()
    sequential = SVI(model, AutoNormal(model), Adam({"lr": 0.01}), GeneralizedELBO(vectorize_particles=False))
    assert calls_of(sequential.step, Y) == 10  # particles one after another
    guide = svi.guide
    assert calls_of(Predictive(model, guide=guide, num_samples=9, parallel=True)) == 3  # two shape probes, one batch
    assert counted.batch == 9


def test_extra_particles_of_the_divergence_run_no_simulation() -> None:
    counted = Counted(drift)
    model = model_of(Simulator(counted, losses.mse))
    for vectorize, calls in ((True, 1), (False, 4)):
        pyro.clear_param_store()
        guide = AutoNormal(model)
        kl = KL(analytic=False, num_particles=50)
        elbo = GeneralizedELBO(num_particles=4, divergence=kl, vectorize_particles=vectorize, max_plate_nesting=0)
        counted.calls = 0
        elbo.loss_and_grads(model, guide, Y)
        assert counted.calls == calls


def test_missing_data_are_masked() -> None:
    """A loss in which NaN was not masked would be NaN; one that counted them would be smaller."""
    y = Y.clone()
    y[1:3] = torch.nan
    theta = torch.tensor([0.5], requires_grad=True)
    fixed = Simulator(lambda theta: theta.unsqueeze(-1).expand(-1, T), losses.mse)
    score = fixed(theta).log_prob(y)
    seen = Y[[0, 3, 4]]
    assert score.item() == pytest.approx(-float(((0.5 - seen) ** 2).mean()))
    gradient = torch.autograd.grad(score.sum(), theta)[0]
    assert float(gradient) == pytest.approx(-2 * float((0.5 - seen).mean()))


def test_dtype_follows_theta() -> None:
    walk = Simulator(drift, losses.mse)
    assert (
        walk(torch.zeros(2, dtype=torch.float64)).log_prob(torch.zeros(T, dtype=torch.float64)).dtype == torch.float64
    )


def test_ready_model_is_the_six_lines() -> None:
    y = models.random_walk(n_timesteps=20)
    assert y.shape == (20,)
    trace = poutine.trace(models.random_walk).get_trace(y, n_timesteps=20)
    assert trace.nodes["theta"]["fn"].loc == 0
    assert trace.nodes["theta"]["fn"].scale == 1
    assert trace.nodes["x"]["is_observed"]
