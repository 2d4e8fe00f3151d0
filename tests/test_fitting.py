"""The training loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch import Tensor

from pyrobirds import GeneralizedELBO, fit, models
from pyrobirds.fitting import StopReason


def model(y: Tensor, scale: float = 1.0) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, scale), obs=y)


def make(loss: Any, lr: float = 0.05) -> SVI:
    return SVI(model, AutoNormal(model), Adam({"lr": lr}), loss)


def test_history_holds_what_the_steps_returned() -> None:
    y = torch.tensor(1.0)
    result = fit(make(GeneralizedELBO(w=2)), y, num_steps=7, progress=False)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    elbo = GeneralizedELBO(w=2)
    by_hand = make(elbo)
    totals, losses, divergences = [], [], []
    for _ in range(7):
        totals.append(by_hand.step(y))
        losses.append(float(elbo.terms.loss))
        divergences.append(float(elbo.terms.divergence))
    assert list(result.history) == ["loss", "divergence", "total"]
    assert result.history["total"].tolist() == totals
    assert result.history["loss"].tolist() == losses
    assert result.history["divergence"].tolist() == divergences
    assert np.allclose(result.history["loss"] + result.history["divergence"], totals, rtol=1e-6)
    assert result.stop_reason is StopReason.NUM_STEPS
    assert result.num_steps == 7
    assert result.best == min(totals)


@pytest.mark.parametrize("loss", [Trace_ELBO(), TraceMeanField_ELBO(num_particles=2, vectorize_particles=True)])
def test_any_elbo(loss: Any) -> None:
    result = fit(make(loss), torch.tensor(1.0), num_steps=3, progress=False, model_kwargs={"scale": 2.0})
    assert list(result.history) == ["total"]
    assert result.history["total"].shape == (3,)


def test_a_loss_function_instead_of_an_elbo() -> None:
    svi = make(lambda *args: Trace_ELBO().differentiable_loss(*args))
    assert fit(svi, torch.tensor(1.0), num_steps=2, progress=False).num_steps == 2


def test_patience() -> None:
    """An objective that only rises: no step after the first is an improvement."""
    elbo = GeneralizedELBO(w=lambda step: 1.0 + step)
    far = make(elbo, lr=1e-8)
    fixed = torch.tensor(0.0)
    pyro.set_rng_seed(0)
    guide = far.guide
    guide(fixed)
    with torch.no_grad():
        guide.locs.theta.fill_(50.0)  # so that the divergence outweighs the noise of the loss
    result = fit(far, fixed, num_steps=100, patience=4, progress=False)
    assert result.stop_reason is StopReason.PATIENCE
    assert result.num_steps == 5
    assert result.best == result.history["total"][0]
    assert "patience" in str(result)


def test_patience_that_never_runs_out() -> None:
    assert fit(make(GeneralizedELBO()), torch.tensor(0.0), num_steps=3, patience=50, progress=False).num_steps == 3


def test_bar_shows_what_the_tutorial_prints(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    y = models.random_walk(n_timesteps=10)
    svi = SVI(models.random_walk, AutoNormal(models.random_walk), Adam({"lr": 0.05}), GeneralizedELBO(w=10))
    result = fit(svi, y, num_steps=3, model_kwargs={"n_timesteps": 10})
    bar = capsys.readouterr().err
    last = {name: f"{values[-1]:.2f}" for name, values in result.history.items()}
    assert (
        f"loss={last['loss']}, reg={last['divergence']}, total={last['total']}, best={result.best:.2f}, stall=" in bar
    )
    assert "3/3" in bar
    fit(svi, y, num_steps=1, progress=False, model_kwargs={"n_timesteps": 10})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"num_steps": 0}, ValueError, "num_steps must be at least 1"),
        ({"num_steps": 1.5}, TypeError, "num_steps must be a whole number"),
        ({"num_steps": 2, "patience": 0}, ValueError, "patience must be at least 1"),
        ({"num_steps": 2, "patience": True}, TypeError, "patience must be a whole number"),
        ({"num_steps": 2, "model_kwargs": 3}, TypeError, "model_kwargs must be a dict of keyword arguments, got 3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        fit(make(GeneralizedELBO()), torch.tensor(0.0), **arguments)


def test_what_is_not_an_svi_is_refused() -> None:
    with pytest.raises(TypeError, match=r"svi must be a pyro.infer.SVI, got <function"):
        fit(model, torch.tensor(0.0), num_steps=1)


def test_a_nan_objective_is_no_improvement() -> None:
    svi = make(GeneralizedELBO())
    result_values = iter([1.0, math.nan, 2.0])
    svi.step = lambda *args: next(result_values)  # type: ignore[method-assign]
    result = fit(svi, torch.tensor(0.0), num_steps=3, progress=False)
    assert result.best == 1.0
