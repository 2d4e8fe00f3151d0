"""The ELBO as a torch module, trained by PyTorch Lightning."""

import math

import pyro
import pyro.distributions as dist
import pytest
import pytorch_lightning as pl
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.nn import Module
from torch.utils.data import DataLoader

from pyrobirds import GeneralizedELBO

Y = torch.tensor([1.4, 0.2, 2.9, 1.1, 0.6])
N, W, NUM_PARTICLES, LR, NUM_STEPS = len(Y), 2.0, 100, 0.02, 400


def model(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


class Calibration(pl.LightningModule):
    def __init__(self, objective: Module) -> None:
        super().__init__()
        self.objective = objective

    def training_step(self, y: Tensor) -> Tensor:
        return self.objective(y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


@pytest.mark.usefixtures("double_precision")
def test_lightning_trains_to_the_exact_answer() -> None:
    """Prior N(0, 1) and N observations of N(theta, 1), tempered by w: precision 1 + N / w, mean sum(y) / (N + w).

    About its optimum a parameter u of SGD is an autoregressive process. With the curvature h of the objective and the
    variance v of a step's gradient, its variance is lr**2 v / (1 - (1 - lr h)**2). With theta = mu + sigma e the
    objective's gradient by mu is N (mu - mean(y)) + N sigma mean(e) + w mu, and that by sigma is
    N (mu - mean(y)) mean(e) + N sigma mean(e**2) + w sigma - w / sigma; sigma is softplus(u). Both answers are held to
    4 standard errors, which 1 seed in 8,000 would miss; 400 steps forget all but 1e-8 of the start.
    """
    y = Y.double()
    guide = AutoNormal(model)
    guide(y)
    objective = GeneralizedELBO(w=W, num_particles=NUM_PARTICLES)(model, guide)
    before = (guide.locs.theta.item(), guide.scales.theta.item())

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(Calibration(objective), DataLoader([y] * NUM_STEPS, batch_size=None))

    mean, scale = y.sum().item() / (N + W), math.sqrt(W / (N + W))
    slope = 1 - math.exp(-scale)  # of softplus where it is `scale`
    noise_of_mean = (N * scale) ** 2 / NUM_PARTICLES
    noise_of_scale = slope**2 * N**2 * ((mean - y.mean().item()) ** 2 + 2 * scale**2) / NUM_PARTICLES
    tolerances = (
        4 * standard_error(curvature=N + W, variance=noise_of_mean),
        4 * slope * standard_error(curvature=slope**2 * 2 * (N + W), variance=noise_of_scale),
    )
    for name, start, end, exact, tolerance in zip(
        ("mean", "scale"),
        before,
        (guide.locs.theta.item(), guide.scales.theta.item()),
        (mean, scale),
        tolerances,
        strict=True,
    ):
        assert abs(start - exact) > 10 * tolerance, f"the {name} starts at the answer"
        assert abs(end - exact) < tolerance, f"the {name} is {end}, not {exact} to within {tolerance}"


def standard_error(curvature: float, variance: float) -> float:
    return math.sqrt(LR**2 * variance / (1 - (1 - LR * curvature) ** 2))
