"""The mean loss of several runs to a draw, and NUTS on it with frozen noise."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from exact_walk import TUTORIAL_WALK, expected_mse
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive
from pyro.infer.autoguide import AutoNormal, init_to_value
from simulators_for_tests import Counted, drift, fails_above_one, fixed_at, line, model_of
from torch import Tensor

from pyrobirds import GeneralizedELBO, Simulator, losses, models, tempered
from pyrobirds.checkpoints import fingerprint
from pyrobirds.simulators import repeated

T = 5
Y = torch.tensor([0.5, -0.2, 1.0, 0.3, 0.1])
WALK = torch.tensor(TUTORIAL_WALK)


def simulator(fn: Any = drift, **options: Any) -> Simulator:
    return Simulator(fn, losses.mse, n_timesteps=T, **options)


def scored(model: Any, *args: Any, **latents: Tensor) -> Any:
    """The trace of a model at latents, with log-probabilities."""
    trace = poutine.trace(poutine.condition(model, latents)).get_trace(*args)
    trace.compute_log_prob()
    return trace


def score(model: Any, *args: Any, site: str = "x", **latents: Tensor) -> Tensor:
    return scored(model, *args, **latents).nodes[site]["log_prob"]


def batch(model: Any, n: int, dim: int = -1) -> Any:
    return pyro.plate("batch", n, dim=dim)(model)


# ---- the mean -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [-1.5, 0.0, 1.0])
def test_the_mean_is_the_expected_loss_and_its_variance_falls_with_the_repeats(theta: float) -> None:
    """2,000 draws: 5 standard errors of the mean; the ratio of two variances within 5 of its own (below 1e-6 each)."""
    n, exact = 2000, float(expected_mse(np.array(theta), TUTORIAL_WALK))
    variances, errors = [], []
    for num_repeats in (1, 9):
        loss = -score(batch(repeated(models.random_walk, num_repeats), n), WALK, theta=torch.full((n,), theta)).double()
        assert abs(loss.mean() - exact) < 5 * loss.std() / math.sqrt(n)
        squares = (loss - loss.mean()).square()
        variances.append(squares.mean().item())
        errors.append(squares.std().item() / math.sqrt(n) / variances[-1])
    assert abs(math.log(variances[0] / variances[1] / 9)) < 5 * math.hypot(*errors)


def test_it_is_the_mean_over_runs_in_one_batch() -> None:
    """The function sees the runs in front of the batch; the gradient is the mean of theirs."""
    theta = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    counted = Counted(drift)
    pyro.set_rng_seed(3)
    got = score(batch(repeated(model_of(simulator(counted)), 4), 3), Y, theta=theta)
    assert (counted.calls, counted.batch) == (1, 12)
    pyro.set_rng_seed(3)
    by_hand = -losses.mse(drift(theta.expand(4, 3).reshape(12), T), Y.expand(12, T)).reshape(4, 3).mean(0)
    torch.testing.assert_close(got, by_hand)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), theta)[0] for x in (got, by_hand)))


def test_repeating_twice_multiplies() -> None:
    counted = Counted(drift)
    score(repeated(repeated(model_of(simulator(counted)), 3), 4), Y, theta=torch.tensor(0.5))
    assert counted.batch == 12


def test_draws_and_other_sites_are_as_they_were() -> None:
    counted = Counted(drift)

    def model(y: Tensor | None = None) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", simulator(counted)(theta))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(0.3))

    assert Predictive(repeated(model, 10), num_samples=7, parallel=True)()["x"].shape == (7, T)
    assert counted.batch == 7
    latents = {"theta": torch.tensor(0.5), "x": Y}
    ours, plain = (scored(one, **latents) for one in (repeated(model, 10), model))
    for name in ("theta", "y"):
        assert torch.equal(ours.nodes[name]["log_prob"], plain.nodes[name]["log_prob"])


# ---- frozen noise ---------------------------------------------------------------------------------------------------


def test_a_seed_freezes_the_runs() -> None:
    model = model_of(simulator(seed=5))
    theta = torch.tensor(0.5)
    before = torch.get_rng_state()
    first = score(repeated(model, 20, seed=1), Y, theta=theta)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, score(repeated(model, 20, seed=1), Y, theta=theta))
    assert not torch.equal(first, score(repeated(model, 20, seed=2), Y, theta=theta))
    own = [score(repeated(model, 20), Y, theta=theta) for _ in range(2)]
    assert torch.equal(*own)  # frozen by the Simulator's own seed
    assert not torch.equal(own[0], first)
    fresh = repeated(model_of(simulator()), 20)
    assert not torch.equal(score(fresh, Y, theta=theta), score(fresh, Y, theta=theta))


def test_sites_have_noise_of_their_own_and_outputs_of_a_call_share_it() -> None:
    def mirrored(theta: Tensor) -> dict[str, Tensor]:
        x = drift(theta, T)
        return {"up": x, "down": -x}

    both = Simulator(mirrored, {"up": losses.mse, "down": losses.mse})

    def model() -> None:
        for i in range(2):
            run = both(torch.tensor(0.0))
            pyro.sample(f"up {i}", run["up"], obs=Y)
            pyro.sample(f"down {i}", run["down"], obs=-Y)

    trace = scored(repeated(model, 6, seed=1))
    log_prob = {name: trace.nodes[name]["log_prob"] for name in ("up 0", "down 0", "up 1", "down 1")}
    assert torch.equal(log_prob["up 0"], log_prob["down 0"])
    assert torch.equal(log_prob["up 1"], log_prob["down 1"])
    assert not torch.equal(log_prob["up 0"], log_prob["up 1"])


def test_sites_of_one_output_have_noise_of_their_own() -> None:
    """Whenever they are asked for: the run is made outside of the model. The other output shares that of the first."""
    run = Simulator(lambda theta: {"x": drift(theta, T), "z": line(theta)}, {"x": losses.mse, "z": losses.mse})(
        torch.tensor(0.0)
    )

    def model() -> None:
        for name, output in (("a", "x"), ("b", "x"), ("z", "z")):
            pyro.sample(name, run[output], obs=Y if output == "x" else Y[:4])

    frozen = repeated(model, 6, seed=1)
    first, again = ({name: score(frozen, site=name) for name in ("a", "b", "z")} for _ in range(2))
    assert not torch.equal(first["a"], first["b"])
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("w", [100, 10])
def test_nuts_draws_from_the_posterior_of_the_frozen_walk(w: float) -> None:
    """Its loss has steps in theta and a straight-through gradient, which is not its own: the density is what counts.

    The frozen posterior by a grid, in 5 standard errors; trajectories are accepted nine times out of ten.
    """
    model = tempered(repeated(models.random_walk, 50, seed=1), w)
    grid = torch.linspace(-1.05 - 0.5 * w**0.5, -1.05 + 0.5 * w**0.5, 1001).clamp(-4.5, 2.5).unique()
    log_density = torch.stack([scored(model, WALK, theta=theta).log_prob_sum() for theta in grid]).double()
    mass = (log_density - log_density.max()).exp()
    mass = mass / mass.sum()
    mean = (grid * mass).sum()
    variance = ((grid - mean).square() * mass).sum()
    start = init_to_value(values={"theta": torch.tensor(-1.0)})
    mcmc = MCMC(NUTS(model, init_strategy=start), num_samples=600, warmup_steps=200, disable_progbar=True)
    mcmc.run(WALK)
    draws, found = mcmc.get_samples()["theta"], mcmc.diagnostics()
    ess = float(found["theta"]["n_eff"])
    assert abs(draws.mean() - mean) < 5 * (variance / ess).sqrt()
    assert abs(draws.var() / variance - 1) < 5 * math.sqrt(2 / ess)
    assert ess > 80
    assert found["acceptance rate"]["chain 0"] > 0.8
    assert found["divergences"]["chain 0"] == []


# ---- within Pyro ----------------------------------------------------------------------------------------------------


def still(theta: Tensor, n_timesteps: int = T) -> Tensor:
    return theta.unsqueeze(-1).expand(-1, n_timesteps)


def test_plates_scales_and_masks() -> None:
    """Without noise the mean is the loss itself, whatever the handlers."""
    y = torch.arange(6.0).reshape(3, 2, 1).expand(3, 2, T)

    def model() -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 4, 2, dim=-1):
            with poutine.scale(scale=0.5), poutine.mask(mask=torch.tensor([True, False])):
                pyro.sample("x", simulator(still)(theta), obs=y)
            pyro.sample("masked", simulator(still)(theta).mask(torch.tensor([False, True])), obs=y)
            pyro.sample(
                "joint", simulator(still)(theta.expand(3, 2, 2)).to_event(1), obs=y.unsqueeze(2).expand(3, 2, 2, T)
            )

    theta = torch.tensor(1.5)
    ours, plain = (scored(one, theta=theta) for one in (repeated(model, 7), model))
    for name in ("x", "masked", "joint"):
        torch.testing.assert_close(ours.nodes[name]["log_prob"], plain.nodes[name]["log_prob"])
    loss = (1.5 - y[..., 0]).square()
    torch.testing.assert_close(ours.nodes["x"]["log_prob"], -2 * 0.5 * loss * torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(ours.nodes["masked"]["log_prob"], -2 * loss * torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ours.nodes["joint"]["log_prob"], -2 * 2 * loss)


@pytest.mark.filterwarnings("ignore:.*runs in a Python loop:UserWarning")
@pytest.mark.parametrize("how", ["vmap", "loop", "from_loss"])
def test_functions_of_one_draw(how: str) -> None:
    def one(theta: Tensor) -> Tensor:
        if how == "loop":
            theta.item()
        return line(theta)

    if how == "from_loss":
        walk = Simulator.from_loss(lambda theta, y: (line(theta) - y).square().mean(), batched=False)
    else:
        walk = Simulator(one, losses.mse, batched=False)
    theta = torch.tensor([0.5, -1.0], requires_grad=True)
    got = score(batch(repeated(model_of(walk), 3), 2), Y[:4], theta=theta)
    expected = -losses.mse(line(theta), Y[:4].expand(2, 4))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), theta)[0] for x in (got, expected)))


@pytest.mark.parametrize("vectorize", [True, False])
def test_the_objective_has_the_same_expectation_and_less_noise(vectorize: bool) -> None:
    """E[loss] = mean((theta - y)^2) + 1; a run's loss has the variance (2 + 4 mean((theta - y)^2)) / T."""
    model, theta = model_of(simulator()), torch.tensor(0.5)
    elbo = GeneralizedELBO(w=0, num_particles=10, vectorize_particles=vectorize, max_plate_nesting=0)
    n, delta = 100, float((theta - Y).square().mean())
    totals = torch.tensor([elbo.loss(repeated(model, 20), fixed_at(theta), Y) for _ in range(n)])
    sd = math.sqrt((2 + 4 * delta) / T / 10 / 20)
    assert abs(totals.mean() - (delta + 1)) < 5 * sd / math.sqrt(n)
    assert abs(totals.std() / sd - 1) < 5 / math.sqrt(2 * n)


def test_a_fit_trains_a_guide() -> None:
    model = repeated(model_of(simulator()), 20)
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}), GeneralizedELBO(w=2.0))
    for _ in range(400):
        svi.step(Y)
    assert float(guide.median()["theta"]) == pytest.approx(float(Y.mean()) / 2, abs=0.03)  # precision 1 + 2 / w


def test_checkpoints_tell_how_often_and_from_which_seed() -> None:
    model = model_of(simulator())
    guide = AutoNormal(model)
    guide(Y)
    kinds = {
        fingerprint(one, guide, (Y,), {})["site 'x'"]
        for one in (
            model,
            repeated(model, 3),
            repeated(model, 4),
            repeated(model, 4, seed=1),
            repeated(model, 4, seed=2),
        )
    }
    assert len(kinds) == 5
    assert any("num_repeats=3" in kind for kind in kinds)


# ---- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Encountered NaN:UserWarning")
def test_a_mean_is_over_the_runs_that_did_not_fail() -> None:
    """Draws fail in none, in two and in all of four runs; their mean, their gradient, and how many failed."""
    bad = torch.zeros(4, 3, dtype=torch.bool)
    bad[1:3, 1] = True
    bad[:, 2] = True

    def breaks(theta: Tensor) -> Tensor:
        runs = torch.arange(1.0, 5.0).repeat_interleave(3)
        return line(theta * runs) * torch.where(bad.flatten(), torch.nan, 1).unsqueeze(-1)

    theta = torch.tensor([0.5, -1.0, 2.0], requires_grad=True)
    trace = scored(batch(repeated(model_of(Simulator(breaks, losses.mse)), 4), 3), Y[:4], theta=theta)
    got = trace.nodes["x"]["log_prob"]
    each = -losses.mse(line((theta * torch.arange(1.0, 5.0).unsqueeze(-1)).flatten()), Y[:4].expand(12, 4)).reshape(
        4, 3
    )
    expected = torch.stack([each[:, 0].mean(), each[[0, 3], 1].mean()])
    torch.testing.assert_close(got[:2], expected)
    assert got[2].isnan()
    assert trace.nodes["x"]["fn"].num_failed.tolist() == [0, 2, 4]
    (gradient,) = torch.autograd.grad(got.nansum(), theta)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), theta)[0])
    assert gradient[2] == 0
    assert trace.nodes["x"]["fn"].gradient_failed.tolist() == [False] * 3


def test_a_gradient_that_is_not_finite_is_that_of_its_draw() -> None:
    def rooted(theta: Tensor) -> Tensor:
        return theta.sqrt().unsqueeze(-1).expand(-1, T)

    theta = torch.tensor([4.0, 0.0], requires_grad=True)
    trace = scored(batch(repeated(model_of(Simulator(rooted, losses.mse)), 3), 2), torch.zeros(T), theta=theta)
    (gradient,) = torch.autograd.grad(trace.nodes["x"]["log_prob"].sum(), theta)
    torch.testing.assert_close(gradient, torch.tensor([-1.0, 0.0]))
    assert trace.nodes["x"]["fn"].gradient_failed.tolist() == [False, True]


@pytest.mark.filterwarnings("ignore:1 of 2 runs at site 'x' failed:UserWarning")
def test_the_objective_drops_draws_without_survivors() -> None:
    model = repeated(model_of(Simulator(fails_above_one, losses.mse)), 3)
    elbo = GeneralizedELBO(w=0, num_particles=2, vectorize_particles=False)
    values = itertools.cycle([0.5, 2.0])

    def guide(y: Tensor) -> None:
        pyro.sample("theta", dist.Delta(torch.tensor(next(values))))

    assert elbo.loss(model, guide, Y[:4]) == pytest.approx(float(losses.mse(line(torch.tensor([0.5])), Y[None, :4])))
    assert int(elbo.terms.num_failed) == 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_repeats": 0}, ValueError, "num_repeats must be at least 1, got 0"),
        ({"num_repeats": 2.5}, TypeError, "num_repeats must be a whole number of at least 1, got 2.5"),
        ({"num_repeats": 2, "seed": -1}, ValueError, "seed must be at least 0, got -1"),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        repeated(functools.partial(model_of(simulator())), **arguments)
