"""Independent normal values: the smallest simulator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text
from pyrobirds.simulators.floats import float_tensor


def normal(mu: Tensor | float, sigma: Tensor | float, n_timesteps: int) -> Tensor:
    r"""Simulate series of independent normal values.

    .. math:: x_t = \mu + \sigma \epsilon_t, \qquad \epsilon_t \sim N(0, 1) \text{ independent.}

    The gradient with respect to both parameters is exact, path by path. Everything about it is known in closed form,
    which makes it the simulator to try a loss or a guide on first.

    ========== ============================== ================= ===================
    parameter  meaning                        units             range
    ========== ============================== ================= ===================
    ``mu``     mean of a value                those of x        any finite number
    ``sigma``  standard deviation of a value  those of x        above 0
    ========== ============================== ================= ===================

    A ``sigma`` that is not above 0, or NaN in either, gives a series of NaN, which :class:`pyrobirds.Simulator` counts
    as a failed run: to raise an error, its values would have to be waited for.

    Args:
        mu: shape ``(*batch,)``, float32 or float64; or a number.
        sigma: shape, dtype and device of ``mu``; or a number, the same for all of the batch.
        n_timesteps: number of values of a series.

    Returns:
        Series of shape ``(*batch, n_timesteps)``; ``(n_timesteps,)`` if both parameters are numbers.

    Raises:
        TypeError, ValueError: ``n_timesteps`` is not a whole number of at least 1, a parameter neither a tensor of
            float32 or float64 nor a finite number, or ``mu`` and ``sigma`` differ in shape: tensors are not broadcast.

    Example:
        >>> series = normal(torch.tensor([0.0, 100.0]), torch.tensor([1.0, 2.0]), n_timesteps=5)
        >>> series.shape, bool((series[1] > 80).all())
        (torch.Size([2, 5]), True)
    """
    n_timesteps = _checks.positive_int("n_timesteps", n_timesteps)
    mu, sigma = _tensors(mu, sigma)
    if mu.shape != sigma.shape:
        raise ValueError(
            f"normal: mu has shape {shape_text(mu.shape)} and sigma has shape {shape_text(sigma.shape)}; both must be "
            "(*batch,): expand them yourself to one shape"
        )
    sigma = torch.where(sigma > 0, sigma, torch.nan)
    noise = torch.randn_like(mu.unsqueeze(-1).expand(*mu.shape, n_timesteps))
    return torch.addcmul(mu.unsqueeze(-1), sigma.unsqueeze(-1), noise)


def _tensors(mu: Any, sigma: Any) -> tuple[Tensor, Tensor]:
    """Both as tensors; a number is one in the shape of the other."""
    if not isinstance(mu, Tensor) and not isinstance(sigma, Tensor):
        mu = torch.tensor(_checks.finite("mu", mu))
    if not isinstance(mu, Tensor):
        mu = torch.full_like(float_tensor("sigma", sigma), _checks.finite("mu", mu))
    if not isinstance(sigma, Tensor):
        sigma = torch.full_like(float_tensor("mu", mu), _checks.finite("sigma", sigma))
    return float_tensor("mu", mu), float_tensor("sigma", sigma)
