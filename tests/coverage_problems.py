"""Models and calibrations that other processes can import, and coverage in a process that can be killed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyrobirds import GeneralizedELBO, fit, models, to_inference_data
from pyrobirds.arviz_groups import Variable, collect, dataset
from pyrobirds.diagnostics import coverage

NUM_DATASETS = 30
SLOW = {"num_datasets": NUM_DATASETS, "levels": [0.5, 0.9], "seed": 4, "progress": False}
LARGE = 2.0


def exported(**draws: Any) -> Any:
    """Draws (chain, draw, ...) as a calibration returns them."""
    names = ("chain", "draw", "i", "j")
    variables = {name: Variable(np.asarray(values), names[: np.ndim(values)]) for name, values in draws.items()}
    return collect({"posterior": dataset(variables)})


def model(y: Tensor) -> None:
    """Normal prior, normal likelihood: the posterior of theta is N(y / 2, 1 / 2)."""
    theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(theta, 1.0), obs=y)


def calibrate(data: dict[str, Tensor], scale: float = 1.0, shift: float = 0.0, num_draws: int = 200) -> Any:
    """Draws from the exact posterior, or from one `scale` times as wide and `shift` standard deviations higher."""
    z = torch.randn(1, num_draws) * scale + shift
    return exported(theta=data["y"] / 2 + z * 0.5**0.5)


def calibrate_slowly(data: dict[str, Tensor]) -> Any:
    time.sleep(0.01)
    return calibrate(data)


def calibrate_in_double(data: dict[str, Tensor]) -> Any:
    assert data["y"].dtype == torch.get_default_dtype() == torch.float64
    assert torch.get_num_threads() == 1
    return calibrate(data)


def fail_for_large(data: dict[str, Tensor]) -> Any:
    if data["y"] > LARGE:
        raise ArithmeticError(f"no posterior for {data['y']:.3f}")
    return calibrate(data)


def fails(data: dict[str, Tensor]) -> Any:
    raise ArithmeticError("no posterior")


def fit_walk(data: dict[str, Tensor]) -> Any:
    """What a user writes."""
    guide = AutoNormal(models.random_walk)
    svi = SVI(models.random_walk, guide, pyro.optim.Adam({"lr": 0.05}), GeneralizedELBO(w=100))
    result = fit(svi, data["x"], num_steps=20, progress=False)
    return to_inference_data(
        models.random_walk, guide, data["x"], fit=result, groups=["posterior"], num_samples=50, progress=False
    )


def run_slowly(target: Path, checkpoint: Path) -> None:
    coverage(model, calibrate_slowly, torch.tensor(0.0), checkpoint=checkpoint, **SLOW).data.to_netcdf(target)
