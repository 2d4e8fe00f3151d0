"""A fit in a process of its own, for tests that kill it: python resumable_fit.py KIND RESULT [CHECKPOINT [LOG]]."""

from __future__ import annotations

import random
import sys
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from pyrobirds import GeneralizedELBO, Simulator, callbacks, fit, losses, models
from pyrobirds.fit_result import FitResult

NUM_STEPS = 150


def looped(theta: torch.Tensor, n_timesteps: int) -> torch.Tensor:
    """Noise of three generators; vmap cannot take it, so that every batch is a loop."""
    noise = random.gauss(0.0, 1.0) + np.random.normal()  # noqa: NPY002 (the global generator is the point)
    return theta * torch.tensor([theta.item() * 0 + 1.0] * n_timesteps) + noise + torch.randn(n_timesteps)


loop = Simulator(looped, loss=losses.mse, batched=False, n_timesteps=5)


def looped_model(y: torch.Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("x", loop(theta.sum(-1) * scale), obs=y)


class BatchNormGuide(pyro.nn.PyroModule):
    """A guide with buffers: the running moments of a batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, y: torch.Tensor) -> None:
        loc, scale = self.linear(self.norm(y + torch.randn(8, 2))).mean(0)
        pyro.sample("theta", dist.Normal(loc, scale.exp()))


def plain_model(y: torch.Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=3) as index:
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index, 0])


def make(kind: str) -> tuple[SVI, torch.Tensor, dict[str, Any]]:
    adam = {"lr": 0.05}
    if kind == "walk":
        walk = models.random_walk
        svi = SVI(walk, AutoNormal(walk), pyro.optim.Adam(adam), GeneralizedELBO(w=100))
        return svi, -0.5 * torch.arange(100.0), {"seed": 3, "warm_start": 5, "max_grad_norm": 1000.0}
    if kind == "loop":
        optim = pyro.optim.OneCycleLR(
            {"optimizer": torch.optim.Adam, "optim_args": adam, "max_lr": 0.1, "total_steps": NUM_STEPS + 1}
        )
        elbo = GeneralizedELBO(w=lambda step: max(1.0, 10 - 0.2 * step), num_particles=3)
        return SVI(looped_model, AutoMultivariateNormal(looped_model), optim, elbo), torch.ones(5), {}
    if kind == "foreign":
        svi = SVI(plain_model, BatchNormGuide(), pyro.optim.ClippedAdam({**adam, "lrd": 0.99}), Trace_ELBO())
        return svi, torch.randn(8, 2, generator=torch.Generator().manual_seed(0)), {}
    raise ValueError(kind)


def run(kind: str, checkpoint: str | None = None, log: str | None = None) -> FitResult:
    warnings.filterwarnings("ignore", "looped runs in a Python loop", UserWarning)
    torch.set_num_threads(1)
    pyro.set_rng_seed(1)
    svi, y, options = make(kind)
    watching = [callbacks.Log(log)] if log else []
    return fit(
        svi,
        y,
        num_steps=NUM_STEPS,
        checkpoint=checkpoint,
        checkpoint_interval=0,
        callbacks=watching,
        progress=False,
        **options,
    )


def as_tensors(result: FitResult) -> dict[str, Any]:
    """All numbers of a result but the time that it took."""
    after = [float(np.random.random()), random.random(), float(torch.rand(()))]  # noqa: NPY002
    return {
        "states": {name: dict(state) for name, state in result.states.items()},
        "history": {name: torch.from_numpy(result.history[name].values.copy()) for name in result.history},
        "window": list(result.window),
        "best": result.best,
        "reason": result.stop_reason.value,
        "generators": after,
    }


if __name__ == "__main__":
    kind, target, *rest = sys.argv[1:]
    torch.save(as_tensors(run(kind, *rest)), target)
