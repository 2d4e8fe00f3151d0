"""Simulators and models that several tests use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor


class Counted:
    """A function that counts its calls and remembers the batch size of the last one."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn
        self.calls = 0
        self.batch = 0

    def __call__(self, theta: Tensor, n_timesteps: int = 5) -> Any:
        self.calls += 1
        self.batch = len(theta)
        return self.fn(theta, n_timesteps)


def drift(theta: Tensor, n_timesteps: int = 5) -> Tensor:
    """Noise around theta: x (B, n_timesteps), mean theta, variance 1 at every time."""
    return theta.unsqueeze(-1) + torch.randn(*theta.shape, n_timesteps, dtype=theta.dtype)


def tutorial_walk(theta: Tensor, n_timesteps: int, tau: float = 0.5) -> Tensor:
    """A walk of ONE draw, as a user writes it: a Python loop that grows its history."""
    p = torch.sigmoid(theta)
    x = torch.tensor([0.0])
    for _ in range(n_timesteps - 1):
        logits = torch.hstack((p, 1 - p)).log()
        up = torch.nn.functional.gumbel_softmax(logits, tau=tau, hard=True)[0]
        x = torch.hstack((x, x[-1] + 2 * up - 1))
    return x


def model_of(site: Callable[[Tensor], Any], shape: tuple[int, ...] = ()) -> Callable[..., Any]:
    """A model with a standard normal theta, a vector if ``shape`` says so, and a site x made of it."""

    def model(y: Tensor | None = None) -> Any:
        prior = dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))
        theta = pyro.sample("theta", prior)
        return pyro.sample("x", site(theta), obs=y)

    return model


def fixed_at(theta: Tensor) -> Callable[..., Any]:
    """A guide that puts all mass on one theta."""

    def guide(*args: Any) -> None:
        pyro.sample("theta", dist.Delta(theta).to_event(theta.dim()))

    return guide


def line(theta: Tensor) -> Tensor:
    """Theta times 1, 2, 3, 4, without noise: of a batch of draws, (B,) -> (B, 4), or of one draw, () -> (4,)."""
    return theta.unsqueeze(-1) * torch.arange(1.0, 5.0, dtype=theta.dtype)


def fails_above_one(theta: Tensor, bad: float = torch.nan) -> Tensor:
    """The line where theta is at most 1, NaN or infinity above; so is its derivative."""
    return line(theta) * torch.where(theta > 1, bad, 1.0).unsqueeze(-1)


def raises_above_one(theta: Tensor) -> Tensor:
    """The line of ONE draw where theta is at most 1; above, an exception that torch raises in vmap and outside."""
    root = torch.linalg.cholesky((1.5 - theta).reshape(1, 1))
    return line(theta) + 0 * root.sum()
