"""A guide against NUTS: what is right passes, and each kind of wrong is seen.

The z of a guide that is right are standard normal but for the errors of their own errors: |z| < 4.5 fails once in
100,000 times for each, and the largest of 60 over 12 seeds was 3.1. With 1,000 draws of both, an sd that is 1.3 times
too large or too small, or a mean that is 0.3 sd off, has an expected |z| of 6.8 or more with an sd of about 1.1: it
is below 3.5 once in 700 times, and the lowest of 36 was 3.9.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_walk import TUTORIAL_WALK, best_gaussian
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.infer.autoguide.initialization import init_to_value
from simulators_for_tests import drift, model_of
from torch import Tensor

from pyrobirds import GeneralizedELBO, Simulator, fit, losses, models, tempered
from pyrobirds.diagnostics.nuts import _as_of_posterior, _deviations, _draw, _frozen_errors, compare_with_nuts
from pyrobirds.simulators import repeated
from pyrobirds.traces import particles

Y = torch.tensor([0.5, -0.2, 1.0, 0.3])
QUICK: dict[str, Any] = {"num_samples": 20, "warmup_steps": 10, "progress": False}


def conjugate(y: Tensor) -> None:
    """Four means with unit normal priors and one datum each: the posterior is N(y / (1 + w), w / (1 + w))."""
    with pyro.plate("series", len(y)):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def gaussian(mean: Tensor, sd: Tensor) -> Any:
    def guide(*args: Any, **kwargs: Any) -> None:
        with pyro.plate("series", len(mean)):
            pyro.sample("theta", dist.Normal(mean, sd))

    return guide


def scalar(mean: float, sd: float) -> Any:
    def guide(*args: Any, **kwargs: Any) -> None:
        pyro.sample("theta", dist.Normal(mean, sd))

    return guide


def test_right_wide_narrow_and_shifted() -> None:
    w = 3.0
    mean, sd = Y / (1 + w), math.sqrt(w / (1 + w))
    guide = gaussian(mean + sd * torch.tensor([0, 0, 0, 0.3]), sd * torch.tensor([1, 1.3, 1 / 1.3, 1]))
    table = compare_with_nuts(conjugate, guide, Y, w=w, progress=False)
    assert [*table.index] == [f"theta[{i}]" for i in range(4)]
    means, sds = table["mean_z"].abs(), table["sd_z"]
    assert (means[:3] < 4.5).all()
    assert means.iloc[3] > 3.5
    assert abs(sds.iloc[0]) < 4.5
    assert sds.iloc[1] > 3.5
    assert sds.iloc[2] < -3.5
    assert abs(sds.iloc[3]) < 4.5
    # NUTS itself, against the closed form, in standard errors of its mean and of its sd (a Gaussian's).
    assert ((table["nuts_mean"] - mean.numpy()).abs() < 4.5 * sd / table["nuts_ess"] ** 0.5).all()
    assert ((table["nuts_sd"] / sd - 1).abs() < 0.2).all()
    assert (table["r_hat"] < 1.05).all()
    assert (table["frozen_error"] == 0).all()
    assert table["mean_difference"].iloc[3] == pytest.approx(0.3, abs=0.25)
    assert table["sd_ratio"].iloc[1] == pytest.approx(1.3, abs=0.2)


def test_the_random_walk() -> None:
    """The frozen runs move NUTS by a multiple of its standard error here, at w = 10: that is in the z."""
    best, y = best_gaussian(TUTORIAL_WALK, 10.0), torch.tensor(TUTORIAL_WALK)
    options: dict[str, Any] = {"num_samples": 400, "warmup_steps": 200, "progress": False}
    right = compare_with_nuts(models.random_walk, scalar(best.mean, best.sd), y, w=10.0, **options).loc["theta"]
    assert abs(right["mean_z"]) < 4.5
    assert abs(right["sd_z"]) < 4.5
    assert 0.1 < right["frozen_error"] < 0.5


def test_the_random_walk_by_default() -> None:
    """Twice as wide and 3 sds beside: over four seeds sd_z was 9 to 11 and mean_z 11 to 14."""
    best = best_gaussian(TUTORIAL_WALK, 10.0)
    guide = scalar(best.mean + 3 * best.sd, 2 * best.sd)
    row = compare_with_nuts(models.random_walk, guide, torch.tensor(TUTORIAL_WALK), w=10.0, progress=False).loc["theta"]
    assert row["mean_z"] > 4.5
    assert row["sd_z"] > 4.5


@pytest.mark.parametrize(("w", "sd", "expected"), [(10.0, 0.4, 0.25), (10.0, 1.0, 0.25), (100.0, 1.0, 0.065)])
def test_probes_of_wide_guides_become_those_of_the_posterior(w: float, sd: float, expected: float) -> None:
    """Their frozen error then is that of the posterior, and not the guide's: 0.8, 1.5 and 0.15 of its sds.

    Over 25 seeds it was 0.25 and 0.065 with sds of a sixth of that, and the mean was off by 0.33 posterior sds.
    """
    best, y, num_repeats = best_gaussian(TUTORIAL_WALK, w), torch.tensor(TUTORIAL_WALK), 100
    frozen = partial(tempered(repeated(models.random_walk, num_repeats, seed=0), w), y)
    each_run = partial(particles(num_repeats, 0)(tempered(repeated(models.random_walk, 1, seed=0), w)), y)
    probes = [_draw(models.random_walk, scalar(best.mean, sd), (y,), {}) for _ in range(100)]
    draws = _as_of_posterior(frozen, probes)
    theta = draws["theta"].double().unsqueeze(1)
    assert abs(theta.mean() - best.mean) < 4 * 0.33 * best.sd
    error = _frozen_errors(theta, _deviations(each_run, draws))[0] / theta.std()
    assert float(error) == pytest.approx(expected, rel=0.6)


def test_the_parameters_are_those_of_the_fit() -> None:
    """Model and guide have some in the parameter store, which was cleared, and start far off.

    The posterior is N((y - shift) / 2, 1 / 2).
    """

    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta + pyro.param("shift", torch.tensor(50.0)), 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("theta", dist.Normal(pyro.param("mean", torch.tensor(50.0)), 0.5**0.5))

    y = torch.tensor(2.1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), GeneralizedELBO())
    fitted = fit(svi, y, num_steps=30, progress=False)
    right = {"mean": torch.tensor(1.0), "shift": torch.tensor(0.1)}
    pyro.clear_param_store()
    row = compare_with_nuts(
        model, guide, y, fit=dataclasses.replace(fitted, states={fitted.state: right}), progress=False
    ).loc["theta"]
    assert [*pyro.get_param_store().keys()] == []
    assert abs(row["mean_z"]) < 4.5
    assert abs(row["sd_z"]) < 4.5
    assert abs(row["nuts_mean"] - 1) < 4.5 * 0.5**0.5 / row["nuts_ess"] ** 0.5


def test_a_tempered_model_brings_its_w() -> None:
    """As if it were given: the posterior is N(y / (1 + w), w / (1 + w))."""
    w = 3.0
    guide = gaussian(Y / (1 + w), torch.full((4,), math.sqrt(w / (1 + w))))
    options: dict[str, Any] = {"num_samples": 100, "warmup_steps": 50, "progress": False}
    plain = compare_with_nuts(conjugate, guide, Y, w=w, **options)
    assert compare_with_nuts(tempered(conjugate, w), guide, Y, **options).equals(plain)


def test_a_point_mass_is_infinitely_narrow() -> None:
    guide = AutoDelta(conjugate, init_loc_fn=init_to_value(values={"theta": Y / 2}))
    table = compare_with_nuts(conjugate, guide, Y, num_samples=200, warmup_steps=50, progress=False)
    assert (table["guide_sd"] == 0).all()
    assert (table["sd_z"] == -math.inf).all()
    assert (table["mean_z"].abs() < 4.5).all()


def test_the_error_of_frozen_runs_is_the_spread_over_their_seeds() -> None:
    """On a simulator whose frozen posterior is Gaussian: mean 2 mean(y - e) / w / precision, with e the mean noise.

    Its sd over seeds is 2 sd(e) / w / precision, sd(e) = 1 / sqrt(4 R). The estimate from R = 400 runs has a relative
    error of 1 / sqrt(2 R), and from 2,000 draws of 1 / sqrt(2,000): in all below 5 times 0.05.
    """
    w, num_repeats = 0.5, 400
    precision = 1 + 2 / w
    model = tempered(repeated(model_of(Simulator(drift, losses.mse, n_timesteps=4)), 1, seed=3), w)
    draws = torch.randn(2000) / precision**0.5
    deviations = _deviations(partial(particles(num_repeats, 0)(model), Y), {"theta": draws})
    by_mean, by_log_sd = _frozen_errors(draws.double().unsqueeze(1), deviations)
    assert float(by_mean) == pytest.approx(2 / math.sqrt(4 * num_repeats) / w / precision, rel=0.25)
    assert float(by_log_sd) < 0.2 * float(by_mean) * precision**0.5  # the noise moves the mean alone


def test_runs_one_by_one_are_those_that_are_averaged() -> None:
    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("series", 3):
            pyro.sample("x", walk(theta), obs=y)

    walk = Simulator(drift, losses.mse, n_timesteps=4)
    at = {"theta": torch.tensor(0.3)}
    log_probs = []
    for one in (particles(6, 1)(repeated(model, 1, seed=2)), repeated(model, 6, seed=2)):
        trace = poutine.trace(poutine.condition(one, at)).get_trace(Y)
        trace.compute_log_prob()
        log_probs.append(trace.nodes["x"]["log_prob"])
    torch.testing.assert_close(log_probs[0].mean(0), log_probs[1])


def test_seed_chains_generators_and_parameters() -> None:
    pyro.param("bystander", torch.tensor(1.0))
    stored, before = pyro.get_param_store().get_state(), pyro.util.get_rng_state()["torch"]
    compare = partial(compare_with_nuts, conjugate, gaussian(Y / 2, torch.full((4,), 0.5**0.5)), Y, **QUICK)
    first, again, other = compare(seed=1, num_chains=2), compare(seed=1, num_chains=2), compare(seed=2, num_chains=2)
    assert torch.equal(pyro.util.get_rng_state()["torch"], before)
    assert pyro.get_param_store().get_state() == stored
    assert first.equals(again)
    assert not first.equals(other)
    assert first["r_hat"].notna().all()


# ---- what it refuses ------------------------------------------------------------------------------------------------


def refused(message: str, model: Any, guide: Any = scalar(0.0, 1.0), **options: Any) -> None:  # noqa: B008
    with pytest.raises(ValueError, match=message):
        compare_with_nuts(model, guide, Y, **{**QUICK, **options})


def test_discrete_latents() -> None:
    def model(y: Tensor) -> None:
        k = pyro.sample("k", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(k.unsqueeze(-1) + torch.zeros(4), 1.0).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("k", dist.Bernoulli(0.5))

    refused(r"latent site 'k' is discrete \(Bernoulli\), and NUTS needs the gradient", model, guide)


def test_another_divergence() -> None:
    model = model_of(Simulator(drift, losses.mse, n_timesteps=4))
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), GeneralizedELBO(w=2.0))
    fitted = fit(svi, Y, num_steps=30, progress=False)
    refused(
        r"made with the divergence Renyi\(0.5\), and NUTS draws from the optimum under the Kullback-Leibler",
        model,
        guide,
        fit=dataclasses.replace(fitted, divergence="Renyi(0.5)"),
    )
    # Its w is that of the fit: 1 / precision is w / (2 + w).
    table = compare_with_nuts(model, guide, Y, fit=fitted, num_samples=200, warmup_steps=100, progress=False)
    assert table.loc["theta", "nuts_sd"] == pytest.approx(0.5**0.5, rel=0.4)


def test_w_twice() -> None:
    refused("the model is tempered by w=10, and w is 10: ", tempered(conjugate, 10), gaussian(Y, Y.exp()), w=10)


def test_several_guides() -> None:
    several: Any = [scalar(0.0, 1.0)] * 2
    with pytest.raises(
        TypeError, match="one Pyro guide and fit its result, got a list and a NoneType: compare several"
    ):
        compare_with_nuts(conjugate, several, Y, **QUICK)
    with pytest.raises(TypeError, match="got a function and a list: compare several one after another"):
        compare_with_nuts(conjugate, several[0], Y, fit=several, **QUICK)


def test_a_loss_without_gradient() -> None:
    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(theta.detach().unsqueeze(-1) + torch.zeros(4), 1.0).to_event(1), obs=y)

    refused(r"the loss does not depend differentiably on the latents \['theta'\]", model)


def test_a_random_density() -> None:
    def model(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.factor("loss", -(theta.unsqueeze(-1) + torch.randn(()) - y).square().sum(-1))

    refused("the density is random", model)


def test_a_density_that_is_not_finite() -> None:
    def broken(theta: Tensor) -> Tensor:
        return theta.unsqueeze(-1) * torch.full((4,), torch.nan)

    refused("the density is nan at a draw of the guide", model_of(Simulator(broken, losses.mse)))


def test_too_few_runs() -> None:
    model = model_of(Simulator(drift, losses.mse, n_timesteps=4))
    refused(r"with num_repeats=5 the frozen runs move the posterior mean by about", model, w=0.01, num_repeats=5)
    refused("num_repeats 2, got 20 and 1", model, num_repeats=1)


@pytest.mark.filterwarnings("ignore:.*runs failed.*:UserWarning")
def test_failed_runs_are_counted() -> None:
    def sometimes(theta: Tensor) -> Tensor:
        return drift(theta, 4) * torch.where(torch.rand_like(theta) < 0.1, torch.nan, 1).unsqueeze(-1)

    model = model_of(Simulator(sometimes, losses.mse))
    with pytest.warns(RuntimeWarning, match=r"of 2000 frozen runs failed at the draws of NUTS. They were left out"):
        compare_with_nuts(model, scalar(0.2, 0.6), Y, w=2.0, **QUICK)
