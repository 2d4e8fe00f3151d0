"""Independent normal values: the smallest simulator."""

from __future__ import annotations

import torch
from torch import Tensor

from pyrobirds import _checks
from pyrobirds._checks import shape_text


def normal(mu: Tensor, sigma: Tensor, n_timesteps: int) -> Tensor:
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

    A ``sigma`` that is not above 0 gives a series of NaN, which :class:`pyrobirds.Simulator` counts as a failed run: to
    raise an error, its values would have to be waited for.

    Args:
        mu: shape ``(*batch,)``, float32 or float64.
        sigma: shape, dtype and device of ``mu``.
        n_timesteps: number of values of a series.

    Returns:
        Series of shape ``(*batch, n_timesteps)``.

    Raises:
        TypeError, ValueError: ``n_timesteps`` is not a whole number of at least 1, or ``mu`` and ``sigma`` differ in
            shape; nothing is broadcast.

    Example:
        >>> series = normal(torch.tensor([0.0, 100.0]), torch.tensor([1.0, 2.0]), n_timesteps=5)
        >>> series.shape, bool((series[1] > 80).all())
        (torch.Size([2, 5]), True)
    """
    n_timesteps = _checks.positive_int("n_timesteps", n_timesteps)
    if mu.shape != sigma.shape:
        raise ValueError(
            f"normal: mu has shape {shape_text(mu.shape)} and sigma has shape {shape_text(sigma.shape)}; both must be "
            "(*batch,): expand them yourself to one shape"
        )
    sigma = torch.where(sigma > 0, sigma, torch.nan)
    noise = torch.randn_like(mu.unsqueeze(-1).expand(*mu.shape, n_timesteps))
    return torch.addcmul(mu.unsqueeze(-1), sigma.unsqueeze(-1), noise)
