"""Exported data of small models, on which the functions of ArviZ are tried.

`python tests/export_examples.py FOLDER` writes them as netCDF files, for a Python that has no torch.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from exact_walk import TUTORIAL_WALK
from pyro.infer import MCMC, NUTS, SVI
from pyro.infer.autoguide import AutoGuide, AutoMultivariateNormal, AutoNormal
from pyro.optim import Adam

from pyrobirds import FitResult, GeneralizedELBO, fit, models, to_inference_data

NUM_SERIES, NUM_TIMES, NUM_SAMPLES = 12, 5, 500
TIMES = torch.linspace(-1.0, 1.0, NUM_TIMES)
COORDS = {"series": [f"s{number}" for number in range(NUM_SERIES)], "side": ["west", "east"], "time": TIMES.numpy()}


def sloped(y: torch.Tensor, slope: torch.Tensor | None = None) -> torch.Tensor:
    """Series with a level on either side, one slope and unit noise."""
    with pyro.plate("side", 2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
    if slope is None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        pyro.deterministic("factor", slope.exp())
    with pyro.plate("series", NUM_SERIES):
        mean = level[..., torch.arange(NUM_SERIES) % 2].unsqueeze(-1) + slope.unsqueeze(-1) * TIMES
        return pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y, infer={"event_dims": ["time"]})


def flat(y: torch.Tensor) -> torch.Tensor:
    """The same without a slope."""
    return sloped(y, slope=torch.tensor(0.0))


def fitted(
    model: Callable[..., Any], guide: AutoGuide, y: torch.Tensor, w: float, num_steps: int, seed: int
) -> FitResult:
    pyro.clear_param_store()  # guides of one kind have parameters of one name
    svi = SVI(model, guide, Adam({"lr": 0.05}), GeneralizedELBO(w=w))
    return fit(svi, y, num_steps=num_steps, seed=seed, progress=False)


def walk() -> Any:
    y = torch.tensor(TUTORIAL_WALK).float()
    guide = AutoNormal(models.random_walk)
    result = fitted(models.random_walk, guide, y, w=100, num_steps=200, seed=0)
    return to_inference_data(
        models.random_walk, guide, y, fit=result, num_samples=NUM_SAMPLES, num_repeats=20, seed=0, progress=False
    )


def of_series(model: Callable[..., Any], y: torch.Tensor, num_fits: int = 1) -> Any:
    guides = [AutoMultivariateNormal(model) for _ in range(num_fits)]
    fits = [fitted(model, guide, y, w=1, num_steps=200, seed=seed) for seed, guide in enumerate(guides)]
    return to_inference_data(model, guides, y, fit=fits, num_samples=NUM_SAMPLES, coords=COORDS, seed=0, progress=False)


def nuts(y: torch.Tensor) -> Any:
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(sloped), num_samples=NUM_SAMPLES, warmup_steps=100, disable_progbar=True)
    mcmc.run(y)
    return to_inference_data(mcmc, num_samples=NUM_SAMPLES, coords=COORDS, seed=0, progress=False)


def examples() -> dict[str, Any]:
    """Exported data by name: of the random walk, of two models of the same series, of four fits, and of NUTS."""
    noise = torch.randn(NUM_SERIES, NUM_TIMES, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([-0.5, 0.5])[torch.arange(NUM_SERIES) % 2].unsqueeze(-1) + TIMES + noise
    return {
        "walk": walk(),
        "sloped": of_series(sloped, y),
        "flat": of_series(flat, y),
        "four_fits": of_series(sloped, y, num_fits=4),
        "nuts": nuts(y),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name, data in examples().items():
        data.to_netcdf(folder / f"{name}.nc", engine="h5netcdf")
