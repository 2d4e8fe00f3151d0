"""The training loop."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from exact_walk import TUTORIAL_WALK, best_gaussian, objective
from pyro.infer import SVI, RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from pyro.optim import SGD, Adam, PyroLRScheduler
from simulators_for_tests import Counted, drift
from torch import Tensor

from pyrobirds import GeneralizedELBO, Simulator, fit, losses, models
from pyrobirds.callbacks import Step
from pyrobirds.descent import Descent
from pyrobirds.divergences import KL
from pyrobirds.fit_result import FitResult, StopReason


def model(y: Tensor, scale: float = 1.0) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, scale), obs=y)


def make(loss: Any, lr: float = 0.05) -> SVI:
    return SVI(model, AutoNormal(model), Adam({"lr": lr}), loss)


def stored() -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in pyro.get_param_store().named_parameters()}


def assert_in(result: FitResult, state: str) -> None:
    assert result.state == state
    for name, tensor in stored().items():
        assert torch.equal(tensor, result.states[state][name]), name  # type: ignore[index]


# ---- history, results -----------------------------------------------------------------------------------------------


def test_history_holds_what_the_steps_returned() -> None:
    y = torch.tensor(1.0)
    result = fit(make(GeneralizedELBO(w=2)), y, num_steps=30, progress=False)
    assert_in(result, "averaged")
    for state in ("best", "last", "averaged"):
        result.load(state)
        assert_in(result, state)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = GeneralizedELBO(w=2)
    by_hand = make(elbo)
    rows, iterates = [], []
    for _ in range(30):
        rows.append((by_hand.step(y), float(elbo.terms.loss), float(elbo.terms.divergence)))
        iterates.append(stored())
    history = result.history
    assert isinstance(history, xr.Dataset)
    assert history["step"].values.tolist() == list(range(1, 31))
    for i, name in enumerate(("total", "loss", "divergence")):
        assert history[name].values.tolist() == [row[i] for row in rows]
    assert set(history["w"].values) == {2.0}
    assert not history["num_failed"].any()
    assert history["smoothed"].isnull().sum() == 24
    assert float(history["smoothed"][24]) == np.median(history["total"][:25])
    assert result.best == float(history["smoothed"].min())
    assert result.stop_reason is StopReason.NUM_STEPS
    assert (result.num_steps, result.w, result.seed) == (30, 2.0, None)
    # The states: after the last step, its average over the window, and where the smoothed total was lowest, before
    # that step's update.
    first, last = result.window
    assert 14 <= first <= 17
    assert last == 30
    lowest = int(np.nanargmin(history["smoothed"]))
    assert lowest > 0
    for name, value in iterates[-1].items():
        assert torch.equal(result.states["last"][name], value)
        assert torch.equal(result.states["best"][name], iterates[lowest - 1][name])
        mean = torch.stack([iterate[name] for iterate in iterates[first - 1 : last]]).mean(0)
        torch.testing.assert_close(result.states["averaged"][name], mean)


def test_the_gradient_norm_is_over_all_parameters() -> None:
    svi = make(GeneralizedELBO(max_plate_nesting=0))
    svi.guide(torch.tensor(1.0))
    pyro.set_rng_seed(1)
    result = fit(svi, torch.tensor(1.0), num_steps=1, progress=False)
    result.load("last")
    pyro.clear_param_store()
    again = make(GeneralizedELBO(max_plate_nesting=0))
    again.guide(torch.tensor(1.0))
    pyro.set_rng_seed(1)
    again.loss_and_grads(again.model, again.guide, torch.tensor(1.0))
    squares = [tensor.grad.square().sum() for _, tensor in pyro.get_param_store().named_parameters()]
    assert float(result.history["grad_norm"][0]) == pytest.approx(math.sqrt(sum(squares)))


@pytest.mark.parametrize(
    "loss",
    [
        Trace_ELBO(),
        TraceMeanField_ELBO(num_particles=2, vectorize_particles=True),
        RenyiELBO(alpha=0.5, num_particles=2),
        ReweightedWakeSleep(num_particles=2, insomnia=0.5),
    ],
)
def test_any_elbo(loss: Any) -> None:
    result = fit(make(loss), torch.tensor(1.0), num_steps=3, progress=False, model_kwargs={"scale": 2.0})
    assert set(result.history) == {"total", "smoothed", "grad_norm"}
    assert result.history["total"].shape == (3,)
    assert result.w is None


def test_a_loss_function_instead_of_an_elbo() -> None:
    svi = make(lambda *args: Trace_ELBO().differentiable_loss(*args))
    assert fit(svi, torch.tensor(1.0), num_steps=2, progress=False).num_steps == 2


def test_the_summary() -> None:
    result = fit(make(GeneralizedELBO()), torch.tensor(0.0), num_steps=300, progress=False)
    lines = str(result).splitlines()
    assert lines[0].startswith("300 steps in ")
    assert lines[0].endswith("s: all steps taken")
    assert "parameters: averaged" in lines[1]
    assert lines[2].startswith("mean of the last 100 steps: loss ")
    assert len(lines) == 3
    assert repr(result) == str(result)


def test_load_refuses_other_states_and_parameters_that_are_gone() -> None:
    def guide(y: Tensor) -> None:
        pyro.sample("theta", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    result = fit(
        SVI(model, guide, Adam({"lr": 0.1}), GeneralizedELBO()), torch.tensor(0.0), num_steps=3, progress=False
    )
    with pytest.raises(ValueError, match=r"state must be one of \['averaged', 'best', 'last'\], got 'mean'"):
        result.load("mean")  # type: ignore[arg-type]
    pyro.clear_param_store()
    with pytest.raises(RuntimeError, match=r"the parameters \['loc'\] are no longer in Pyro's parameter store"):
        result.load("last")


def test_a_guide_that_is_a_module_survives_a_cleared_store() -> None:
    svi = make(GeneralizedELBO())
    result = fit(svi, torch.tensor(0.0), num_steps=3, progress=False)
    pyro.clear_param_store()
    result.load("last")
    assert torch.equal(svi.guide.locs.theta, result.states["last"]["AutoNormal.locs.theta"])


def test_copies_hold_the_values_and_belong_to_no_guide() -> None:
    result = fit(make(GeneralizedELBO()), torch.tensor(0.0), num_steps=3, progress=False)
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result))):
        assert other.history.identical(result.history)
        assert all(torch.equal(value, other.states["last"][name]) for name, value in result.states["last"].items())
        with pytest.raises(RuntimeError, match=r"this result is a copy and belongs to no guide"):
            other.load("last")
    assert len({result, copy.copy(result)}) == 2


def test_parameters_that_come_later_are_fitted_and_averaged() -> None:
    calls = 0

    def guide(y: Tensor) -> None:
        nonlocal calls
        calls += 1
        late = pyro.param("late", torch.tensor(0.0)) if calls > 30 else 0.0
        pyro.sample("theta", dist.Normal(pyro.param("loc", torch.tensor(0.0)) + late, 1.0))

    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    result = fit(svi, torch.tensor(1.0), num_steps=60, progress=False)
    assert set(result.states["averaged"]) == {"loc", "late"}
    assert result.window[0] > 30
    assert_in(result, "averaged")


# ---- a better answer ------------------------------------------------------------------------------------------------


def gap(guide: AutoNormal) -> float:
    at = objective(guide.locs.theta.item(), guide.scales.theta.item(), TUTORIAL_WALK, 100)
    return at.total / best_gaussian(TUTORIAL_WALK, 100).terms.total - 1


def fit_walk(seed: int, num_steps: int) -> tuple[AutoNormal, FitResult]:
    pyro.clear_param_store()
    guide = AutoNormal(models.random_walk)
    svi = SVI(models.random_walk, guide, Adam({"lr": 0.05}), GeneralizedELBO(w=100))
    y = torch.as_tensor(TUTORIAL_WALK, dtype=torch.float32)
    return guide, fit(svi, y, num_steps=num_steps, seed=seed, progress=False)


def test_the_tutorials_budget_comes_near_the_exact_optimum() -> None:
    gaps, gaps_of_last = [], []
    for seed in range(20):
        guide, result = fit_walk(seed, 100)
        gaps.append(gap(guide))
        result.load("last")
        gaps_of_last.append(gap(guide))
    assert np.median(gaps) <= 0.003
    assert max(gaps) <= 0.01
    assert np.median(gaps) < np.median(gaps_of_last) / 2


def test_ten_times_the_budget_comes_nearer() -> None:
    assert np.median([gap(fit_walk(seed, 1000)[0]) for seed in range(3)]) <= 0.0005


def test_tolerance() -> None:
    result = fit(make(GeneralizedELBO()), torch.tensor(1.0), num_steps=5000, tolerance=0.01, progress=False)
    assert result.stop_reason is StopReason.CONVERGED
    assert result.stationary
    assert 200 < result.num_steps < 5000
    assert "stationary" in str(result)
    assert all(float(error) < 0.01 for error in result.standard_errors.values())
    # Conjugate: the posterior is Normal(1/2, 1/2).
    assert result.states["averaged"]["AutoNormal.locs.theta"].item() == pytest.approx(0.5, abs=0.04)
    pyro.clear_param_store()
    finer = fit(make(GeneralizedELBO()), torch.tensor(1.0), num_steps=5000, tolerance=0.005, progress=False)
    assert finer.num_steps > result.num_steps


def test_patience_counts_from_the_lowest_smoothed_total() -> None:
    result = fit(make(GeneralizedELBO()), torch.tensor(0.0), num_steps=5000, patience=30, progress=False)
    assert result.stop_reason is StopReason.PATIENCE
    smoothed = result.history["smoothed"].values
    assert result.num_steps - 1 - int(np.nanargmin(smoothed)) == 30
    assert "no improvement within the patience" in str(result)


def test_a_lucky_batch_does_not_stop_a_fit_that_improves() -> None:
    """The lowest total of all comes early; by the minimum of totals the fit would stop 40 steps later."""
    calls = 0

    def loss(x: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (x[:, 0] - y[:, 0]).square() * (1.0 if calls != 5 else 1e-6)

    simulate = Simulator(lambda theta: theta.unsqueeze(-1), loss)

    def far(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 10.0))
        pyro.sample("x", simulate(theta), obs=y)

    svi = SVI(far, AutoNormal(far), Adam({"lr": 0.05}), GeneralizedELBO(w=0.1))
    result = fit(svi, torch.tensor([10.0]), num_steps=150, patience=40, progress=False)
    assert result.stop_reason is StopReason.NUM_STEPS
    assert int(result.history["total"].argmin("step")) < 5


@pytest.mark.parametrize("w", [lambda step: max(1.0, 50.0 - step), lambda step: 3.0 if step < 60 else 1.0])
def test_nothing_is_judged_before_w_is_constant(w: Any) -> None:
    constant_from = next(step for step in range(200) if all(w(later) == w(step) for later in range(step, 200)))
    result = fit(make(GeneralizedELBO(w)), torch.tensor(0.0), num_steps=200, patience=1000, progress=False)
    assert result.history["w"].values.tolist() == [w(step) for step in range(200)]
    assert int(result.history["smoothed"].notnull().argmax("step")) == constant_from + 24
    assert result.window[0] > constant_from
    assert result.window[0] - constant_from == pytest.approx((200 - constant_from) / 2, abs=10)


def test_a_w_that_never_settles_leaves_the_last_state() -> None:
    result = fit(make(GeneralizedELBO(lambda step: 1.0 + step)), torch.tensor(0.0), num_steps=30, progress=False)
    assert result.window == (30, 30)
    assert all(torch.equal(result.states["averaged"][name], value) for name, value in result.states["last"].items())
    assert math.isnan(result.best)


# ---- clipping, schedules, warm start --------------------------------------------------------------------------------


def test_clipping_is_by_the_norm_over_all_parameters() -> None:
    def step(max_grad_norm: float | None) -> tuple[Tensor, float]:
        pyro.clear_param_store()
        svi = SVI(model, AutoNormal(model), SGD({"lr": 1.0}), GeneralizedELBO(max_plate_nesting=0))
        svi.guide(torch.tensor(5.0))
        before = stored()
        result = fit(svi, torch.tensor(5.0), num_steps=1, max_grad_norm=max_grad_norm, seed=1, progress=False)
        taken = torch.stack([before[name] - result.states["last"][name] for name in before])
        return taken, float(result.history["grad_norm"][0])

    free, norm = step(None)
    assert free.norm().item() == pytest.approx(norm, rel=1e-5)
    clipped, same_norm = step(norm / 4)
    assert same_norm == norm
    torch.testing.assert_close(clipped, free / 4, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(step(norm * 2)[0], free)


SCHEDULERS: dict[str, dict[str, Any]] = {
    "LambdaLR": {"lr_lambda": lambda epoch: 1 / (1 + epoch)},
    "MultiplicativeLR": {"lr_lambda": lambda epoch: 0.9},
    "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]},
    "ConstantLR": {"total_iters": 3},
    "LinearLR": {"total_iters": 4},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 8},
    "CosineAnnealingLR": {"T_max": 6},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "cycle_momentum": False},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 20},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_advance_once_a_step(name: str) -> None:
    def optimiser() -> PyroLRScheduler:
        settings = {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.05}, **SCHEDULERS[name]}
        return getattr(pyro.optim, name)(settings)

    def rates(optim: PyroLRScheduler) -> list[list[float]]:
        return [scheduler.optimizer.param_groups[0]["lr"] for scheduler in optim.optim_objs.values()]

    optim, seen = optimiser(), []
    svi = SVI(model, AutoNormal(model), optim, GeneralizedELBO())
    fit(svi, torch.tensor(1.0), num_steps=8, progress=False, callbacks=[lambda step: seen.append(rates(optim))])
    by_hand = optimiser()
    tensor = torch.zeros(1, requires_grad=True)
    pyro.get_param_store().setdefault("other", tensor)
    parameter = pyro.get_param_store()["other"].unconstrained()
    expected = []
    for _ in range(8):
        parameter.grad = torch.zeros(1)
        by_hand([parameter])
        by_hand.step()
        expected.append(rates(by_hand)[0])
    assert seen == [[rate, rate] for rate in expected]
    if name != "ConstantLR":
        assert len(set(expected)) > 1


def test_a_plateau_is_one_of_the_smoothed_total() -> None:
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "patience": 10, "factor": 0.5}
    optim = pyro.optim.ReduceLROnPlateau(settings)
    seen: list[tuple[float, float]] = []

    def watch(step: Step) -> None:
        (scheduler, *_) = optim.optim_objs.values()
        seen.append((step.smoothed, scheduler.optimizer.param_groups[0]["lr"]))

    svi = SVI(model, AutoNormal(model), optim, GeneralizedELBO())
    fit(svi, torch.tensor(1.0), num_steps=300, progress=False, callbacks=[watch])
    twin = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.Adam([torch.zeros(1)], lr=0.05), factor=0.5)
    for smoothed, rate in seen:
        # What a step is told is the smoothed total before it.
        assert twin.optimizer.param_groups[0]["lr"] == rate
        if math.isfinite(smoothed):
            twin.step(smoothed)
    assert seen[-1][1] < 0.05


@pytest.mark.parametrize("divergence", [KL(), KL(num_particles=20)])
def test_a_warm_start_begins_at_the_prior_without_simulating(divergence: KL) -> None:
    counted = Counted(drift)
    simulate = Simulator(counted, loss=losses.mse)

    def far(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(-2.0, 1.7))
        pyro.sample("x", simulate(theta), obs=y)

    elbo = GeneralizedELBO(w=lambda step: 5.0 + step, divergence=divergence)
    guide = AutoNormal(far)
    svi = SVI(far, guide, SGD({"lr": 1e-9}), elbo)
    warm = SVI(far, guide, Adam({"lr": 0.05}), elbo)
    result = fit(warm, torch.zeros(5), num_steps=1, warm_start=400, progress=False)
    assert counted.calls == 1
    assert elbo.step == 1
    assert result.history["w"].values.tolist() == [5.0]
    assert guide.locs.theta.item() == pytest.approx(-2.0, abs=0.15)
    assert guide.scales.theta.item() == pytest.approx(1.7, abs=0.15)
    assert float(result.history["divergence"][0]) == pytest.approx(0.0, abs=0.1)
    # Of the warm start no optimiser is left: the one step of the fit was Adam's first.
    assert all(float(made.state_dict()["state"][0]["step"]) == 1 for made in warm.optim.optim_objs.values())
    del svi


def test_no_nan_reaches_the_parameters_in_a_warm_start() -> None:
    class Broken(dist.Normal):
        def log_prob(self, value: Tensor) -> Tensor:
            return super().log_prob(value) + 0 * (value - value.detach()).sqrt()

    def broken(y: Tensor) -> None:
        pyro.sample("theta", Broken(0.0, 1.0))

    svi = SVI(broken, AutoNormal(model), Adam({"lr": 0.1}), GeneralizedELBO(divergence=KL(analytic=False)))
    watching = Watching()
    with pytest.raises(RuntimeError, match=r"in the warm start, and the norm of its gradient nan"):
        fit(svi, torch.tensor(0.0), num_steps=1, warm_start=3, callbacks=[watching])
    assert all(value.isfinite().all() for value in stored().values())
    assert watching.closed == 1


def test_a_warm_start_leaves_a_loaded_optimiser_alone() -> None:
    first = make(GeneralizedELBO())
    fit(first, torch.tensor(0.0), num_steps=20, progress=False)
    loaded = make(GeneralizedELBO())
    loaded.optim.set_state(first.optim.get_state())
    fit(loaded, torch.tensor(0.0), num_steps=1, warm_start=3, progress=False)
    assert {float(made.state_dict()["state"][0]["step"]) for made in loaded.optim.optim_objs.values()} == {21.0}


def test_a_guide_without_parameters_is_fitted_all_the_same() -> None:
    def guide(y: Tensor) -> None:
        pyro.sample("theta", dist.Normal(0.0, 1.0))

    def learnt(y: Tensor) -> None:
        pyro.sample("theta", dist.Normal(0.0, 1.0))

    result = fit(SVI(learnt, guide, Adam({"lr": 0.1}), Trace_ELBO()), torch.tensor(0.0), num_steps=3, progress=False)
    assert result.num_steps == 3
    assert result.states["averaged"] == {}


def test_a_warm_start_needs_our_elbo_and_a_finite_divergence() -> None:
    with pytest.raises(TypeError, match=r"warm_start needs a GeneralizedELBO as the loss of svi, got <.*Trace_ELBO"):
        fit(make(Trace_ELBO()), torch.tensor(0.0), num_steps=1, warm_start=3)

    def narrow(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Uniform(0.0, 1.0, validate_args=False))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    def wide(y: Tensor) -> None:
        pyro.sample("theta", dist.Normal(pyro.param("loc", torch.tensor(5.0)), 1.0))

    svi = SVI(narrow, wide, Adam({"lr": 0.1}), GeneralizedELBO())
    warnings.filterwarnings("ignore", "Encountered inf|.*subset of")
    with pytest.raises(RuntimeError, match=r"the divergence from the prior is inf in the warm start"):
        fit(svi, torch.tensor(0.0), num_steps=1, warm_start=3)


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_a_step_with_a_gradient_that_is_not_finite_is_not_taken() -> None:
    calls = 0

    def sometimes(y: Tensor) -> None:
        nonlocal calls
        calls += 1
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        bad = (theta - theta.detach()).sqrt() if 10 < calls <= 15 else 0.0  # zero, of infinite slope
        pyro.factor("bad", torch.as_tensor(bad) * torch.ones(()))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

    svi = SVI(sometimes, AutoNormal(sometimes), Adam({"lr": 0.05}), Trace_ELBO())
    states: list[dict[str, Tensor]] = []
    result = fit(svi, torch.tensor(1.0), num_steps=30, progress=False, callbacks=[lambda _: states.append(stored())])
    skipped = ~np.isfinite(result.history["grad_norm"].values)
    assert skipped.sum() == 5
    for i in np.flatnonzero(skipped):
        assert all(torch.equal(states[i][name], states[i - 1][name]) for name in states[i])
    assert all(value.isfinite().all() for state in states for value in state.values())
    assert not torch.equal(states[-1]["AutoNormal.locs.theta"], states[15]["AutoNormal.locs.theta"])
    assert "steps not taken, for the gradient was not finite: 5" in str(result)


def test_gradients_that_stay_so_end_the_fit() -> None:
    def broken(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.factor("bad", (theta - theta.detach()).sqrt())

    svi = SVI(broken, AutoNormal(broken), Adam({"lr": 0.05}), Trace_ELBO())
    with pytest.warns(UserWarning, match=r"diverged at step 10: .* not finite in 10 steps in a row. Try a lower"):
        result = fit(svi, torch.tensor(1.0), num_steps=100, progress=False)
    assert result.stop_reason is StopReason.DIVERGED
    assert all(value.isfinite().all() for value in stored().values())


@pytest.mark.parametrize("optim", [SGD({"lr": 3.0}), SGD({"lr": 1e6}), Adam({"lr": 100.0})])
def test_a_diverging_fit_stops_in_its_best_state(optim: Any) -> None:
    svi = SVI(model, AutoNormal(model), optim, GeneralizedELBO(w=10))
    before: list[dict[str, Tensor]] = []
    svi.guide(torch.tensor(1.0))
    before.append(stored())
    with pytest.warns(UserWarning, match=r"the fit diverged at step \d+: .* Try a lower learning rate, max_grad_norm"):
        result = fit(svi, torch.tensor(1.0), num_steps=2000, progress=False)
    assert result.stop_reason is StopReason.DIVERGED
    assert result.num_steps < 200
    assert_in(result, "best")
    assert result.advice in str(result)
    at_best = GeneralizedELBO(w=10, num_particles=1000).loss(model, svi.guide, torch.tensor(1.0))
    assert at_best < 3 * abs(float(result.history["total"][0])) + 30


def test_a_fit_that_diverges_while_w_changes_ends_at_its_start() -> None:
    svi = SVI(model, AutoNormal(model), SGD({"lr": 3.0}), GeneralizedELBO(lambda step: max(10.0, 300.0 - step)))
    svi.guide(torch.tensor(1.0))
    before = stored()
    with pytest.warns(UserWarning, match="the fit diverged"):
        result = fit(svi, torch.tensor(1.0), num_steps=400, progress=False)
    assert result.stop_reason is StopReason.DIVERGED
    assert all(torch.equal(value, before[name]) for name, value in stored().items())


def test_gradients_that_are_not_finite_end_a_fit_while_w_changes() -> None:
    def broken(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.factor("bad", (theta - theta.detach()).sqrt())

    svi = SVI(broken, AutoNormal(broken), Adam({"lr": 0.05}), GeneralizedELBO(lambda step: 1000.0 - step))
    with pytest.warns(UserWarning, match=r"diverged at step 10: .* not finite in 10 steps in a row"):
        assert fit(svi, torch.tensor(1.0), num_steps=500, progress=False).num_steps == 10


@pytest.mark.parametrize("noise", ["lognormal", "misses", "chi-squared"])
def test_skewed_noise_is_no_divergence(noise: str) -> None:
    """Stationary totals, of which the first may be small by luck. Of 200 runs at most 4 may be misjudged."""
    rng = np.random.default_rng(0)
    draw = {
        "lognormal": lambda: np.exp(3 * rng.standard_normal(300)),
        "misses": lambda: np.where(rng.random(300) < 0.3, 100.0, 1e-6 * rng.random(300)),
        "chi-squared": lambda: rng.chisquare(1, 300),
    }[noise]
    misjudged = 0
    for _ in range(200):
        descent = Descent()
        for total in draw():
            descent.add(float(total))
        misjudged += bool(descent.diverged)
    assert misjudged <= 4


def test_an_exploding_scale_ends_the_fit() -> None:
    """The loss does not depend on theta, the divergence hardly counts, and the entropy pulls the scale up."""

    def flat(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1e30))
        pyro.factor("nothing", 0.0 * theta)

    svi = SVI(
        flat, AutoNormal(flat), pyro.optim.ClippedAdam({"lr": 1.0, "lrd": 1.3, "clip_norm": 1e30}), GeneralizedELBO()
    )
    with pytest.warns(UserWarning, match=r"the parameter 'AutoNormal.scales.theta' grew to "):
        result = fit(svi, torch.tensor(1.0), num_steps=2000, progress=False)
    assert result.stop_reason is StopReason.DIVERGED


def test_a_noisy_fit_does_not_count_as_diverging() -> None:
    """Heavy-tailed: a Cauchy factor on the loss in each simulation."""

    def heavy(theta: Tensor) -> Tensor:
        noise = torch.randn(len(theta), 1) / torch.randn(len(theta), 1).abs().clamp(min=1e-4)
        return theta.unsqueeze(-1) + noise

    simulate = Simulator(heavy, loss=losses.mse)

    def noisy(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", simulate(theta), obs=y)

    for seed in range(5):
        pyro.clear_param_store()
        svi = SVI(noisy, AutoNormal(noisy), Adam({"lr": 0.01}), GeneralizedELBO(w=100))
        result = fit(svi, torch.tensor([1.0]), num_steps=400, max_grad_norm=100.0, seed=seed, progress=False)
        assert result.stop_reason is StopReason.NUM_STEPS


def test_only_our_elbo_goes_on_without_failed_runs() -> None:
    calls = 0

    def fails(theta: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return theta.unsqueeze(-1) * (math.nan if calls > 5 else 1.0)

    simulate = Simulator(fails, loss=losses.mse)

    def simulated(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", simulate(theta), obs=y)

    warnings.filterwarnings("ignore", "Encountered NaN")
    svi = SVI(simulated, AutoNormal(simulated), Adam({"lr": 0.1}), Trace_ELBO(max_plate_nesting=0))
    states: list[dict[str, Tensor]] = []
    with pytest.raises(RuntimeError, match=r"objective is nan at step 6, and only a GeneralizedELBO can go on"):
        fit(svi, torch.tensor([1.0]), num_steps=50, progress=False, callbacks=[lambda _: states.append(stored())])
    assert all(torch.equal(value, states[-1][name]) for name, value in stored().items())  # the best: too few to judge
    assert all(
        not tensor.grad.any() for _, tensor in pyro.get_param_store().named_parameters() if tensor.grad is not None
    )


def test_an_error_leaves_the_guide_in_its_best_state() -> None:
    result_of_whole = fit(make(GeneralizedELBO()), torch.tensor(1.0), num_steps=60, progress=False)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def fail(step: Step) -> None:
        if step.step == 60:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fit(make(GeneralizedELBO()), torch.tensor(1.0), num_steps=100, progress=False, callbacks=[fail])
    for name, value in stored().items():
        assert torch.equal(value, result_of_whole.states["best"][name])


def test_memory_does_not_grow_with_the_number_of_steps() -> None:
    """A graph or a state kept at each of 10,000 steps would take tens of megabytes, the history takes half of one."""
    code = """
import resource, sys
import pyro, pyro.distributions as dist, torch
from pyro.infer import SVI
from pyrobirds import GeneralizedELBO, Simulator, fit, losses
torch.set_num_threads(1)
simulate = Simulator(lambda theta: theta.unsqueeze(-1) + torch.randn(len(theta), 50), losses.mse)
def model(y):
    simulated = pyro.sample("x", simulate(pyro.sample("theta", dist.Normal(0.0, 1.0))), obs=y)
def guide(y):
    pyro.sample("theta", dist.Normal(pyro.param("loc", torch.zeros(())), 1.0))
peaks = {}
def watch(step):
    peaks[step.step] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "linux" else 1024)
svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), GeneralizedELBO(num_particles=20))
with pyro.validation_enabled(False):
    fit(svi, torch.zeros(50), num_steps=10_000, progress=False, callbacks=[watch])
print(peaks[10_000] - peaks[2000])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 8 * 1024  # KiB


# ---- watching, arguments --------------------------------------------------------------------------------------------


def test_bar_shows_what_the_tutorial_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr("pyrobirds.progress.has_bar", lambda: True)
    y = models.random_walk(n_timesteps=10)
    svi = SVI(models.random_walk, AutoNormal(models.random_walk), Adam({"lr": 0.05}), GeneralizedELBO(w=10))
    result = fit(svi, y, num_steps=30, model_kwargs={"n_timesteps": 10})
    bar = capsys.readouterr().err
    last = {name: f"{float(result.history[name][-1]):.5g}" for name in ("loss", "divergence", "total")}
    assert (
        f"loss={last['loss']}, reg={last['divergence']}, total={last['total']}, best={result.best:.5g}, stall=" in bar
    )
    assert "30/30" in bar
    fit(svi, y, num_steps=1, progress=False, model_kwargs={"n_timesteps": 10})
    assert capsys.readouterr().err == ""


def test_without_a_terminal_there_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    svi = make(GeneralizedELBO())
    fit(svi, torch.tensor(0.0), num_steps=30)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("step 30/30, ")
    assert all(word in line for word in ("loss ", "reg ", "total ", "best ", "stall "))
    monkeypatch.setattr("pyrobirds.progress._SECONDS", 0.0)
    fit(svi, torch.tensor(0.0), num_steps=3)
    assert [line.split(",")[0] for line in capsys.readouterr().err.splitlines()] == [f"step {i}/3" for i in (1, 2, 3)]


class Watching:
    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.closed = 0

    def __call__(self, step: Step) -> None:
        self.steps.append(step)

    def close(self) -> None:
        self.closed += 1


class Unclosable(Watching):
    def close(self) -> None:
        raise OSError("disk full")


def test_a_callback_that_cannot_be_closed_loses_nothing() -> None:
    first, last = Watching(), Watching()
    with pytest.warns(UserWarning, match=r"Unclosable object at .* could not be closed: OSError: disk full"):
        result = fit(
            make(GeneralizedELBO()),
            torch.tensor(0.0),
            num_steps=3,
            progress=False,
            callbacks=(first, Unclosable(), last),
        )
    assert result.num_steps == 3
    assert (first.closed, last.closed) == (1, 1)


def test_callbacks_are_closed_if_the_fit_cannot_begin(tmp_path: Path) -> None:
    watching = Watching()
    fit(make(GeneralizedELBO()), torch.tensor(0.0), num_steps=1, progress=False, checkpoint=tmp_path / "fit.pt")
    with pytest.raises(ValueError, match="checkpoint of another run"):
        fit(
            make(GeneralizedELBO(2)),
            torch.tensor(0.0),
            num_steps=1,
            progress=False,
            checkpoint=tmp_path / "fit.pt",
            callbacks=[watching],
        )
    assert watching.closed == 1


def test_what_callbacks_draw_does_not_change_the_fit() -> None:
    def draw(step: Step) -> None:
        torch.randn(3)
        np.random.random()  # noqa: NPY002

    plain = fit(make(GeneralizedELBO()), torch.tensor(0.0), num_steps=5, seed=1, progress=False)
    pyro.clear_param_store()
    watched = fit(make(GeneralizedELBO()), torch.tensor(0.0), num_steps=5, seed=1, progress=False, callbacks=[draw])
    assert watched.history.equals(plain.history)


@pytest.mark.parametrize("stream", [None, "no terminal", "broken"])
def test_whatever_stderr_is_a_fit_goes_on(stream: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def write(self, text: str) -> None:
            if stream == "broken":
                raise BrokenPipeError

        def flush(self) -> None: ...

    monkeypatch.setattr("pyrobirds.progress._SECONDS", 0.0)
    monkeypatch.setattr(sys, "stderr", None if stream is None else Broken())
    assert fit(make(GeneralizedELBO(max_plate_nesting=0)), torch.tensor(0.0), num_steps=3).num_steps == 3


def test_callbacks_see_every_step_and_are_closed() -> None:
    watching = Watching()
    result = fit(make(GeneralizedELBO()), torch.tensor(0.0), num_steps=30, progress=False, callbacks=[watching])
    assert watching.closed == 1
    assert [step.step for step in watching.steps] == list(range(1, 31))
    for name in result.history:
        values = [getattr(step, str(name)) for step in watching.steps]
        assert np.array_equal(values, result.history[name], equal_nan=True), name
    seconds = [step.seconds for step in watching.steps]
    assert seconds == sorted(seconds)
    assert seconds[-1] <= result.seconds
    assert watching.steps[0].num_steps == 30


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 1.5}, TypeError, "num_steps must be a whole number"),
        ({"patience": 0}, ValueError, "patience must be at least 1"),
        ({"patience": True}, TypeError, "patience must be a whole number"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be a finite number above 0"),
        ({"warm_start": -1}, ValueError, "warm_start must be at least 0"),
        ({"max_grad_norm": -1}, ValueError, "max_grad_norm must be a finite number above 0"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"checkpoint": 3}, TypeError, "checkpoint must be the path of a file, got 3"),
        ({"checkpoint_interval": -1}, ValueError, "checkpoint_interval must be a finite number of at least 0"),
        ({"callbacks": [3]}, TypeError, "callbacks must be callables that take a Step, got 3"),
        (
            {"callbacks": print},
            TypeError,
            r"callbacks must be several callables, as in callbacks=\(a, b\) or \(a,\), got",
        ),
        ({"callbacks": None}, TypeError, r"callbacks must be several callables, .* got None"),
        ({"model_kwargs": 3}, TypeError, "model_kwargs must be a dict of keyword arguments, got 3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fit(make(GeneralizedELBO()), torch.tensor(0.0), **{"num_steps": 2, **arguments})


def test_what_is_not_an_svi_is_refused() -> None:
    with pytest.raises(TypeError, match=r"svi must be a pyro.infer.SVI, got <function"):
        fit(model, torch.tensor(0.0), num_steps=1)  # type: ignore[arg-type]


def test_an_svi_with_a_step_of_its_own_is_refused() -> None:
    class Own(SVI):
        def step(self, *args: Any, **kwargs: Any) -> float:
            return 0.0

    with pytest.raises(TypeError, match=r"but Own has a step of its own"):
        fit(Own(model, AutoDiagonalNormal(model), Adam({"lr": 0.1}), Trace_ELBO()), torch.tensor(0.0), num_steps=1)
