"""Fits that are killed and resumed, interrupted, and refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as T
import pytest
import resumable_fit
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.optim import Adam

from pyrobirds import GeneralizedELBO, Simulator, fit, losses
from pyrobirds.callbacks import Step
from pyrobirds.divergences import KL
from pyrobirds.fit_result import FitResult, StopReason
from pyrobirds.simulators import random_walk

HERE = Path(__file__).parent


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, HERE / "resumable_fit.py", *map(str, arguments)], cwd=HERE)


def lines(log: Path) -> int:
    return log.read_text().count("\n") if log.exists() else 0


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(-1.0), b.nan_to_num(-1.0))
    return a == b


@pytest.mark.parametrize("kind", ["walk", "loop", "foreign"])
def test_a_fit_killed_twice_ends_bitwise_as_one_that_never_stopped(kind: str, tmp_path: Path) -> None:
    checkpoint, log, ended = tmp_path / "fit.pt", tmp_path / "log.csv", tmp_path / "resumed.pt"
    never_stopped = start(kind, tmp_path / "whole.pt")
    for at_least in (30, 90):
        process = start(kind, ended, checkpoint, log)
        while lines(log) < at_least:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not ended.exists()
    assert start(kind, ended, checkpoint, log).wait() == 0
    assert never_stopped.wait() == 0
    whole, resumed = torch.load(tmp_path / "whole.pt"), torch.load(ended)
    assert len(whole["history"]["total"]) == resumable_fit.NUM_STEPS
    for part in whole:
        assert same(whole[part], resumed[part]), part
    steps = [int(row.split(",")[0]) for row in log.read_text().splitlines()[1:]]
    assert steps == list(range(1, resumable_fit.NUM_STEPS + 1))


def model(y: torch.Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def make(**options: Any) -> SVI:
    chosen: dict[str, Any] = {
        "model": model,
        "guide": AutoNormal,
        "optim": Adam({"lr": 0.05}),
        "loss": GeneralizedELBO(),
    }
    chosen.update(options)
    return SVI(chosen["model"], chosen["guide"](chosen["model"]), chosen["optim"], chosen["loss"])


def run(svi: SVI, y: float = 1.0, num_steps: int = 40, **options: Any) -> FitResult:
    return fit(svi, torch.tensor(y), num_steps=num_steps, progress=False, **options)


def test_a_finished_fit_is_returned_as_it_ended_and_goes_on_with_more_steps(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    first = run(make(), checkpoint=path)
    pyro.clear_param_store()
    again = make()
    back = run(again, checkpoint=path)
    assert again.loss_and_grads.__self__.step == 40  # as saved: no step was taken
    assert back.history.equals(first.history)
    assert back.stop_reason is StopReason.NUM_STEPS
    assert same(dict(back.states["averaged"]), dict(first.states["averaged"]))
    pyro.clear_param_store()
    more = run(make(), num_steps=70, checkpoint=path)
    assert more.num_steps == 70
    assert more.history.isel(step=slice(0, 40)).drop_vars("step").equals(first.history.drop_vars("step"))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    assert run(make(), num_steps=70).history.equals(more.history)


def test_stopping_is_judged_anew_on_resumption(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    stopped = run(make(), num_steps=500, patience=3, checkpoint=path)
    assert stopped.stop_reason is StopReason.PATIENCE
    pyro.clear_param_store()
    assert run(make(), num_steps=500, patience=3, checkpoint=path).num_steps == stopped.num_steps
    pyro.clear_param_store()
    assert run(make(), num_steps=500, checkpoint=path).num_steps == 500


def other_prior(y: torch.Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


@pytest.mark.parametrize(
    ("there", "here", "named"),
    [
        ({}, {"model": other_prior}, r"model: .*model in the file, .*other_prior here"),
        ({}, {"guide": AutoDiagonalNormal}, r"guide: AutoNormal in the file, AutoDiagonalNormal here"),
        ({}, {"y": 2.0}, r"data of site 'y'"),
        ({}, {"loss": GeneralizedELBO(w=2)}, r"objective, w of step 1: 1 in the file, 2 here"),
        ({}, {"loss": GeneralizedELBO(w=lambda step: 1.0 + step)}, r"objective, w of step 2: 1 in the file, 2 here"),
        ({}, {"loss": GeneralizedELBO(num_particles=3)}, r"objective, num_particles: 10 in the file, 3 here"),
        ({}, {"loss": GeneralizedELBO(divergence=KL(analytic=False))}, r"objective, divergence: "),
        ({}, {"loss": Trace_ELBO()}, r"objective, kind: GeneralizedELBO in the file, Trace_ELBO here"),
        ({}, {"optim": Adam({"lr": 0.01})}, r"optimiser, settings: .*0\.05.* in the file, .*0\.01.* here"),
        ({}, {"optim": pyro.optim.SGD({"lr": 0.05})}, r"optimiser, kind: Adam in the file, SGD here"),
        ({"seed": 1}, {"seed": 2}, r"fit, seed: 1 in the file, 2 here"),
        ({}, {"warm_start": 3}, r"fit, warm_start: 0 in the file, 3 here"),
        ({}, {"max_grad_norm": 3.0}, r"fit, max_grad_norm: None in the file, 3 here"),
    ],
)
def test_the_checkpoint_of_another_fit_is_refused(
    tmp_path: Path, there: dict[str, Any], here: dict[str, Any], named: str
) -> None:
    def once(options: dict[str, Any]) -> None:
        pyro.clear_param_store()
        of_svi = {name: value for name, value in options.items() if name in ("model", "guide", "loss", "optim")}
        rest = {name: value for name, value in options.items() if name not in of_svi}
        run(make(**of_svi), checkpoint=tmp_path / "fit.pt", **rest)

    once(there)
    before = (tmp_path / "fit.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"(?s)fit.pt is a checkpoint of another run.*{named}.*delete the file"):
        once(here)
    assert (tmp_path / "fit.pt").read_bytes() == before


def test_a_changed_prior_is_seen_behind_the_same_name(tmp_path: Path) -> None:
    def priors(scale: float) -> Any:
        def model(y: torch.Tensor) -> None:
            theta = pyro.sample("theta", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y)

        return model

    run(make(model=priors(1.0)), checkpoint=tmp_path / "fit.pt")
    pyro.clear_param_store()
    with pytest.raises(ValueError, match=r"prior of site 'theta'"):
        run(make(model=priors(2.0)), checkpoint=tmp_path / "fit.pt")


def test_another_simulator_loss_or_setting_is_seen(tmp_path: Path) -> None:
    def other_loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x - y).abs().mean(-1)

    def simulated(simulate: Simulator) -> Any:
        def model(y: torch.Tensor) -> None:
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            pyro.sample("x", simulate(theta), obs=y.expand(10))

        return model

    def once(**options: Any) -> None:
        pyro.clear_param_store()
        settings = {"fn": random_walk, "loss": losses.mse, "n_timesteps": 10, **options}
        run(make(model=simulated(Simulator(**settings))), num_steps=3, checkpoint=tmp_path / "fit.pt")

    once()
    for change in ({"loss": other_loss}, {"tau": 0.5}, {"seed": 1}):
        with pytest.raises(
            ValueError, match=r"site 'x': Simulator\(random_walk, mse, n_timesteps=10, seed=None\) of shape"
        ):
            once(**change)
    once()


def test_an_optimiser_that_cannot_be_saved_is_refused_before_the_first_step(tmp_path: Path) -> None:
    svi = make()
    svi.optim = lambda parameters: None
    with pytest.raises(TypeError, match=r"the optimiser must be a pyro.optim.PyroOptim"):
        run(svi, checkpoint=tmp_path / "fit.pt")
    assert svi.loss_and_grads.__self__.step == 0


def test_the_checkpoint_is_written_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "fit.pt"
    seen: list[bool] = []
    run(
        make(),
        num_steps=5,
        checkpoint=path,
        checkpoint_interval=1e6,
        callbacks=[lambda step: seen.append(path.exists())],
    )
    assert seen == [False] * 5
    assert path.exists()
    path.unlink()
    pyro.clear_param_store()
    seen.clear()
    run(
        make(), num_steps=5, checkpoint=path, checkpoint_interval=0, callbacks=[lambda step: seen.append(path.exists())]
    )
    assert seen == [False] + [True] * 4  # callbacks come before the saving


def flow_guide(model: Any) -> Any:
    """A guide that is made of more than its parameters: of a permutation that is drawn when it is first called."""

    def parts(size: int) -> Any:
        return T.ComposeTransformModule([T.affine_coupling(size, [5]), T.permute(size), T.affine_coupling(size, [5])])

    return AutoNormalizingFlow(model, parts)


def six(y: torch.Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(6), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(theta * torch.arange(6.0), 1.0).to_event(1), obs=y * torch.ones(6))


@pytest.mark.parametrize("make_guide", [flow_guide, AutoIAFNormal, AutoLowRankMultivariateNormal])
@pytest.mark.parametrize("analytic", [True, False])
def test_flows_resume_bitwise(make_guide: Any, analytic: bool, tmp_path: Path) -> None:
    def svi() -> SVI:
        pyro.clear_param_store()
        return make(model=six, guide=make_guide, loss=GeneralizedELBO(divergence=KL(analytic=analytic)))

    whole = run(svi(), seed=5)
    run(svi(), num_steps=15, seed=5, checkpoint=tmp_path / "fit.pt")
    resumed = run(svi(), seed=5, checkpoint=tmp_path / "fit.pt")
    assert resumed.history.equals(whole.history)
    assert same(dict(resumed.states["averaged"]), dict(whole.states["averaged"]))


def test_a_guide_that_was_made_otherwise_is_refused(tmp_path: Path) -> None:
    for seed in (1, 2):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        svi = make(model=six, guide=flow_guide)
        if seed == 1:
            run(svi, checkpoint=tmp_path / "fit.pt")
        else:
            with pytest.raises(ValueError, match=r"the guide's draw of .* at these parameters"):
                run(svi, checkpoint=tmp_path / "fit.pt")


def test_a_guide_with_equal_parameters_and_another_family_is_refused(tmp_path: Path) -> None:
    for family in (dist.Normal, dist.Cauchy):

        def guide(y: torch.Tensor, family: Any = family) -> None:
            pyro.sample("theta", family(pyro.param("loc", torch.tensor(0.0)), 1.0))

        svi = SVI(model, guide, Adam({"lr": 0.05}), GeneralizedELBO())
        if family is dist.Normal:
            run(svi, checkpoint=tmp_path / "fit.pt")
            pyro.clear_param_store()
        else:
            with pytest.raises(ValueError, match=r"the guide's draw of 'theta' at these parameters"):
                run(svi, checkpoint=tmp_path / "fit.pt")


def test_parameters_that_come_later_are_named(tmp_path: Path) -> None:
    calls = 0

    def guide(y: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        late = pyro.param("late", torch.tensor(0.0)) if calls > 10 else 0.0
        pyro.sample("theta", dist.Normal(pyro.param("loc", torch.tensor(0.0)) + late, 1.0))

    run(SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO()), checkpoint=tmp_path / "fit.pt")
    pyro.clear_param_store()
    calls = 0
    with pytest.raises(
        ValueError, match=r"has the parameters \['late'\], which model and guide do not use when they are"
    ):
        run(SVI(model, guide, Adam({"lr": 0.05}), Trace_ELBO()), checkpoint=tmp_path / "fit.pt")


@pytest.mark.parametrize("w", [lambda step: [5.0] * 20 + [2.0] * 20, lambda step: 41.0 - step])
def test_w_is_asked_for_the_steps_of_the_fit_alone(w: Any, tmp_path: Path) -> None:
    schedule = (lambda step: w(step)[step]) if isinstance(w(0), list) else w
    whole = run(make(loss=GeneralizedELBO(schedule)), checkpoint=tmp_path / "fit.pt")
    pyro.clear_param_store()
    assert run(make(loss=GeneralizedELBO(schedule)), checkpoint=tmp_path / "fit.pt").history.equals(whole.history)


def test_patience_is_not_judged_on_another_w_after_a_resumption(tmp_path: Path) -> None:
    def w(step: int) -> float:
        return 100.0 if step < 200 else 1.0

    run(make(loss=GeneralizedELBO(w)), num_steps=100, checkpoint=tmp_path / "fit.pt")
    pyro.clear_param_store()
    resumed = run(make(loss=GeneralizedELBO(w)), num_steps=400, patience=10, checkpoint=tmp_path / "fit.pt")
    assert resumed.num_steps > 200


class Halving:
    def __call__(self, epoch: int) -> float:
        return 0.5**epoch


def test_schedules_by_objects_resume(tmp_path: Path) -> None:
    for _ in range(2):
        pyro.clear_param_store()
        settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "lr_lambda": Halving()}
        result = run(make(optim=pyro.optim.LambdaLR(settings)), checkpoint=tmp_path / "fit.pt")
    assert result.num_steps == 40


def test_a_fit_that_diverges_before_the_first_saving_says_so(tmp_path: Path) -> None:
    svi = make(optim=pyro.optim.SGD({"lr": 3.0}), loss=GeneralizedELBO(10))
    with pytest.warns(UserWarning, match="the fit diverged"):
        result = run(svi, num_steps=500, checkpoint=tmp_path / "fit.pt")
    assert result.stop_reason is StopReason.DIVERGED


def test_the_running_moments_of_a_guide_count_steps_alone(tmp_path: Path) -> None:
    batches = []
    for options in ({}, {"checkpoint": tmp_path / "fit.pt", "checkpoint_interval": 0}):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = resumable_fit.BatchNormGuide()
        svi = SVI(resumable_fit.plain_model, guide, Adam({"lr": 0.01}), Trace_ELBO())
        fit(svi, torch.ones(8, 2), num_steps=10, progress=False, **options)
        batches.append((int(guide.norm.num_batches_tracked), guide.norm.running_mean.tolist()))
    assert batches[0] == batches[1]


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


def press_at(number: int) -> Any:
    def callback(step: Step) -> None:
        if step.step == number:
            os.kill(os.getpid(), signal.SIGINT)

    return callback


def test_ctrl_c_ends_after_the_step_in_the_best_state(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    svi = make()
    result = run(svi, num_steps=1000, callbacks=[press_at(60)], checkpoint=tmp_path / "fit.pt")
    assert signal.getsignal(signal.SIGINT) is before
    assert result.stop_reason is StopReason.INTERRUPTED
    assert result.stop_reason.value == "interrupted"
    assert "interrupted" in str(result)
    assert result.num_steps == 60
    assert result.state == "best"
    lowest = int(result.history["smoothed"].values[24:].argmin())
    assert result.best == result.history["smoothed"].values[24 + lowest]
    for name, tensor in pyro.get_param_store().named_parameters():
        assert torch.equal(tensor.detach(), result.states["best"][name])
    # It goes on from the last state, not from the best.
    pyro.clear_param_store()
    resumed = run(make(), num_steps=80, checkpoint=tmp_path / "fit.pt")
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    assert run(make(), num_steps=80).history.equals(resumed.history)


def test_ctrl_c_leaves_the_average_where_the_parameters_are_stationary() -> None:
    result = run(make(), num_steps=5000, callbacks=[press_at(1500)])
    assert result.stop_reason is StopReason.INTERRUPTED
    assert result.stationary
    assert result.state == "averaged"
    for name, tensor in pyro.get_param_store().named_parameters():
        assert torch.equal(tensor.detach(), result.states["averaged"][name])


@pytest.mark.parametrize("how", ["twice", "raised"])
def test_ctrl_c_in_the_middle_of_a_step(how: str) -> None:
    calls = 0

    def slow(theta: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 50 and how == "raised":
            raise KeyboardInterrupt
        if calls == 50:
            os.kill(os.getpid(), signal.SIGINT)  # noted
            os.kill(os.getpid(), signal.SIGINT)  # obeyed
        return theta.unsqueeze(-1) + torch.randn(len(theta), 3)

    simulate = Simulator(slow, loss=losses.mse)

    def simulated(y: torch.Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        pyro.sample("x", simulate(theta), obs=y.expand(3))

    svi = make(model=simulated)
    result = run(svi, num_steps=1000)
    assert result.stop_reason is StopReason.INTERRUPTED
    assert result.num_steps == calls - 1
    assert result.state == "best"
    assert all(tensor.grad is None or not tensor.grad.any() for _, tensor in pyro.get_param_store().named_parameters())


def test_ctrl_c_before_the_first_step_is_over_is_an_ordinary_one() -> None:
    def broken(y: torch.Tensor) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(SVI(broken, AutoNormal(model), Adam({"lr": 0.1}), GeneralizedELBO()))


# ---- seed -----------------------------------------------------------------------------------------------------------


def test_a_seed_makes_a_fit_reproducible_and_leaves_the_generators_alone() -> None:
    results = []
    for _ in range(2):
        pyro.clear_param_store()
        state = torch.get_rng_state()
        results.append(run(make(), seed=5))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
    assert results[0].history.equals(results[1].history)
    pyro.clear_param_store()
    assert not run(make(), seed=6).history.equals(results[0].history)
